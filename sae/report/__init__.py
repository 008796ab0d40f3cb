"""The HTML report: metrics of several runs beside each other, and what their latents fire on."""
