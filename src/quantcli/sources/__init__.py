"""Quantized checkpoints of others, read as floats: one file for each storage format.

A source decodes rows of tensors; it writes nothing."""
