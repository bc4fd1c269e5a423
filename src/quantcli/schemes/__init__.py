"""How numbers are rounded: one file for each scheme, found by scanning this folder.

A scheme knows tensors and `core.numerics`. It knows no file, no target and no model."""
