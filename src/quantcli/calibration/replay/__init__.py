"""Runs decoder layers of any transformers model from disk, one at a time, in float or as an engine computes."""
