"""What vLLM itself answers for converted checkpoints, against the float model in the same engine.

    make test-engine      # once: it sets up the environment with vLLM's CPU build
    python benchmarks/engine.py [--model DIR] [--text FILE] [--data FILE] [FORMAT ...]

FORMAT is a name of the table below, or a recipe's path. Each is converted, served, and compared over
--windows windows of --length tokens: perplexity over float with its standard error, share of places
with the same likeliest token, mean |change of log-probability|. A format that vLLM does not serve here
shows what it said. With --bars the answers may be no worse than those to llm-compressor's checkpoints
of the example model (on 40 windows of 256 tokens of the end of WikiText-2's test articles, calibrated
with others of them); perplexity by no more than two standard errors.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from quantcli.commands import quantize as commands

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.engine.harness import Refused, distance, serve, windows  # noqa: E402

CT = "compressed-tensors"
# format: target and scheme of all projections
FORMATS: dict[str, tuple[str, dict[str, object]]] = {
    "int8-dynamic": (CT, {"name": "w8a8_dynamic"}),
    "int8-static": (CT, {"name": "w8a8_static"}),
    "int8-static-symmetric": (CT, {"name": "w8a8_static", "symmetric": True}),
    "fp8-dynamic": (CT, {"name": "fp8_dynamic"}),
    "w4a16": (CT, {"name": "w4a16"}),
    "w4a16-channel": (CT, {"name": "w4a16", "group_size": "channel"}),
    "w4a16-gptq": (CT, {"name": "w4a16", "weight_rounding": "gptq"}),
    "w4a8": (CT, {"name": "w4a8"}),
    "w8a16": (CT, {"name": "w8a16"}),
    "fp8-static": (CT, {"name": "fp8_static"}),
    "fp8-tensor": (CT, {"name": "fp8_tensor"}),
    "fp8-block": (CT, {"name": "fp8_block"}),
    "hf-fp8-static": ("fp8", {"name": "fp8_static"}),
    "hf-fp8-tensor": ("fp8", {"name": "fp8_tensor"}),
    "hf-fp8-block": ("fp8", {"name": "fp8_block"}),
}
SERVED = ("int8-dynamic", "int8-static", "fp8-dynamic", "w4a16", "w4a16-gptq")
# What vLLM 0.32.0 answers on the same CPU for checkpoints that llm-compressor 0.14 made of the example
# model: perplexity over float, agreement, change.
BARS = {
    "int8-dynamic": (1.0005, 0.981, 0.0255),
    "int8-static": (1.0020, 0.957, 0.0578),
    "fp8-dynamic": (1.0019, 0.966, 0.0477),
    "w4a16": (1.0140, 0.919, 0.1103),
    "w4a16-gptq": (1.0066, 0.952, 0.0649),
}
NEED_DATA = ("static", "gptq")


def recipe(name: str, data: Path, samples: int, length: int) -> str:
    """A recipe that gives every projection the format's scheme."""
    target, scheme = FORMATS[name]
    made: dict[str, object] = {"target": target, "rules": [{"match": "*_proj", "scheme": scheme}]}
    if any(word in name for word in NEED_DATA):
        made["calibration"] = {"data": str(data.resolve()), "samples": samples, "length": length}
    return json.dumps(made)  # JSON is YAML


def convert(name: str, model: Path, folder: Path, data: Path, samples: int, length: int) -> Path:
    """Convert `model` to a format, or by a recipe's file; returns the checkpoint's folder."""
    path = Path(name)
    overrides: tuple[str, ...] = ()
    if name in FORMATS:
        path = folder / f"{name}.yaml"
        path.write_text(recipe(name, data, samples, length))
    elif "calibration:" in path.read_text():
        overrides = (f"calibration.data={data.resolve()}",)
    out = folder / path.stem
    commands.quantize(commands.plan(path, model=str(model), out=out, overrides=overrides))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "examples/tiny-qwen3")
    parser.add_argument("--text", type=Path, default=ROOT / "examples/evaluation.txt")
    parser.add_argument("--data", type=Path, default=ROOT / "examples/calibration.txt")
    parser.add_argument("--samples", type=int, default=64, help="of calibration")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--bars", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--log", type=Path, help="where the engine's own words go")
    parser.add_argument("formats", nargs="*", default=SERVED)
    given = parser.parse_args()
    ids = windows(given.model, given.text, given.windows, given.length)
    missed, rows = [], {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = {"float": given.model}
        for name in given.formats:
            checkpoints[name] = convert(
                name, given.model, Path(folder), given.data, given.samples, given.length
            )
        answers = serve(checkpoints, ids, log=given.log)
    base = answers["float"]
    if isinstance(base, Refused):
        raise SystemExit(f"vLLM does not serve the float model: {base.error}")
    print(f"float: perplexity {base.perplexity:.4f}\n")
    print("| format | perplexity over float | same likeliest token | mean change | by stand-ins |")
    print("|---|---|---|---|---|")
    for name, answer in answers.items():
        if name == "float":
            continue
        if isinstance(answer, Refused):
            print(f"| {name} | refused: {' '.join(answer.error.split())[:300]} | | | |")
            rows[name] = {"error": answer.error}
            continue
        far = distance(answer, base)
        numbers = f"{far.ratio:.4f} ± {far.error:.4f} | {far.agreement:.3f} | {far.change:.4f}"
        print(f"| {name} | {numbers} | {', '.join(answer.stand_ins)} |")
        rows[name] = vars(far) | {"kernels": dict(answer.kernels)}
        ratio, agreement, change = BARS.get(name, (9, 0, 9))
        # as many digits as the bars have
        worse = (far.ratio > ratio + 2 * far.error, round(far.agreement, 3) < agreement,
                 round(far.change, 4) > change)  # fmt: skip
        missed += [name] if any(worse) else []
    print(json.dumps({"perplexity": base.perplexity, "formats": rows, "missed": missed}))
    sys.exit(bool(given.bars and missed))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
