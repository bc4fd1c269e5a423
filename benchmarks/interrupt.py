"""Seconds from Ctrl-C to the end of the process, in each phase of each command, and the message.

    python benchmarks/interrupt.py [--only WORD] [--delay SECONDS] [--layers N] [--hidden N]

Each line is one run of the command line in a process of its own. A function of quantcli tells when the
phase begins; the signal comes --delay seconds later, in the middle of the phase's work. The model has
random weights; its size is that of --layers and --hidden, 1 GB if neither is given.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calibration import make_model
from common import RECIPES, ROOT, Line, finish, parser, qwen3_moe, workplace, write_model

SLOWEST = 1.0
MARK = "PHASE BEGINS"
# runs the command line; the function that is named first tells of its first call (or of a later one)
CHILD = f"""
import functools, importlib, sys
module, name, nth = sys.argv[1], sys.argv[2].split("."), int(sys.argv[3])
calls = 0
def told(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == nth:
            print({MARK!r}, file=sys.stderr, flush=True)
        return function(*args, **kwargs)
    return call
owner = importlib.import_module(module)
for part in name[:-1]:
    owner = getattr(owner, part)
setattr(owner, name[-1], told(getattr(owner, name[-1])))
sys.argv[1:] = sys.argv[4:]
from quantcli.__main__ import entry
entry()
"""


@dataclass(frozen=True)
class Phase:
    """A phase of a command. begins: MODULE:FUNCTION whose call begins it, the `nth` one.

    leaves: whether the next phase continues with what is kept.
    """

    name: str
    begins: str
    words: Sequence[str | Path]
    nth: int = 1
    environment: tuple[tuple[str, str], ...] = ()
    leaves: bool = False


def interrupted(phase: Phase, delay: float) -> tuple[float, int, str]:
    """Seconds from the signal to the end, the exit code, and the message."""
    module, _, function = phase.begins.partition(":")
    words = [sys.executable, "-c", CHILD, module, function, str(phase.nth), *map(str, phase.words)]
    environment = os.environ | dict(phase.environment)
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stderr is not None
        before = []
        for line in child.stderr:
            before.append(line)
            if line.startswith(MARK):
                break
        else:
            return 0.0, child.wait(), f"the phase did not begin: {' '.join(before[-3:])}"
        time.sleep(delay)
        sent = time.perf_counter()
        child.send_signal(signal.SIGINT)
        rest = child.stderr.read()
        code = child.wait()
        seconds = time.perf_counter() - sent
    message = next((line for line in rest.splitlines() if line.startswith("error: ")), rest)
    return seconds, code, message.removeprefix("error: ")


def phases(folder: Path, model: Path, many: Path) -> list[Phase]:
    """Every phase that takes long. Prepares what the commands read."""
    text = ("--set", f"calibration.data={ROOT / 'examples' / 'calibration.txt'}")
    sizes = ("--set", "calibration.samples=16", "--set", "calibration.length=256")

    def calibrate(recipe: str) -> list[str | Path]:
        out = folder / "calibration"
        return ["calibrate", RECIPES / f"{recipe}.yaml", "--model", model, "--out", out, *text, *sizes]

    out = folder / "out"
    convert = ["quantize", "w8a8_dynamic", "--model", model, "--out", out]
    convert += ["--set", "max_shard=200MB"]
    parts = [folder / f"half.part-{n}-of-2" for n in (1, 2)]
    learn, round_ = calibrate("w4a4_flatquant"), calibrate("w4a16_gptq")
    verify = ["verify", folder / "whole"]
    base, replay = "quantcli.calibration.", "quantcli.calibration.replay.replay:Replay."
    learning = base + "methods.learning:Course."
    cold = (("QUANTCLI_CACHE", str(folder / "cold")),)
    data = ["--data", ROOT / "examples" / "evaluation.txt", "--samples", "8", "--length", "256"]
    run = [*verify, "--run", "--against", model, *data]
    return [
        Phase("import of torch", "quantcli.recipe.written:read_recipe", convert),
        Phase("headers of many tensors", "quantcli.checkpoint.checkpoint:scan_checkpoint",
              ["inspect", many]),
        Phase("planning", "quantcli.planning.planner:make_plan",
              ["quantize", "w8a8_moe_dynamic", "--model", many, "--out", out, "--plan"]),
        Phase("compiling kernels", "quantcli.core.kernels.machine:_Kernels._compiled", convert,
              environment=cold),
        Phase("calibrate: building the model", base + "replay.library:build_model", learn),
        Phase("calibrate: reading text", base + "text.documents:read_documents", learn),
        Phase("calibrate: embedding", replay + "_note_calls", learn),
        Phase("calibrate: loading a layer", base + "layer:LayerRun.measure", learn),
        Phase("calibrate: float pass", learning + "loss", learn),
        Phase("calibrate: learning", learning + "_step", learn, nth=3),
        Phase("calibrate: the third layer", base + "layer:LayerRun.measure", calibrate("w8a8_static"),
              nth=3),
        Phase("calibrate: inputs for GPTQ", base + "methods.hessians:add", round_),
        Phase("calibrate: Cholesky", "quantcli.schemes.arithmetic.gptq:Feedback.of", round_),
        Phase("calibrate: rounding", base + "methods.rounding:RoundingPass._round", round_),
        Phase("quantize: converting", "quantcli.convert.shards:ShardRun.work", convert, nth=8),
        Phase("quantize: fsync of a shard", "quantcli.core.extents:os.fsync", convert, nth=2,
              leaves=True),
        Phase("quantize: hashes of kept shards", "quantcli.convert.shards:ShardRun._reuse", convert),
        Phase("pack", "quantcli.convert.shards:ShardRun.work",
              ["pack", folder / "whole", "--target", "compressed-tensors", "--out", out], nth=8),
        Phase("pack --merge", "quantcli.convert.merge:_Gather.gather",
              ["pack", "--merge", *parts, "--out", out]),
        Phase("verify --full", "quantcli.verification.full:verify_full", [*verify, "--full"]),
        Phase("verify --against", "quantcli.verification.against:verify_against",
              [*verify, "--against", model]),
        Phase("verify --run", base + "replay.served:Forward.layer", run),
        Phase("inspect --outliers", "quantcli.planning.outliers:inspect_outliers",
              ["inspect", model, "--outliers"]),
    ]  # fmt: skip


def prepare(folder: Path, model: Path) -> None:
    """A whole conversion, and its two parts."""
    words = [sys.executable, "-m", "quantcli", "quantize", "w8a8_dynamic", "--model", model]
    words += ["--set", "max_shard=200MB", "--quiet", "--out"]
    for options in ([folder / "whole"], *([folder / "half", "--part", f"{n}/2"] for n in (1, 2))):
        subprocess.run([*words, *options], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", default="", help="phases whose names have this word")
    arguments.add_argument("--delay", type=float, default=0.1)
    arguments.add_argument("--layers", type=int, default=10)
    arguments.add_argument("--hidden", type=int, default=2048)
    options = arguments.parse_args()
    lines = []
    with workplace(options.dir) as folder:
        model, many = folder / "model", folder / "many"
        make_model(model, options.layers, options.hidden)
        write_model(many, qwen3_moe(48, 256, hidden=64, width=32), sparse=True)
        nbytes = sum(path.stat().st_size for path in model.iterdir())
        chosen = [phase for phase in phases(folder, model, many) if options.only in phase.name]
        prepare(folder, model)
        for phase in chosen:
            seconds, code, message = interrupted(phase, options.delay)
            detail = message if code == 130 else f"exit code {code}: {message}"
            value = seconds if code == 130 else float("nan")
            lines.append(Line(phase.name, value, "s", SLOWEST, detail.replace(str(folder), "")))
            if not phase.leaves:
                for left in folder.glob("out*"):
                    shutil.rmtree(left)
            shutil.rmtree(folder / "calibration", ignore_errors=True)
    lines.append(Line("size of the model", nbytes / 1e9, "GB"))
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
