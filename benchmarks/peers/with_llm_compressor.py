"""with_llm_compressor.py MODEL OUT CELL WINDOWS: convert a model with llm-compressor.

WINDOWS is a JSON list of token ids, one list per calibration sample; data-free cells do not read it.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import AWQModifier, SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import DataLoader

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
INT8_STATIC = {
    "weights": INT8 | {"strategy": "channel"},
    "input_activations": INT8 | {"strategy": "tensor", "dynamic": False},
}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
INT4_G64 = {"weights": INT4 | {"group_size": 64}}
INT4_G128 = {"weights": INT4 | {"group_size": 128}}


def linears(modifier: Callable[..., Any], scheme: str | dict[str, Any]) -> Any:
    """A modifier for every linear of the decoder."""
    ignore = ["lm_head"]
    if isinstance(scheme, str):
        return modifier(targets="Linear", scheme=scheme, ignore=ignore)
    return modifier(config_groups={"all": {"targets": ["Linear"], **scheme}}, ignore=ignore)


# cell -> how its modifiers are made; those in DATA_FREE need no data
CELLS: dict[str, Callable[[], list[Any]]] = {
    "int8-dynamic": lambda: [linears(QuantizationModifier, "W8A8")],
    "fp8-dynamic": lambda: [linears(QuantizationModifier, "FP8_DYNAMIC")],
    "int4-g64": lambda: [linears(QuantizationModifier, INT4_G64)],
    "nvfp4a16": lambda: [linears(QuantizationModifier, "NVFP4A16")],
    "mxfp4a16": lambda: [linears(QuantizationModifier, "MXFP4A16")],
    "mxfp4": lambda: [linears(QuantizationModifier, "MXFP4")],
    "mxfp8": lambda: [linears(QuantizationModifier, "MXFP8")],
    "nvfp4": lambda: [linears(QuantizationModifier, "NVFP4")],
    "int8-dynamic-smooth": lambda: [SmoothQuantModifier(), linears(QuantizationModifier, "W8A8")],
    "int8-static": lambda: [linears(QuantizationModifier, INT8_STATIC)],
    "int8-static-smooth": lambda: [
        SmoothQuantModifier(),
        linears(QuantizationModifier, INT8_STATIC),
    ],
    "int4-g64-gptq": lambda: [linears(GPTQModifier, INT4_G64)],
    "int4-g64-awq": lambda: [AWQModifier(), linears(QuantizationModifier, INT4_G64)],
    "int4-g128": lambda: [linears(QuantizationModifier, INT4_G128)],
    "int4-g128-gptq": lambda: [linears(GPTQModifier, INT4_G128)],
    "int4-g128-awq": lambda: [AWQModifier(), linears(QuantizationModifier, INT4_G128)],
}
DATA_FREE = {
    "int8-dynamic", "fp8-dynamic", "int4-g64", "int4-g128", "nvfp4a16", "mxfp4a16", "mxfp4", "mxfp8",
}  # fmt: skip


def main(model: str, out: str, cell: str, windows: str) -> None:
    """Convert, and save in the compressed-tensors format."""
    from transformers import AutoModelForCausalLM

    if not torch.accelerator.is_available():  # AWQ pins memory for one, and fails without it
        IntermediatesCache.pin_memory = lambda *_, **__: None
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    if cell in DATA_FREE:
        oneshot(model=loaded, recipe=CELLS[cell](), pipeline="datafree")
    else:
        rows = torch.tensor(json.loads(Path(windows).read_text()))
        samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
        count, length = rows.shape
        oneshot(
            model=loaded,
            recipe=CELLS[cell](),
            dataset=DataLoader(samples, batch_size=8),
            max_seq_length=length,
            num_calibration_samples=count,
        )
    loaded.save_pretrained(out, save_compressed=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
