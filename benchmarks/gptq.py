"""What `weight_rounding: gptq` gains over rounding to nearest: errors of outputs, and predictions.

    python benchmarks/gptq.py [--model DIR] [--data FILE] [--text FILE] [--clip none] [--inputs float]
        [--schemes NAME ...] [--predictions]

Calibrated on --data, judged on --text, which it has not seen. The first lines are the error of each
kind of layer over that of the same scheme rounded to nearest, on inputs of the float model: the root of
summed squares over all layers of that kind. The others are of W4A16 with groups of 128 and of four-bit
floats, by the engine's arithmetic: perplexity over the float model's, how often both differ in the most
likely token, by how much the log-probability of the text's tokens changes. Bars of W4A16 are what
llm-compressor's GPTQ reached on `examples/tiny-qwen3`, calibrated on articles of WikiText-2 and judged
on others. Those of four-bit floats are on the last of these numbers over that of `nearest`.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

import torch
from torch import Tensor

from common import ROOT, Line, finish, parser, workplace
from quantcli.calibration.replay.replay import Replay
from quantcli.calibration.replay.served import Forward, Served, token_log_probs
from quantcli.calibration.replay.skeleton import Skeleton
from quantcli.calibration.replay.taps import Matrices, Matrix, Tap
from quantcli.calibration.text.dataset import Batch
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.tensors import read_tensor
from quantcli.commands import quantize as commands

CPU = torch.device("cpu")
INT4 = {"name": "w4a16"}
SCHEMES = {
    "int4 channel": INT4 | {"group_size": "channel"},
    "int4 g128": INT4,
    "int8 channel": {"name": "w8a16"},
    "nvfp4a16": {"name": "nvfp4a16"},
    "nvfp4": {"name": "nvfp4"},
    "mxfp4a16": {"name": "mxfp4a16"},
    "mxfp4": {"name": "mxfp4"},
}
# the most that GPTQ leaves of the change of log-probabilities; that by fp4 inputs stays
FP4_BARS = {"nvfp4a16": 0.75, "nvfp4": 0.95, "mxfp4a16": 0.75, "mxfp4": 0.95}
BARS = {"perplexity ratio": 1.0034, "other top token": 1 - 0.951, "log-prob change": 0.0658}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", type=Path, default=ROOT / "examples/tiny-qwen3")
    arguments.add_argument("--data", type=Path, default=ROOT / "examples/calibration.txt")
    arguments.add_argument("--text", type=Path, default=ROOT / "examples/evaluation.txt")
    arguments.add_argument("--samples", type=int, default=128, help="of --data, of --length tokens")
    arguments.add_argument("--windows", type=int, default=40, help="of --text, of --length tokens")
    arguments.add_argument("--length", type=int, default=256)
    arguments.add_argument("--clip", default="inputs", choices=["inputs", "columns", "mse", "none"])
    arguments.add_argument("--inputs", default="quantized", choices=["float", "quantized"])
    arguments.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    arguments.add_argument("--predictions", action="store_true", help="only them")
    options = arguments.parse_args()
    batches = windows(options.model, options.text, options.windows, options.length)
    calibration = {
        "data": str(options.data.resolve()), "samples": options.samples, "length": options.length,
        "inputs": options.inputs, "dtype": "float32",
    }  # fmt: skip
    lines: list[Line] = []
    predicted = [name for name in options.schemes if name in FP4_BARS or SCHEMES[name] is INT4]
    with workplace(options.dir) as folder:
        for name in predicted if options.predictions else options.schemes:
            scheme = SCHEMES[name]
            clip = {"clip": options.clip} if scheme["name"] == "w4a16" else {}
            for rounding in ("nearest", "gptq"):
                how = scheme | clip | {"weight_rounding": rounding}
                convert(folder / f"{name}-{rounding}", options.model, how, calibration)
        if not options.predictions:
            lines += errors(folder, options.model, batches, options.schemes)
        base = predictions(options.model, batches)
        for name in predicted:
            changes = []
            for rounding in ("nearest", "gptq"):
                found = compared(predictions(folder / f"{name}-{rounding}", batches), base)
                changes.append(found["log-prob change"])
                for what, value in found.items():
                    bar = BARS[what] if SCHEMES[name] is INT4 and rounding == "gptq" else None
                    lines.append(Line(f"{name}, {rounding}: {what}", value, "", bar, f"{value:.5f}"))
            if name in FP4_BARS:
                ratio = changes[1] / changes[0]
                lines.append(Line(f"{name}: log-prob change, gptq", ratio, "x", FP4_BARS[name]))
    finish(lines, as_json=options.json)


def windows(model: Path, text: Path, count: int, length: int) -> list[Batch]:
    """The first `count` windows of a text, 8 a batch."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    ids = tokenizer(text.read_text(), verbose=False)["input_ids"][: count * length]
    return [Batch(part, None) for part in torch.tensor(ids).view(count, length).split(8)]


