"""Images to activations: sources, encoders, and extraction into an activation store."""
