"""CPU time of a conversion against `cp -r` of the same model, and per GB with default options.

Measures user + system seconds of processes, which other load on the machine changes little. The
candidates take turns in a shuffled order, round after round, and medians count. GB are of bf16 input.

A conversion is forked off a process that has converted a nearly empty model with each recipe, so that
all imports, and the loading of compiled kernels, are behind it. What a conversion costs before there
is any work (recipe, plan, folder) is that of the nearly empty model. Both are left out here;
`as_run.py` has them in. Source and outputs are on one file system, the source in the page cache.
Virtual machines hand free memory back to their host, and to get it again costs several times more than
to write it; so each candidate runs twice in a row and the second run, which finds the memory of the
first, counts.
"""

from __future__ import annotations

import random
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

from common import (
    Line,
    Usage,
    conversion,
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

# recipe -> the most CPU time over that of cp, hashing off; the most CPU seconds per GB, hashing on
BARS: dict[str, tuple[float | None, float | None]] = {
    "w8a8_dynamic": (1.3, 0.8),
    "fp8_dynamic": (1.3, 0.8),
    "vllm_w4a16": (None, None),
    "vllm_nvfp4a16": (4.0, None),
    "vllm_mxfp4a16": (None, None),
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--layers", type=int, default=9, help="101 MB each [default: 9]")
    options = arguments.parse_args()
    with workplace(options.dir) as folder:
        model, empty, out = folder / "model", folder / "empty", folder / "out"
        nbytes = write_model(model, qwen3(options.layers))
        write_model(empty, qwen3(1, hidden=128, vocab=16))
        for recipe in BARS:
            warm_up(conversion(recipe, empty, out))
            shutil.rmtree(out)

        def convert(recipe: str, source: Path, *words: str) -> Usage:
            log = folder / "log"
            code, used = reap(fork(conversion(recipe, source, out, *words), log))
            if code:
                raise SystemExit(f"conversion exits with {code}:\n{log.read_text()}")
            return used

        candidates: dict[str, Callable[[], Usage]] = {"cp": lambda: measure("cp", "-r", model, out)}
        for recipe in BARS:
            candidates |= {
                recipe: lambda recipe=recipe: convert(recipe, model, "--no-checksum"),
                f"{recipe}, hashing": lambda recipe=recipe: convert(recipe, model),
                f"{recipe}, start": lambda recipe=recipe: convert(recipe, empty),
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


def results(used: dict[str, list[Usage]], size: float) -> list[Line]:
    """Medians without the start of a run: over those of cp, and per GB."""
    cp = statistics.median(u.cpu for u in used["cp"])
    best = min(u.cpu for u in used["cp"])
    lines = []
    for recipe, (over_cp, per_gb) in BARS.items():
        seconds, detail = work(used[recipe], used[f"{recipe}, start"], size)
        median = statistics.median(seconds)
        detail += f"; best over best {min(seconds) / best:.2f}"
        lines.append(Line(f"{recipe}, no hashing / cp", median / cp, "", over_cp, detail))
        seconds, detail = work(used[f"{recipe}, hashing"], used[f"{recipe}, start"], size)
        median = statistics.median(seconds)
        lines.append(Line(f"{recipe}, default options", median / size, "CPU s/GB", per_gb, detail))
    detail = f"{spread([u.cpu for u in used['cp']])}; {size / cp:.2f} GB/CPU-s of {size:.3f} GB"
    lines.append(Line("cp -r", cp, "CPU s", None, detail))
    for recipe in BARS:
        start = [u.cpu for u in used[f"{recipe}, start"]]
        what, detail = f"{recipe}, start of a run", f"{spread(start)}; subtracted"
        lines.append(Line(what, statistics.median(start), "CPU s", None, detail))
    return lines


def work(runs: list[Usage], starts: list[Usage], size: float) -> tuple[list[float], str]:
    """The CPU seconds of each run without the median start, and what to say about them."""
    start = statistics.median(u.cpu for u in starts)
    seconds = [u.cpu - start for u in runs]
    user, system = (
        statistics.median(getattr(u, part) for u in runs)
        - statistics.median(getattr(u, part) for u in starts)
        for part in ("user", "system")
    )
    speed = size / statistics.median(seconds)
    return seconds, (
        f"{spread(seconds)} CPU s, user {user:.2f}, system {system:.2f}; {speed:.2f} GB/CPU-s"
    )


if __name__ == "__main__":
    main()
