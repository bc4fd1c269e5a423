"""The types of codes and of scales: what numbers each has, and how they are stored and checked.

A type is one entry here. Schemes, targets and verification take from it what they need to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

# rules for stored numbers: see verification/full.py
CodeRule: TypeAlias = Literal["codes", "int4", "fp8"]
ScaleRule: TypeAlias = Literal["positive", "signed", "exponent"]
_UNLIMITED = float("inf")


@dataclass(frozen=True, slots=True)
class ElementType:
    """A type of codes.

    family:   of compressed-tensors: "int" or "float".
    bits:     of a code.
    least:    the smallest number.
    largest:  the largest one.
    step:     the smallest positive one.
    dtype:    safetensors dtype of a stored element.
    per_byte: codes in a stored element; of two, that of the even column is in the low four bits.
    values:   the number of each code, for a type that torch cannot convert.
    rule:     for stored elements.
    scales:   rule for float scales. Codes of integers reach one step further below zero, so that some
              producers give them negative scales.
    sqnr_db, row_db, error: the bounds of a sound conversion, see `Bounds` in verification/compare.py,
              with float scales.
    """

    name: str
    family: Literal["int", "float"]
    bits: int
    least: float
    largest: float
    step: float
    dtype: str
    rule: CodeRule
    scales: ScaleRule
    sqnr_db: float
    row_db: float
    error: float = _UNLIMITED
    per_byte: int = 1
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ScaleType:
    """A type of scales.

    dtype:   safetensors dtype with its numbers: a scale is rounded up to the next of them.
    stored:  safetensors dtype that files have, with the same bits.
    least:   the smallest number that may be a scale, also that of values that are all zero.
    rule:    for stored scales; None: as the codes' type says.
    sqnr_db: what so coarse scales take from the bound of a weight's SQNR, and
    row_db:  from that of a row.
    """

    name: str
    dtype: str
    stored: str
    least: float
    rule: ScaleRule | None = None
    sqnr_db: float = 0.0
    row_db: float = 0.0


def _table(*types: ElementType) -> Mapping[str, ElementType]:
    return {each.name: each for each in types}


_HALF_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Sources of fp8_e4m3, fp8_e5m2, fp4_e2m1 and e8m0: OCP Microscaling Formats (MX) Specification 1.0,
# sections 5.3 and 5.4. Bounds: `Bounds` says what they stand for.
ELEMENTS = _table(
    ElementType(
        "int4", "int", 4, -8.0, 7.0, step=1.0, dtype="I8", rule="int4", scales="signed",
        sqnr_db=6.0, row_db=0.5,
    ),
    ElementType(
        "int8", "int", 8, -128.0, 127.0, step=1.0, dtype="I8", rule="codes", scales="signed",
        sqnr_db=20.0, row_db=3.0, error=0.1,
    ),
    # before fp8_e4m3, which formats mean by floats of eight bits; infinities and NaN above the largest
    ElementType(
        "fp8_e5m2", "float", 8, -57344.0, 57344.0, step=2.0**-16, dtype="F8_E5M2", rule="fp8",
        scales="positive", sqnr_db=19.0, row_db=9.0, error=0.5,
    ),
    ElementType(
        "fp8_e4m3", "float", 8, -448.0, 448.0, step=2.0**-9, dtype="F8_E4M3", rule="fp8",
        scales="positive", sqnr_db=25.0, row_db=12.0, error=0.25,
    ),
    ElementType(
        "fp4_e2m1", "float", 4, -6.0, 6.0, step=0.5, dtype="U8", rule="codes", scales="positive",
        sqnr_db=9.0, row_db=4.5, per_byte=2,
        values=(*_HALF_E2M1, *(-value for value in _HALF_E2M1)),
    ),
)  # fmt: skip
_TINY = 2.0**-126  # float32 arithmetic may flush what is below its smallest normal number
SCALES: Mapping[str, ScaleType] = {
    each.name: each
    for each in (
        ScaleType("float32", "F32", "F32", _TINY),
        ScaleType("bfloat16", "BF16", "BF16", _TINY),
        # reaches so little down that its subnormals are needed
        ScaleType("float16", "F16", "F16", 2.0**-24),
        ScaleType("e4m3", "F8_E4M3", "F8_E4M3", 2.0**-9, "positive"),
        # 2^(byte - 127), and NaN for 255. A power of two leaves the largest weight anywhere between
        # half of the largest code and all of it, or over it, if the exponent was rounded down.
        ScaleType("e8m0", "F8_E8M0", "U8", 2.0**-127, "exponent", sqnr_db=3.0, row_db=4.0),
    )
}
