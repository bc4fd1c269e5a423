"""How long quantcli takes to start: light commands, the first line of long ones, and a plan.

Whole child processes, medians of rounds in which all commands take turns.

- Wall seconds of `--help`, and of `inspect` of a model of 10,000 tensors; CPU seconds of `--help`, and
  of `inspect` of the example model.
- Seconds to the first byte on stderr for every command that imports torch; it is ended there.
- CPU seconds of a plan without data, of 1,800 tensors, beside those of `import torch`. Twice:
  against a process that ends as Python does, which takes torch apart, and against one that ends at
  once, as quantcli does.
- Wall seconds from SIGINT to the end, for a signal as soon as the first line is there.

Models are headers alone: their data is a hole in the file.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common import (
    QUANTCLI,
    RECIPES,
    ROOT,
    Line,
    finish,
    measure,
    parser,
    quantize_to,
    qwen3,
    qwen3_moe,
    spread,
    workplace,
    write_model,
)

Measurement = Callable[[], float]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=9)
    options = arguments.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled
    with workplace(options.dir) as folder:
        measurements = {**_light(folder), **_first_lines(folder), **_plans(folder)}
        for measurement in measurements.values():
            measurement()
        values: dict[str, list[float]] = {what: [] for what in measurements}
        for _ in range(options.rounds):
            for what, measurement in measurements.items():
                values[what].append(measurement())
    finish([*_lines(values)], as_json=options.json)


_BARS = {"wall": 2.0, "first": 0.5, "CPU": 0.3}
_LIGHT = {"CPU: --help": 0.12, "CPU: inspect of the example model": 0.25}
_PLAN, _TORCH, _BRIEF = "CPU: plan", "CPU: import torch", "CPU: import torch, ended at once"


def _lines(values: dict[str, list[float]]) -> list[Line]:
    lines = []
    for what, seconds in values.items():
        bar = 0.5 if "--help" in what else _BARS.get(what.partition(" ")[0].rstrip(":"))
        bar = _LIGHT.get(what) if what.startswith("CPU") else bar
        lines.append(Line(what, statistics.median(seconds), "s", bar, spread(seconds)))
    for what, other, limit in (("import torch", _TORCH, 0.3), (_BRIEF[5:], _BRIEF, None)):
        pairs = zip(values[_PLAN], values[other], strict=True)
        beside = [plan - torch for plan, torch in pairs]
        lines.append(
            Line(f"CPU: plan beside {what}", statistics.median(beside), "s", limit, spread(beside))
        )
    return lines


def _light(folder: Path) -> dict[str, Measurement]:
    model = folder / "light"
    specs = qwen3_moe(24, 138, hidden=512, width=128)
    write_model(model, specs, shards=8, sparse=True)
    commands: dict[str, tuple[str | Path, ...]] = {
        "wall: --help": ("--help",),
        f"wall: inspect, {len(specs)} tensors": ("inspect", model),
        f"wall: inspect --json, {len(specs)} tensors": ("inspect", model, "--json"),
    }
    used = zip(_LIGHT, (("--help",), ("inspect", ROOT / "examples" / "tiny-qwen3")), strict=True)
    return {
        **{what: _wall(*words) for what, words in commands.items()},
        **{what: _cpu(*words) for what, words in used},
    }


def _wall(*words: str | Path) -> Measurement:
    return lambda: measure(*QUANTCLI, *words).wall


def _cpu(*words: str | Path) -> Measurement:
    return lambda: measure(*QUANTCLI, *words).cpu


def _first_lines(folder: Path) -> dict[str, Measurement]:
    model, quantized, out = folder / "model", folder / "quantized", folder / "out"
    write_model(model, qwen3(2, hidden=256, vocab=1024), shards=1)
    # in a process of its own: this one must stay smaller than what it measures
    child = os.fork()
    if child == 0:
        quantize_to(quantized, RECIPES / "fp8_dynamic.yaml", model)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the model for `verify` and `pack` could not be made")
    commands: dict[str, tuple[str | Path, ...]] = {
        "quantize": ("quantize", "w8a8_dynamic", "--model", model, "--out", out),
        "quantize --json": ("quantize", "w8a8_dynamic", "--model", model, "--out", out, "--json"),
        "calibrate": ("calibrate", "w8a8_static", "--model", model, "--out", out),
        "pack": ("pack", quantized, "--target", "ascend", "--out", out),
        "verify": ("verify", quantized),
        "inspect --outliers": ("inspect", "--outliers", model),
        "inspect --support": ("inspect", "--support"),
    }
    first: dict[str, Measurement] = {
        f"first line: {what}": lambda words=words: _until_line(words)[0]  # type: ignore[misc]
        for what, words in commands.items()
    }
    first["SIGINT to the end, during the import of torch"] = lambda: _until_line(commands["quantize"])[
        1
    ]
    return first


def _until_line(words: tuple[str | Path, ...]) -> tuple[float, float]:
    """Seconds to the first byte on stderr, and from SIGINT then to the end."""
    command = [str(word) for word in (*QUANTCLI, *words)]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        assert child.stderr is not None
        byte = child.stderr.read(1)
        said = time.perf_counter()
        child.send_signal(signal.SIGINT)
        rest = child.stderr.read()
        code = child.wait()
        ended = time.perf_counter()
    if not byte or code != 130:
        raise RuntimeError(f"{command} exited with {code}:\n{rest.decode(errors='replace')}")
    return said - started, ended - said


def _plans(folder: Path) -> dict[str, Measurement]:
    model = folder / "planned"
    specs = qwen3(160, hidden=64, vocab=1024)
    write_model(model, specs, shards=4, sparse=True)
    plan = ("quantize", "w8a8_dynamic", "--model", model, "--out", folder / "out", "--plan")
    return {
        _PLAN: lambda: measure(*QUANTCLI, *plan).cpu,
        _TORCH: lambda: measure(sys.executable, "-c", "import torch").cpu,
        _BRIEF: lambda: measure(sys.executable, "-c", "import os, torch; os._exit(0)").cpu,
    }


if __name__ == "__main__":
    main()
