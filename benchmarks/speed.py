"""CPU time of a conversion against `cp -r` of the same model.

Measures user + system seconds of child processes, which other load on the machine hardly changes.
The candidates take turns, round after round, and medians count. What a run costs before it has any
work (imports, recipe, plan) is measured as the conversion of a nearly empty model and subtracted.
Source and outputs are on one file system; the source is in the page cache. GB are of bf16 input.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable

from common import (
    Line,
    Usage,
    finish,
    measure,
    parser,
    quantize,
    qwen3,
    spread,
    workplace,
    write_model,
)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--layers", type=int, default=9, help="101 MB each [default: 9]")
    options = arguments.parse_args()
    with workplace(options.dir) as folder:
        model, empty, out = folder / "model", folder / "empty", folder / "out"
        nbytes = write_model(model, qwen3(options.layers))
        write_model(empty, qwen3(1, hidden=16, vocab=16))

        def copy() -> Usage:
            used = measure("cp", "-r", model, out)
            shutil.rmtree(out)
            return used

        candidates: dict[str, Callable[[], Usage]] = {
            "cp": copy,
            "w8a8_dynamic": lambda: quantize("w8a8_dynamic", model, out, "--no-checksum"),
            "fp8_dynamic": lambda: quantize("fp8_dynamic", model, out, "--no-checksum"),
            "start": lambda: quantize("w8a8_dynamic", empty, out, "--no-checksum"),
            "w8a8_dynamic, checksum": lambda: quantize("w8a8_dynamic", model, out),
        }
        used: dict[str, list[Usage]] = {name: [] for name in candidates}
        candidates["start"]()  # writes the bytecode, if nobody has yet
        for _ in range(options.rounds):
            for name, run in candidates.items():
                used[name].append(run())
    start_cpu = statistics.median(u.cpu for u in used["start"])
    start_user = statistics.median(u.user for u in used["start"])
    start_system = statistics.median(u.system for u in used["start"])
    cp = statistics.median(u.cpu for u in used["cp"])
    lines = []
    for name, bar in {
        "w8a8_dynamic": 2.0,
        "fp8_dynamic": 3.0,
        "w8a8_dynamic, checksum": None,
    }.items():
        seconds = [u.cpu - start_cpu for u in used[name]]
        median = statistics.median(seconds)
        user = statistics.median(u.user for u in used[name]) - start_user
        system = statistics.median(u.system for u in used[name]) - start_system
        detail = (
            f"{spread(seconds)} CPU s: user {user:.2f}, system {system:.2f}; "
            f"{nbytes / 1e9 / median:.2f} GB/CPU-s"
        )
        lines.append(Line(f"{name} / cp", median / cp, "", bar, detail))
    detail = f"{nbytes / 1e9:.3f} GB, {nbytes / 1e9 / cp:.2f} GB/CPU-s"
    lines.append(
        Line("cp -r", cp, "CPU s", None, f"{detail}, {spread([u.cpu for u in used['cp']])}")
    )
    detail = f"subtracted; {spread([u.cpu for u in used['start']])}"
    lines.append(Line("start of a run", start_cpu, "CPU s", None, detail))
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
