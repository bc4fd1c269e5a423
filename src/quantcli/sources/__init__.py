"""Quantized checkpoints as sources: what their tensors are, and the float weights they stand for."""
