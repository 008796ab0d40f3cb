"""Activations to a dictionary: regularized Top-k sparse autoencoders, their metrics and reports."""
