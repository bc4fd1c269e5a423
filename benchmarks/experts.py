"""Peak resident memory of a conversion of stacked experts, above that of a nearly empty conversion.

One layer's stack holds 256 experts of [1024, 4096], 2 GiB, and must be read by rows or, if its experts
are stored [in, out], by strips of columns. The output has a matrix for each expert.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from common import Line, finish, parser, quantize, workplace, write_model
from quantcli.checkpoint.spec import TensorSpec

HIDDEN, WIDTH = 4096, 512
BAR = 64.0  # MiB
FAMILIES = {"qwen3_5_moe": "rows", "qwen3_vl_moe": "columns"}


def write_stacks(folder: Path, family: str, experts: int, hidden: int = HIDDEN) -> int:
    """A checkpoint with the stacks of one layer; returns the bytes of its weights."""
    layer = "model.language_model.layers.0"
    fused, down = (2 * WIDTH, hidden), (hidden, WIDTH)
    if family == "qwen3_vl_moe":
        fused, down = fused[::-1], down[::-1]
    specs = [
        TensorSpec(f"{layer}.mlp.experts.gate_up_proj", "BF16", (experts, *fused)),
        TensorSpec(f"{layer}.mlp.experts.down_proj", "BF16", (experts, *down)),
        TensorSpec(f"{layer}.mlp.gate.weight", "BF16", (experts, hidden)),
    ]
    nbytes = write_model(folder, specs, shards=1)
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": family,
        "dtype": "bfloat16",
        "text_config": {
            "model_type": f"{family}_text",
            "hidden_size": hidden,
            "num_experts": experts,
            "num_hidden_layers": 1,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return nbytes


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--experts", type=int, default=256)
    arguments.add_argument("--recipes", nargs="+", default=["w8a8_dynamic", "vllm_fp8_dynamic"])
    arguments.add_argument("--workers", type=int, default=2)
    options = arguments.parse_args()
    lines = []
    with workplace(options.dir) as folder:
        model, out = folder / "model", folder / "out"
        for family, how in FAMILIES.items():
            write_stacks(model, family, 1, hidden=64)
            workers = ("--workers", str(options.workers))
            for _ in range(2):  # the first compiles what is kept
                empty = {recipe: quantize(recipe, model, out, *workers) for recipe in options.recipes}
            shutil.rmtree(model)
            nbytes = write_stacks(model, family, options.experts)
            for recipe in options.recipes:
                used = quantize(recipe, model, out, *workers)
                what = f"{recipe}, {options.experts} experts, {nbytes / 1e9:.1f} GB, by {how}"
                detail = f"{options.workers} workers, {used.wall:.1f} s, CPU {used.cpu:.1f} s"
                above = used.peak - empty[recipe].peak
                lines.append(Line(what, above / 2**20, "MiB", BAR, detail))
            shutil.rmtree(model)
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
