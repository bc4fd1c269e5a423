"""Loops over weights as machine code, with the bits of the torch code that each stands for.

`tensors` is for callers: a function gives None if torch must serve. `machine` loads code, and compiles
it once for a CPU; `loops` and `formulas` are what is compiled.
"""

LANES = 16  # partial sums of a row: see `total` in schemes/arithmetic/clipping.py
BLOCK = 4 * LANES  # numbers of a row that compiled sums take at once
REFINEMENTS = 2  # of a scale: see `least_error` there
WIDE = 8  # numbers of a vector; scales that are tried at once
ROWS = 256  # of a table with the errors of rounding: see `Grid` in schemes/arithmetic/fp4.py