def convert(out: Path, model: Path, scheme: dict[str, object], calibration: dict[str, object]) -> None:
    """Quantize every linear of the decoder."""
    recipe = out.with_suffix(".json")  # JSON is YAML
    rules = [{"match": "*_proj", "scheme": scheme}]
    made = {"target": "compressed-tensors", "rules": rules, "calibration": calibration}
    recipe.write_text(json.dumps(made))
    commands.quantize(commands.plan(recipe, model=str(model), out=out))


# -- errors ------------------------------------------------------------------------------------------


class Errors:
    """A listener that sums squares of outputs that weights lose, by (which weights, matrix)."""

    def __init__(self, lost: dict[str, dict[str, Tensor]]) -> None:
        self.sums: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._lost = lost
        self._lock = Lock()

    def linear(self, matrix: Matrix, x: Tensor, bias: Tensor | None) -> None:
        """x [..., k]; nothing else is computed."""
        for which, weights in self._lost.items():
            error = float((x @ weights[matrix.parameter].T).double().square().sum())
            with self._lock:
                self.sums[which, matrix.parameter] += error


def errors(folder: Path, model: Path, batches: list[Batch], schemes: list[str]) -> list[Line]:
    """Of each scheme and kind of layer, gptq over nearest, on inputs of the float model."""
    names = [f"{name}-{rounding}" for name in schemes for rounding in ("nearest", "gptq")]
    served = {name: Served.open(folder / name) for name in names}
    skeleton = Skeleton(open_checkpoint(model), "F32", trust_remote_code=False)
    replay = Replay(skeleton, batches, device=CPU, workers=2)
    states: dict[int, Tensor] = {}
    replay.begin(states.__setitem__)
    sums: defaultdict[tuple[str, str], float] = defaultdict(float)
    for index, (name, layer) in enumerate(skeleton.layers):
        told = Errors({which: lost(found, skeleton, f"{name}.") for which, found in served.items()})
        with skeleton.loaded(index, read_tensor, CPU):
            tap = partial(tapped, Matrices(name, layer), told)
            replay.run(index, layer, states, states.__setitem__, tap)
        for (which, parameter), value in told.sums.items():
            sums[which, parameter.split(".")[-2]] += value
    lines = []
    for name in schemes:
        for kind in sorted({kind for _, kind in sums}):
            ratio = math.sqrt(sums[f"{name}-gptq", kind] / sums[f"{name}-nearest", kind])
            lines.append(Line(f"{name}: error of {kind}", ratio, "x", 0.99))
    return lines


def tapped(matrices: Matrices, listener: Errors, batch: int) -> Tap:
    """A tap for one batch."""
    return Tap(matrices, listener)


def lost(served: Served, skeleton: Skeleton, prefix: str) -> dict[str, Tensor]:
    """What each weight below `prefix` lacks of the float one it was made from."""
    tensors = served.checkpoint.tensors
    return {
        name: served.read(tensors[name]).float() - read_tensor(stored).float()
        for name, stored in skeleton.checkpoint.tensors.items()
        if name.startswith(prefix) and name.endswith("_proj.weight")
    }


# -- predictions -------------------------------------------------------------------------------------


def predictions(model: Path, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Of every token but the first: its log-probability, and the most likely token in its place."""
    checkpoint = open_checkpoint(model)
    served = Served.open(model) if "quantization_config" in checkpoint.config else checkpoint
    scores, tops = [], []
    with TemporaryDirectory() as states:
        forward = Forward(served, batches, Path(states), workers=2)
        for index in range(len(forward.skeleton.layers)):
            forward.layer(index)
        for logits, batch in zip(forward.logits(), batches, strict=True):
            scores.append(token_log_probs(logits, batch))
            tops.append(logits[:, :-1].argmax(-1))
    return torch.cat(scores), torch.cat(tops)


def compared(ours: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Perplexity over that of the float model, how often the top token is another, mean change."""
    return {
        "perplexity ratio": math.exp(float((base[0] - ours[0]).mean())),
        "other top token": float((ours[1] != base[1]).float().mean()),
        "log-prob change": float((ours[0] - base[0]).abs().mean()),
    }


if __name__ == "__main__":
    main()
