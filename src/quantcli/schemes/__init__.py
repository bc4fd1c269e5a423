"""How numbers are rounded: one file, one scheme."""
