"""Where the CPU seconds of a conversion go, from the start of its process to its end.

Each part is a difference of medians, or what clocks around system calls say:

* Python alone; `import torch`; the compiler's library, `import llvmlite.binding`, if it is installed.
* the rest of a start: quantcli's own imports, kernels, plan and folder. That is a conversion of a
  nearly empty model, less the parts before. "kernels, within the start" is what QUANTCLI_KERNELS=off
  saves there: torch then does the work of the compiled kernels, and their library is not loaded.
* reading, writing, fsync: a conversion is forked off a process that has all of that behind it, and
  the functions of `os` that read and write are replaced by ones that add up the CPU time of their
  thread and the bytes. If fewer bytes were read than the model's weights have, the conversion reads in
  another way; the benchmark then fails instead of giving wrong figures.
* hashing: what --no-checksum saves in such a fork.
* arithmetic, and the work of Python between row blocks: the rest.

One worker, warm page cache, 1 GB; runs take turns.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from common import (
    QUANTCLI,
    Line,
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

RECIPES = ("w8a8_dynamic", "fp8_dynamic", "vllm_w4a16")
COMPILER = "llvmlite"
OFF = {"QUANTCLI_KERNELS": "off"}
CALLS = {
    "reading": ("read", "pread", "preadv", "readv", "posix_fadvise"),
    "writing": ("write", "pwrite", "pwritev", "writev", "copy_file_range", "sendfile", "splice"),
    "fsync": ("fsync", "fdatasync"),
}


class Clocks:
    """Within it, functions of `os` add up the CPU seconds of their thread and the bytes they return.

    At its end both are written to `path`, by kind. The functions stay replaced: it is for a process
    that ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = dict.fromkeys(CALLS, 0.0)
        self.nbytes = dict.fromkeys(CALLS, 0)
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        for kind, names in CALLS.items():
            for name in names:
                if hasattr(os, name):
                    setattr(os, name, self._clocked(kind, getattr(os, name)))
        return self

    def __exit__(self, *_: object) -> None:
        totals = {"seconds": self.seconds, "nbytes": self.nbytes}
        self.path.write_text(json.dumps(totals))

    def _clocked(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*arguments: Any, **options: Any) -> Any:
            started = time.thread_time()
            result = function(*arguments, **options)
            used = time.thread_time() - started
            with self._lock:
                self.seconds[kind] += used
                self.nbytes[kind] += len(result) if isinstance(result, bytes) else result or 0
            return result

        return clocked


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--layers", type=int, default=9, help="101 MB each [default: 9]")
    options = arguments.parse_args()
    python: dict[str, tuple[str, ...]] = {"python": ("pass",), "torch": ("import torch",)}
    if importlib.util.find_spec(COMPILER):
        python["compiler"] = (f"import torch; import {COMPILER}.binding",)
    used: dict[str, list[float]] = {}

    def note(what: str, seconds: float) -> None:
        used.setdefault(what, []).append(seconds)

    with workplace(options.dir) as folder:
        model, empty, out = folder / "model", folder / "empty", folder / "out"
        log, totals = folder / "log", folder / "totals.json"
        nbytes = write_model(model, qwen3(options.layers))
        write_model(empty, qwen3(1, hidden=128, vocab=16))

        def forked(recipe: str, source: Path, *words: str) -> float:
            words = (*conversion(recipe, source, out, "--workers", "1"), *words)
            totals.unlink(missing_ok=True)
            code, usage = reap(fork(words, log, Clocks(totals)))
            if code:
                raise SystemExit(f"conversion exits with {code}:\n{log.read_text()}")
            shutil.rmtree(out)
            return usage.cpu

        for recipe in RECIPES:  # all is imported, compiled and loaded here, and cached where it is
            warm_up(conversion(recipe, empty, out))
            shutil.rmtree(out)
        for _ in range(options.rounds):
            for name, (code,) in python.items():
                note(name, measure(sys.executable, "-c", code).cpu)
            for recipe in RECIPES:
                for name, source in (("empty", empty), ("whole", model)):
                    command = (*QUANTCLI, *conversion(recipe, source, out, "--workers", "1"))
                    for suffix, env in (("", {}), (", torch", OFF)):
                        if source is model and env:
                            continue
                        note(f"{recipe} {name}{suffix}", measure(*command, env=env).cpu)
                        shutil.rmtree(out)
                note(f"{recipe} no hashing", forked(recipe, model, "--no-checksum"))
                note(f"{recipe} forked empty", forked(recipe, empty))
                note(f"{recipe} forked", forked(recipe, model))
                found = json.loads(totals.read_text())
                if found["nbytes"]["reading"] < nbytes:
                    raise SystemExit(f"{found['nbytes']} through `os`, but weights are {nbytes} bytes")
                for kind, seconds in found["seconds"].items():
                    note(f"{recipe} {kind}", seconds)
    finish(
        [line for recipe in RECIPES for line in results(recipe, used, nbytes / 1e9)],
        as_json=options.json,
    )


def results(recipe: str, used: dict[str, list[float]], size: float) -> list[Line]:
    """The parts of one recipe, and their sum next to what whole processes took."""
    median = {name: statistics.median(values) for name, values in used.items()}
    torch = median["torch"] - median["python"]
    compiler = median["compiler"] - median["torch"] if "compiler" in median else 0.0
    empty = median[f"{recipe} empty"]
    work = median[f"{recipe} forked"] - median[f"{recipe} forked empty"]
    hashing = median[f"{recipe} forked"] - median[f"{recipe} no hashing"]
    calls = {kind: median[f"{recipe} {kind}"] for kind in CALLS}
    parts = {
        "Python": median["python"],
        "import of torch": torch,
        "import of the compiler's library": compiler,
        "rest of the start": empty - median["python"] - torch - compiler,
        **calls,
        "hashing": hashing,
        "arithmetic and the rest": work - hashing - sum(calls.values()),
    }
    whole = median[f"{recipe} whole"]
    lines = [
        Line(f"{recipe}, {name}", seconds, "CPU s", None, f"{seconds / whole:.0%}")
        for name, seconds in parts.items()
    ]
    kernels = empty - median[f"{recipe} empty, torch"]
    off = f"{recipe} empty, torch"
    detail = f"{spread(used[f'{recipe} empty'])} less {spread(used[off])} with QUANTCLI_KERNELS=off"
    lines.append(Line(f"{recipe}, kernels, within the start", kernels, "CPU s", None, detail))
    detail = f"{spread(used[f'{recipe} whole'])}, {size:.2f} GB; parts add up to "
    detail += f"{sum(parts.values()):.2f}"
    lines.append(Line(f"{recipe}, whole process", whole, "CPU s", None, detail))
    return lines


if __name__ == "__main__":
    main()
