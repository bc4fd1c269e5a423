"""Runs the decoder layers of a transformers model from disk, one at a time."""
