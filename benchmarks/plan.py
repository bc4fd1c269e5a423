"""CPU seconds of planning a conversion of models of tens of thousands of expert matrices.

Whole child processes, the median of several. The models are headers alone: their data is a hole in the
files. The larger one has 1.3 TB, with one tensor for each matrix, and with the experts of a layer in
two; the disk need not have room for its output.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from pathlib import Path

from common import (
    RECIPES,
    Line,
    finish,
    measure,
    parser,
    qwen3_moe,
    spread,
    workplace,
    write_model,
)
from quantcli.checkpoint.spec import TensorSpec

LAYERS, EXPERTS, HIDDEN, WIDTH = 61, 256, 7168, 2048
CODE = """
import gc
import sys
from pathlib import Path
gc.set_threshold(200_000, 50, 100)  # as the command does
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.planning.planner import make_plan
from quantcli.recipe.recipe import load_recipe
plan = make_plan(load_recipe(Path(sys.argv[1])), open_checkpoint(Path(sys.argv[2])))
assert plan.quantized_modules > 40_000, plan.quantized_modules
"""
# by model: CPU seconds
BARS = {"48 x 348 experts": 10.0, "1.3 TB": 4.0, "1.3 TB, stacked": 5.0}


def write_large(folder: Path, *, stacked: bool) -> int:
    """The model of 1.3 TB; returns the number of its tensors."""
    specs = qwen3_moe(LAYERS, EXPERTS, hidden=HIDDEN, width=WIDTH)
    if stacked:
        specs = [spec for spec in specs if ".experts." not in spec.name]
        for layer in range(LAYERS):
            path = f"model.layers.{layer}.mlp.experts"
            fused, down = (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
            specs.append(TensorSpec(f"{path}.gate_up_proj", "BF16", fused))
            specs.append(TensorSpec(f"{path}.down_proj", "BF16", down))
    write_model(folder, specs, shards=LAYERS, sparse=True)
    if stacked:
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "qwen3_5_moe_text", "hidden_size": HIDDEN, "num_experts": EXPERTS}
        (folder / "config.json").write_text(json.dumps(config))
    return len(specs)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    lines = []
    with workplace(options.dir) as folder:
        model = folder / "model"
        for what, bar in BARS.items():
            if what.startswith("1.3"):
                count = write_large(model, stacked=what.endswith("stacked"))
                recipe = RECIPES / "vllm_int8_dynamic.yaml"
            else:
                specs = qwen3_moe(48, 348, hidden=512, width=128)
                write_model(model, specs, shards=16, sparse=True)
                count, recipe = len(specs), RECIPES / "w8a8_moe_dynamic.yaml"
            words = (sys.executable, "-c", CODE, recipe, model)
            used = [measure(*words) for _ in range(options.rounds)]
            cpu = [u.cpu for u in used]
            wall = statistics.median(u.wall for u in used)
            peak = used[0].peak / 2**20
            detail = f"{count} tensors; {spread(cpu)}; wall {wall:.2f} s; peak {peak:.0f} MiB"
            lines.append(Line(f"plan, {what}", statistics.median(cpu), "s", bar, detail))
            shutil.rmtree(model)
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
