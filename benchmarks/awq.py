"""What the method `awq` gains: W4A16 rounded to nearest and by GPTQ, and int8 next to smoothing.

    python benchmarks/awq.py [--model DIR] [--data FILE] [--text FILE...] [--group 128] [--inject]
        [--samples 64] [--windows 40] [--only NAME...]

Calibrated on --data, judged on each --text: perplexity over the float model's, and the mean absolute
change of the log-probability of the text's tokens, by the engine's arithmetic. The CPU seconds are
those of the whole conversion. --inject: with outlier channels, as in `perplexity.py`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from common import ROOT, Line, finish, parser, workplace
from gptq import compared, predictions, windows
from perplexity import inject
from quantcli.commands import quantize as commands

INT8: dict[str, object] = {"name": "w8a8_dynamic"}
AWQ, SMOOTH = [{"name": "awq"}], [{"name": "smooth"}]


def conversions(group: int) -> dict[str, tuple[dict[str, object], list[dict[str, str]]]]:
    """By name: the scheme, and the methods."""
    int4 = {"name": "w4a16", "group_size": group, "clip": "inputs"}
    by_data = int4 | {"weight_rounding": "gptq"}
    return {
        "int4": (int4, []), "int4 awq": (int4, AWQ),
        "int4 gptq": (by_data, []), "int4 awq gptq": (by_data, AWQ),
        "int8": (INT8, []), "int8 smooth": (INT8, SMOOTH), "int8 awq": (INT8, AWQ),
    }  # fmt: skip


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", type=Path, default=ROOT / "examples/tiny-qwen3")
    arguments.add_argument("--data", type=Path, default=ROOT / "examples/calibration.txt")
    arguments.add_argument("--text", type=Path, nargs="+", default=[ROOT / "examples/evaluation.txt"])
    arguments.add_argument("--group", type=int, default=128)
    arguments.add_argument("--samples", type=int, default=64, help="of --data, of 256 tokens")
    arguments.add_argument("--windows", type=int, default=40, help="of each text, of 256 tokens")
    arguments.add_argument("--inject", action="store_true", help="outlier channels first")
    arguments.add_argument("--only", nargs="+", metavar="NAME", help="these conversions")
    given = arguments.parse_args()
    known = conversions(given.group)
    calibration = {
        "data": str(given.data.resolve()), "samples": given.samples, "length": 256, "dtype": "float32",
    }  # fmt: skip
    lines: list[Line] = []
    with workplace(given.dir) as folder:
        model = inject(given.model, folder / "model") if given.inject else given.model
        texts = {file.stem: windows(model, file, given.windows, 256) for file in given.text}
        base = {name: predictions(model, batches) for name, batches in texts.items()}
        for name in given.only or known:
            scheme, methods = known[name]
            recipe, out = folder / f"{name}.json", folder / name
            made = {
                "target": "compressed-tensors", "calibration": calibration,
                "rules": [{"match": "*_proj", "scheme": scheme}],
            }  # fmt: skip
            recipe.write_text(json.dumps(made | ({"methods": methods} if methods else {})))
            started = time.process_time()
            commands.quantize(commands.plan(recipe, model=str(model), out=out))
            lines.append(Line(f"{name}: conversion", time.process_time() - started, "CPU s"))
            for text, batches in texts.items():
                for what, value in compared(predictions(out, batches), base[text]).items():
                    lines.append(Line(f"{name}, {text}: {what}", value, "", None, f"{value:.5f}"))
    finish(lines, as_json=given.json)


if __name__ == "__main__":
    main()
