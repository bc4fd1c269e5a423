"""NVFP4, MXFP4 and MXFP8 next to llm-compressor's, of the bundled model, by one consumer.

quantcli and llm-compressor (in an environment of its own, see `environments.py`) convert the model;
both read the same text if inputs are measured. The arithmetic of `quantcli verify --run` runs all
checkpoints over windows of 256 tokens of a text. Figures are the mean change of a token's
log-probability over llm-compressor's, and the difference with its standard error over windows. The
bars: NVFP4 weights, and MXFP4 with float inputs and its own, change less than llm-compressor's; MXFP8,
whose numbers are nearly the same, no more than 1.001 times as much.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from common import RECIPES, ROOT, Line, finish, parser
from environments import PEERS, Stages, run
from quantcli.calibration.replay.served import Served, log_probs
from quantcli.calibration.text.dataset import Batch, TextSource, load_dataset
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.commands import quantize as commands

MODEL = ROOT / "examples" / "tiny-qwen3"
LENGTH, SAMPLES = 256, 64
# recipe, llm-compressor's cell, the most change over llm-compressor's; none where inputs are measured
PAIRS: tuple[tuple[str, str, float | None], ...] = (
    ("vllm_nvfp4a16", "nvfp4a16", 1.0),
    ("vllm_nvfp4", "nvfp4", None),
    ("vllm_mxfp4a16", "mxfp4a16", 1.0),
    ("vllm_mxfp4", "mxfp4", 1.0),
    ("vllm_mxfp8", "mxfp8", 1.001),
)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--text", type=Path, default=ROOT / "examples" / "evaluation.txt")
    arguments.add_argument("--windows", type=int, default=60)
    arguments.add_argument("--environments", type=Path, default=ROOT / "build" / "pretrained")
    options = arguments.parse_args()
    stages = Stages(options.environments.resolve())
    folder = Path(options.dir or stages.folder / "eight_bit_scales").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    calibration = ROOT / "examples" / "calibration.txt"
    rows = [row for b in windows(calibration, SAMPLES, 0) for row in b.input_ids.tolist()]
    (folder / "windows.json").write_text(json.dumps(rows))
    batches = windows(options.text, options.windows, None)
    base: dict[str, Tensor] = {}
    lines = []
    for recipe, cell, bar in PAIRS:
        ours, theirs = folder / recipe, folder / f"llm-compressor-{cell}"
        if not ours.exists():
            commands.quantize(commands.plan(RECIPES / f"{recipe}.yaml", model=str(MODEL), out=ours))
        if not theirs.exists():
            python, script = stages.environment("llm-compressor"), PEERS / "with_llm_compressor.py"
            log = theirs.with_suffix(".log")
            run(log, python, script, MODEL, theirs, cell, folder / "windows.json")
        mine, other = (change(path, batches, base) for path in (ours, theirs))
        apart = mine - other
        error = float(apart.std()) / math.sqrt(len(apart))
        detail = f"{float(mine.mean()):.5f} against {float(other.mean()):.5f} nats a token, "
        detail += f"difference {float(apart.mean()):+.5f} ± {error:.5f}"
        lines.append(Line(recipe, float(mine.mean() / other.mean()), "x", bar, detail))
    finish(lines, as_json=options.json)


def windows(text: Path, count: int, seed: int | None) -> list[Batch]:
    """The first windows of a text, or those that a calibration draws with a seed; 4 a batch."""
    source = TextSource(str(text), str(text), count, LENGTH, seed, pack=True, batch_tokens=4 * LENGTH)
    return list(load_dataset(source, MODEL, positions=None, vocab_size=None).batches)


def change(path: Path, batches: list[Batch], base: dict[str, Tensor]) -> Tensor:
    """The mean |change of log-probability| of each window: float32 [windows]. base: by dtype."""
    served = Served.open(path)
    if served.dtype not in base:
        base[served.dtype] = torch.cat(log_probs(open_checkpoint(MODEL), batches, dtype=served.dtype))
    scores = torch.cat(log_probs(served, batches, dtype=served.dtype))
    return (scores - base[served.dtype]).abs().mean(1)


if __name__ == "__main__":
    main()
