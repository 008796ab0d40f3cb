"""The activation store: the contract between `pipeline`, which writes it, and `sae`, which reads it."""
