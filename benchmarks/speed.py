"""CPU time of a conversion against `cp -r` of the same model.

Measures user + system seconds of processes, which other load on the machine changes little. The
candidates take turns in a shuffled order, round after round, and medians count. GB are of bf16 input.

A conversion is forked off a process that has imported everything, and what it costs before there is
any work (recipe, plan, folder) is that of a nearly empty model; both are left out. Source and
outputs are on one file system, the source in the page cache. Virtual machines hand free memory back
to their host, and to get it again costs several times more than to write it; so each candidate runs
twice in a row and the second run, which finds the memory of the first, counts.
"""

from __future__ import annotations

import random
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

from common import (
    RECIPES,
    Line,
    Usage,
    finish,
    fork,
    measure,
    parser,
    qwen3,
    reap,
    spread,
    warm_up,
    workplace,
    write_model,
)

BARS = {"w8a8_dynamic": 2.0, "fp8_dynamic": 3.0, "w8a8_dynamic, checksum": None}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--layers", type=int, default=9, help="101 MB each [default: 9]")
    options = arguments.parse_args()
    with workplace(options.dir) as folder:
        model, empty, out = folder / "model", folder / "empty", folder / "out"
        nbytes = write_model(model, qwen3(options.layers))
        write_model(empty, qwen3(1, hidden=16, vocab=16))
        warm_up([*command("w8a8_dynamic", empty, out), "--plan"])

        def convert(recipe: str, source: Path, *words: str) -> Usage:
            log = folder / "log"
            code, used = reap(fork([*command(recipe, source, out), *words], log))
            if code:
                raise SystemExit(f"conversion exits with {code}:\n{log.read_text()}")
            return used

        candidates: dict[str, Callable[[], Usage]] = {
            "cp": lambda: measure("cp", "-r", model, out),
            "w8a8_dynamic": lambda: convert("w8a8_dynamic", model, "--no-checksum"),
            "fp8_dynamic": lambda: convert("fp8_dynamic", model, "--no-checksum"),
            "w8a8_dynamic, checksum": lambda: convert("w8a8_dynamic", model),
            "start": lambda: convert("w8a8_dynamic", empty, "--no-checksum"),
        }
        used: dict[str, list[Usage]] = {name: [] for name in candidates}
        order = random.Random(0)  # a fixed order can fall into step with what the host does
        for _ in range(options.rounds):
            for name in order.sample(list(candidates), len(candidates)):
                run = candidates[name]
                run()
                shutil.rmtree(out)
                used[name].append(run())
                shutil.rmtree(out)
    finish(results(used, nbytes / 1e9), as_json=options.json)


def command(recipe: str, model: Path, out: Path) -> list[str]:
    """A conversion with a recipe of this repository."""
    words = ["quantize", RECIPES / f"{recipe}.yaml", "--model", model, "--out", out, "--quiet"]
    return [str(word) for word in words]


def results(used: dict[str, list[Usage]], size: float) -> list[Line]:
    """Medians without the start of a run, over those of cp."""
    start = statistics.median(u.cpu for u in used["start"])
    cp = statistics.median(u.cpu for u in used["cp"])
    lines = []
    for name, bar in BARS.items():
        seconds = [u.cpu - start for u in used[name]]
        median = statistics.median(seconds)
        user, system = (
            statistics.median(getattr(u, part) for u in used[name])
            - statistics.median(getattr(u, part) for u in used["start"])
            for part in ("user", "system")
        )
        detail = f"{spread(seconds)} CPU s, user {user:.2f}, system {system:.2f}"
        best = min(seconds) / min(u.cpu for u in used["cp"])
        detail += f"; {size / median:.2f} GB/CPU-s; best over best {best:.2f}"
        lines.append(Line(f"{name} / cp", median / cp, "", bar, detail))
    detail = f"{spread([u.cpu for u in used['cp']])}; {size / cp:.2f} GB/CPU-s of {size:.3f} GB"
    lines.append(Line("cp -r", cp, "CPU s", None, detail))
    detail = f"{spread([u.cpu for u in used['start']])}; subtracted"
    lines.append(Line("start of a run", start, "CPU s", None, detail))
    return lines


if __name__ == "__main__":
    main()
