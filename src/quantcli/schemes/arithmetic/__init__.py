"""Formulas that several schemes and other packages share: rounding, clipping, tiles, GPTQ, observers.

Functions of tensors only."""
