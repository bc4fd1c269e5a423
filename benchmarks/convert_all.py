"""convert_all.py MODEL OUT [RECIPE...]: convert a model with recipes that need no data.

Each goes to OUT/RECIPE, all in one process; by default all recipes that fit a dense model. `isa.py` and
`arm64.py` run this with other instruction sets.
"""

from __future__ import annotations

import sys
from pathlib import Path

from common import RECIPES, quantize_to

DATA_FREE = (
    "w8a8_dynamic",
    "fp8_dynamic",
    "mxfp8",
    "w8a16",
    "w4a4_dynamic",
    "vllm_int8_dynamic",
    "vllm_fp8_dynamic",
    "vllm_fp8_block",
    "vllm_mxfp8",
    "vllm_w4a16",
    "vllm_w4a8",
    "fp8_block",
    "gptq_int4",
    "gptq_int8",
)


def main(model: str, out: str, *recipes: str) -> None:
    """Convert with each recipe; two workers."""
    for recipe in recipes or DATA_FREE:
        folder = Path(out) / recipe
        folder.parent.mkdir(parents=True, exist_ok=True)
        quantize_to(folder, RECIPES / f"{recipe}.yaml", Path(model))


if __name__ == "__main__":
    main(*sys.argv[1:])
