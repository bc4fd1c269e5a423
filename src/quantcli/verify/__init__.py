"""Prove that a quantized checkpoint is whole, loadable and faithful."""
