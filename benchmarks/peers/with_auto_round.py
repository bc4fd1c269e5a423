"""with_auto_round.py MODEL OUT CELL WINDOWS: convert a model with auto-round.

WINDOWS is a JSON list of token ids, one list per calibration sample; data-free cells do not read it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from torch.utils.data import DataLoader

PLAIN = {"iters": 0, "disable_opt_rtn": True}
FP8 = {
    "bits": 8, "group_size": -1, "data_type": "fp", "sym": True, "act_bits": 8, "act_group_size": -1,
    "act_data_type": "fp", "act_sym": True, "act_dynamic": True,
}  # fmt: skip
CELLS: dict[str, dict[str, Any]] = {
    "int8-dynamic": {"scheme": "INT8", **PLAIN},
    "fp8-dynamic": {"scheme": FP8, **PLAIN},
    "int4-g64": {"scheme": "W4A16G64", **PLAIN},
    "int4-g64-opt": {"scheme": "W4A16G64", "iters": 0, "disable_opt_rtn": False},
    "int4-g64-sign": {"scheme": "W4A16G64", "iters": 50},
}


def main(model: str, out: str, cell: str, windows: str) -> None:
    """Convert, and save in the compressed-tensors format."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = torch.tensor(json.loads(Path(windows).read_text()))
    count, length = rows.shape
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    made = AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
        AutoTokenizer.from_pretrained(model),
        dataset=DataLoader(samples, batch_size=8),
        nsamples=count,
        seqlen=length,
        device_map="cpu",
        enable_torch_compile=False,
        **CELLS[cell],
    )
    made.quantize_and_save(f"{out}-made", format="llm_compressor")
    (folder,) = Path(f"{out}-made").iterdir()  # it adds a folder with the scheme's name
    folder.rename(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
