"""What rotations keep and gain: a rotated model that stays float, and int4 and int8 with and without.

    python benchmarks/rotation.py [--model DIR] [--text FILE] [--samples N] [--speed]

Every checkpoint is made without data and run by the engine's arithmetic, as `quantcli verify --run` has
it, on windows of 256 tokens; the float one in float32, with its weights in bfloat16. `gap closed` is
the share of the perplexity that plain int4 loses and the row does not. --speed measures how fast one
weight [4096, 14336] is rotated from each side instead.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import time
from pathlib import Path

from common import QUANTCLI, ROOT, parser, workplace

ALL = "role: [attention, mlp], scheme"
ROWS = {  # name: target, rule, whether it is rotated
    "float, rotated": ("compressed-tensors", 'match: "*", scheme: keep', True),
    "int8 dynamic": ("compressed-tensors", f"{ALL}: w8a8_dynamic", False),
    "int8 dynamic, rotated": ("compressed-tensors", f"{ALL}: w8a8_dynamic", True),
    "int4 dynamic": ("ascend", f"{ALL}: {{name: w4a4_dynamic, clip: none}}", False),
    "int4 dynamic, rotated": ("ascend", f"{ALL}: {{name: w4a4_dynamic, clip: mse}}", True),
}
TP1 = "w4a4_dynamic_rotated_tp1"


def figures(folder: Path, model: Path, text: Path, samples: int) -> tuple[float, float, float]:
    """Perplexities of the model and of a checkpoint of it, and the mean KL divergence."""
    words = ["verify", folder, "--against", model, "--run", "--data", text, "--length", 256, "--json"]
    command = [*QUANTCLI, *map(str, [*words, "--samples", samples])]
    run = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)["run"]
    return run["perplexity_float"], run["perplexity"], run["mean_kl"]


def floats(folder: Path, model: Path, text: Path, samples: int) -> tuple[float, float, float]:
    """The same of a checkpoint that stays float, by transformers in float32: weights alone differ."""
    import torch
    from torch.nn.functional import cross_entropy, kl_div
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(text.read_text(), return_tensors="pt").input_ids[0]
    windows = ids[: samples * 256].view(-1, 256)
    losses, divergences = [[], []], []
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (model, folder)
    ]
    with torch.no_grad():
        for window in windows:
            logs = [each(window[None]).logits[0, :-1].log_softmax(-1) for each in models]
            for loss, log in zip(losses, logs, strict=True):
                loss.append(float(cross_entropy(log, window[1:])))
            first, second = logs
            divergence = kl_div(second, first, log_target=True, reduction="batchmean")
            divergences.append(float(divergence))
    before, after = (math.exp(sum(loss) / len(loss)) for loss in losses)
    return before, after, sum(divergences) / len(divergences)


def convert(recipe: Path | str, model: Path, out: Path) -> None:
    """Make a checkpoint, with an output matrix of its own if it is rotated."""
    words = [*QUANTCLI, "quantize", recipe, "--model", model, "--out", out]
    made = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(made.stderr)


def speed() -> None:
    """Bytes of bfloat16 that a core rotates each second, from either side."""
    import torch

    from quantcli.checkpoint.rotation.orthogonal import Hadamard

    torch.set_num_threads(1)
    rotation = Hadamard(4096, "0")
    height, width = 4096, 14336
    weight = torch.empty(height, width, dtype=torch.bfloat16).normal_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for side in ("right", "left"):
        start, done = time.process_time(), 0
        if side == "right":
            rows = weight.view(-1, 4096)
            for first in range(0, len(rows), 256):
                rotation.right(rows[first : first + 256].float())
            done = weight.nbytes
        else:
            band = rotation.band(width)
            rotation.left(lambda first, count: weight[first : first + count].float(), 0, width)
            done = weight.nbytes * band // height
        seconds = time.process_time() - start
        print(f"{side:6}{done / seconds / 1e9:8.3f} GB of bfloat16 each CPU second")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"memory{peak / 2**10:8.1f} MiB next to the weight")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny-qwen3")
    arguments.add_argument("--text", type=Path, default=ROOT / "examples" / "evaluation.txt")
    arguments.add_argument("--samples", type=int, default=32, help="windows of text")
    arguments.add_argument("--speed", action="store_true", help="measure speed and memory alone")
    options = arguments.parse_args()
    if options.speed:
        speed()
        return
    found: dict[str, tuple[float, float, float]] = {}
    with workplace(options.dir) as folder:
        for number, name in enumerate((*ROWS, TP1)):
            recipe, out = folder / f"{number}.yaml", folder / f"rotation-{number}"
            if name == TP1:
                text = (ROOT / "recipes" / f"{TP1}.yaml").read_text()
                recipe.write_text(text.replace("  heads: true\n", "  heads: true\n  untie: true\n"))
            else:
                target, rule, is_rotated = ROWS[name]
                block = "rotate: {untie: true}\n" * is_rotated
                recipe.write_text(f"target: {target}\n{block}rules:\n- {{{rule}}}\n")
            convert(recipe, options.model, out)
            judge = floats if name.startswith("float") else figures
            found[name] = judge(out, options.model, options.text, options.samples)
    base, worst, _ = found["int4 dynamic"]
    if options.json:
        print(json.dumps(found))
        return
    print(f"{'':28}{'perplexity':>12}{'ratio':>9}{'KL':>10}{'gap closed':>12}")
    for name, (ours, other, kl) in found.items():
        closed = f"{(worst - other) / (worst - base):12.0%}" if "4" in name else ""
        print(f"{name:28}{other:12.3f}{other / ours:9.4f}{kl:10.5f}{closed}")


if __name__ == "__main__":
    main()
