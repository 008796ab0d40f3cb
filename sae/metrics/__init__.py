"""Metrics of a trained dictionary, one family a file: numpy and sparse codes in, float64 results out."""
