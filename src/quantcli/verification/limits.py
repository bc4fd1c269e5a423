"""What a sound conversion of a weight keeps, whatever the model: limits of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# dB of signal over error that a sound conversion of any weight exceeds, by the codes' kind. A row of
# normal numbers has about 40 with int8, 31 with fp8 and 14 with int4.
LEAST_SQNR = {"int8": 20.0, "fp8_e4m3": 25.0, "mxfp8": 22.0, "int4": 6.0, "float": 60.0}
# dB of the worst row. Rounding to nearest leaves no row with more error than signal, and eight bits
# leave one outlier beside 16,000 numbers of half a step about 7; zeroed, swapped and negated rows have
# 0, -3 and -6.
LEAST_ROW = {"int8": 3.0, "fp8_e4m3": 12.0, "mxfp8": 8.0, "int4": 0.5}
# Error of one weight over the largest of its matrix: rounding leaves 0.004, 0.04 and 0.09, weights that
# make up for others some times as much, a flipped sign 1 to 2. None for int4, whose best scale may cut
# an outlier of a row down to an eighth.
LARGEST = {"int8": 0.1, "fp8_e4m3": 0.25, "mxfp8": 0.25}
UNLIKE = 3.0  # dB: a lower SQNR is not an error of rounding


def is_damaged(entry: Mapping[str, Any], kind: str) -> bool:
    """Whether single rows or numbers are off by more than rounding does."""
    worst = min((row["sqnr_db"] for row in entry["worst_rows"]), default=math.inf)
    return worst < LEAST_ROW.get(kind, -math.inf) or entry["max_rel_error"] > LARGEST.get(
        kind, math.inf
    )


def fault(entry: Mapping[str, Any], kind: str) -> str | None:
    """What is wrong with a compared matrix: as a whole, in one row, in one number."""
    if entry["sqnr_db"] < entry["limit_db"]:
        return f"SQNR is {entry['sqnr_db']:.2f} dB, the limit {entry['limit_db']:.2f} dB"
    row = entry["worst_rows"][:1]
    if row and row[0]["sqnr_db"] < LEAST_ROW.get(kind, -math.inf):
        return f"SQNR of a row is {row[0]['sqnr_db']:.2f} dB, the limit {LEAST_ROW[kind]:.2f} dB"
    if entry["max_rel_error"] > LARGEST.get(kind, math.inf):
        return (
            f"a weight is off by {entry['max_rel_error']:.2f} of the largest one, the limit is "
            f"{LARGEST[kind]:.2f}"
        )
    return None
