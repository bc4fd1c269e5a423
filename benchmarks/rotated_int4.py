"""W4A4 on all decoder linears: how much of the gap between nearest and float rotations close.

    python benchmarks/rotated_int4.py --data FILE [--model DIR] [--text FILE ...] [--samples 32]
                                      [--epochs 4] [--only NAME ...]

With the engine's arithmetic, on the first 40 windows of 256 tokens of each text: perplexity, mean
change of a token's log-probability, share of the gap closed, and CPU seconds. `folded`: Hadamard
matrices in the weights alone; `engine`: o_proj and down_proj with inputs that the engine rotates, too;
then with GPTQ on --data, and with matrices that are learned on it.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from perplexity import ROOT, windows
from quantcli.calibration.replay.served import Served, log_probs
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.commands import quantize as commands

OUT, REST = ["attention.out", "mlp.out"], ["attention", "mlp"]


def recipes(data: Path | None, samples: int, epochs: int) -> dict[str, dict[str, Any]]:
    """Recipes by name; those that need a text only if there is one."""

    def of(out: Any, rest: Any, **more: Any) -> dict[str, Any]:
        rules = [{"role": OUT, "scheme": out}, {"role": REST, "scheme": rest}]
        return {"target": {"name": "ascend", "tp": 1}, "rules": rules, **more}

    nearest, dynamic = {"name": "w4a4_dynamic", "clip": "none"}, {"name": "w4a4_dynamic", "clip": "mse"}
    found = {
        "nearest": of(nearest, nearest),
        "folded": of(dynamic, dynamic, rotate={}),
        "engine": of("w4a4_hadamard", dynamic, rotate={}),
    }
    if data is not None:
        text = {"data": str(data), "samples": samples, "length": 256, "dtype": "float32"}
        gptq = {"weight_rounding": "gptq"}
        schemes = {"name": "w4a4_hadamard", **gptq}, {**dynamic, **gptq}
        learn = {"learn": {"epochs": epochs}}
        found |= {
            "engine, gptq": of(*schemes, rotate={}, calibration=text),
            "engine, learned": of("w4a4_hadamard", dynamic, rotate=learn, calibration=text),
            "engine, learned, gptq": of(*schemes, rotate=learn, calibration=text),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "examples/tiny-qwen3")
    parser.add_argument("--text", type=Path, nargs="+", default=[ROOT / "examples/evaluation.txt"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--only", nargs="+")
    given = parser.parse_args()
    texts = {text.stem: windows(given.model, text, 40, 256) for text in given.text}
    floats = {
        name: torch.cat(log_probs(open_checkpoint(given.model), batches, dtype="F32", workers=2))
        for name, batches in texts.items()
    }
    nearest: dict[str, float] = {}
    for name, recipe in recipes(given.data, given.samples, given.epochs).items():
        if given.only and name not in {"nearest", *given.only}:
            continue
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            out = Path(folder) / "out"
            commands.quantize(commands.plan(recipe, model=str(given.model), out=out))
            seconds = time.process_time() - began
            for text, batches in texts.items():
                scores = torch.cat(log_probs(Served.open(out), batches, dtype="F32", workers=2))
                base = math.exp(-floats[text].mean())
                perplexity = math.exp(-scores.mean())
                nearest.setdefault(text, perplexity)
                closed = (nearest[text] - perplexity) / (nearest[text] - base)
                change = float((scores - floats[text]).abs().mean())
                print(
                    f"{name:<22} {text:<18} {perplexity:.4f}  float {base:.4f}  change {change:.4f}  "
                    f"gap closed {closed:.1%}  {seconds:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
