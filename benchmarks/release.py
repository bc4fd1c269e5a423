"""A release of three static recipes against one of them alone: CPU seconds, peak memory, bytes read.

All of them calibrate on the same text. Each run is a process of its own; its CPU seconds are those of
all its threads, imports included. The weights of a release are compared with those of separate runs.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from calibration import make_model
from common import QUANTCLI, ROOT, Line, Usage, finish, hashes, measure, parser, workplace

STATIC = ("w8a8_static", "vllm_int8_static", "fp8_static")
CPU_BAR = 1.3


def release(
    folder: Path, model: Path, recipes: Sequence[str], sizes: dict[str, int]
) -> tuple[Usage, dict[str, dict[str, str]]]:
    """What a release of these recipes takes, and the hashes of the weights of each; deletes them.

    One line on stderr when it has ended.
    """
    file, out = folder / "release.yaml", folder / "out"
    data = str(ROOT / "examples" / "calibration.txt")
    table = {"checkpoints": list(recipes), "calibration": {"data": data, **sizes}}
    file.write_text(json.dumps(table))  # which is YAML
    used = measure(*QUANTCLI, "release", file, "--model", model, "--out", out, "--quiet")
    line = f"{' '.join(recipes):<50} {used.cpu:7.1f} s of CPU, {used.peak / 2**20:6.0f} MiB"
    print(line, file=sys.stderr, flush=True)
    weights = {
        recipe: {name: h for name, h in hashes(out / recipe).items() if name.endswith(".safetensors")}
        for recipe in recipes
    }
    shutil.rmtree(out)
    shutil.rmtree(f"{out}.calibration")
    return used, weights


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--layers", type=int, default=0, help="of a random Llama; 0: the bundled model"
    )
    options.add_argument("--hidden", type=int, default=1024)
    options.add_argument("--samples", type=int, default=128)
    options.add_argument("--length", type=int, default=512)
    args = options.parse_args()
    sizes = {"samples": args.samples, "length": args.length}
    lines = []
    with workplace(args.dir) as folder:
        model = ROOT / "examples" / "tiny-qwen3"
        if args.layers:
            model = folder / "model"
            make_model(model, args.layers, args.hidden)
        alone = {recipe: release(folder, model, [recipe], sizes) for recipe in STATIC}
        together, weights = release(folder, model, STATIC, sizes)
    first = alone[STATIC[0]][0]
    for recipe, (_, own) in alone.items():
        same = own == {recipe: weights[recipe]}
        lines.append(Line(f"weights of {recipe} that differ", float(not same), "", 0))
    separate = sum(used.cpu for used, _ in alone.values()) / first.cpu
    lines.append(Line("CPU of the release over one recipe's", together.cpu / first.cpu, "x", CPU_BAR))
    lines.append(Line("CPU of separate runs over one recipe's", separate, "x"))
    lines.append(Line("peak memory over one recipe's", together.peak / first.peak, "x"))
    finish(lines, as_json=args.json)


if __name__ == "__main__":
    main()
