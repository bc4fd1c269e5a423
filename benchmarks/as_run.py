"""Conversions as a user runs them: whole processes, from their start to their end.

Three tables, by recipe, in one list:

* source in the page cache: CPU and wall seconds of 1 GB with 1, 2 and 4 workers and hashing (the
  default), and with as many workers as by default without hashing; of the other sizes by default.
* each size, default options, with only the model out of the page cache: the tool's own files were just
  used. The first size also with all out of it. To empty the page cache takes root; without it these
  rows are left out, and the first line says so.
* how near that is to the disk, with only the model out of the page cache: what `dd` takes to read the
  source's shards to /dev/null and then to write as many bytes as the output's shards have, from memory
  and with conv=fsync, over the conversion's wall time. 1 is the disk itself; more is possible, since a
  conversion reads and writes at once. The bar is on the largest size. For information, the same with
  one dd that reads and one that writes at the same time. Whether dd or the conversion is first changes
  from round to round: a virtual disk slows down when it has had much to write. The host of a virtual
  machine may keep what was read last, so the model is read before each run that finds the page cache
  empty, dd's too; and it may limit what is read and written in a time, so each rests for 5 s before.

A conversion waits for the disk like dd does: shards are fsynced before they are renamed. All runs take
turns in a shuffled order, round after round, once the disk has written what waits; medians count.
GB are of bf16 input.
"""

from __future__ import annotations

import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common import (
    QUANTCLI,
    Line,
    Usage,
    conversion,
    drop_caches,
    finish,
    measure,
    parser,
    quantize,
    qwen3,
    spread,
    workplace,
    write_model,
)

RECIPES = ("w8a8_dynamic", "fp8_dynamic", "vllm_w4a16")
NEAR_THE_DISK = 0.9  # share of dd's speed, at least; int4 searches for scales, and has no bar
BARRED = {"w8a8_dynamic", "fp8_dynamic"}
MEMORY = Path("/dev/shm")
REST = 5  # seconds before whatever finds the page cache empty
WARM, COLD, ALL_COLD = "warm", "model cold", "all cold"


@dataclass(frozen=True)
class Case:
    """One way to run a recipe on the model of so many layers."""

    recipe: str
    layers: int
    cache: str = WARM
    workers: int | None = None
    hashing: bool = True

    @property
    def words(self) -> tuple[str, ...]:
        """Its options."""
        workers = () if self.workers is None else ("--workers", str(self.workers))
        return workers + (() if self.hashing else ("--no-checksum",))

    @property
    def name(self) -> str:
        """How it differs from the others of its recipe and size."""
        workers = "default workers" if self.workers is None else f"{self.workers} workers"
        return f"{self.cache}, {workers}{'' if self.hashing else ', no hashing'}"


def cases(recipes: list[str], layers: list[int], *, cold: bool) -> list[Case]:
    """All that is run, in the order of the output."""
    found = []
    for recipe in recipes:
        found += [Case(recipe, layers[0], workers=workers) for workers in (1, 2, 4)]
        found.append(Case(recipe, layers[0], hashing=False))
        found += [Case(recipe, count) for count in layers[1:]]
        if cold:
            found.append(Case(recipe, layers[0], ALL_COLD))
            found += [Case(recipe, count, COLD) for count in layers]
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--layers", type=int, nargs="+", default=[9, 39], help="101 MB each")
    arguments.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES, metavar="RECIPE")
    options = arguments.parse_args()
    cold = drop_caches()
    chosen = cases(options.recipes, options.layers, cold=cold)
    used: dict[Case, list[Usage]] = {case: [] for case in chosen}
    disk: dict[Case, list[tuple[float, float]]] = {case: [] for case in used if case.cache == COLD}
    with workplace(options.dir) as folder:
        empty, out = folder / "empty", folder / "out"
        write_model(empty, qwen3(1, hidden=128, vocab=16))
        sizes = {n: write_model(folder / f"model{n}", qwen3(n)) / 1e9 for n in options.layers}

        shards: dict[Case, list[int]] = {}

        def convert(case: Case) -> Usage:
            model = folder / f"model{case.layers}"
            warm(model)
            prepare(case, lambda: quantize(case.recipe, empty, out))
            usage = measure(*QUANTCLI, *conversion(case.recipe, model, out, *case.words))
            shards[case] = [shard.stat().st_size for shard in sorted(out.glob("*.safetensors"))]
            shutil.rmtree(out)
            return usage

        for recipe in options.recipes:  # what is compiled once is compiled
            quantize(recipe, empty, out)
        order = random.Random(0)  # a fixed order can fall into step with what the host does
        for number in range(options.rounds):
            for case in order.sample(list(used), len(used)):
                model = folder / f"model{case.layers}"
                if case in disk and number % 2:
                    disk[case].append(dd(model, shards[case], folder, swap=number % 2 > 0))
                used[case].append(convert(case))
                if case in disk and not number % 2:
                    disk[case].append(dd(model, shards[case], folder, swap=number % 2 > 0))
    lines = [] if cold else [Line("cold runs", 0, "runs", None, "left out: drop_caches needs root")]
    lines += [results(case, used[case], sizes[case.layers]) for case in used]
    largest = max(options.layers)
    lines += [
        line
        for case in disk
        for line in share(
            case, used[case], disk[case], sizes[case.layers], barred=case.layers == largest
        )
    ]
    finish(lines, as_json=options.json)


def prepare(case: Case, use: Callable[[], Usage]) -> None:
    """What is written is on the disk; caches are as the case has them."""
    if case.cache == WARM:
        subprocess.run(["sync"], check=True)
        return
    if not drop_caches():
        raise SystemExit("the page cache could be emptied before, and now cannot")
    if case.cache == COLD:
        use()
    time.sleep(REST)


def warm(model: Path) -> None:
    """Read a model's shards into the page cache."""
    for shard in model.glob("*.safetensors"):
        measure("dd", f"if={shard}", "of=/dev/null", "bs=16M")


def dd(model: Path, shards: list[int], folder: Path, *, swap: bool) -> tuple[float, float]:
    """Wall seconds in which dd reads a model that is not in the page cache and writes shards of so many
    bytes to the same disk: one, then the other; and both at the same time, which `swap` does first."""
    source, copy = MEMORY / "quantcli-bench-source", folder / "copy"

    def read() -> float:
        return sum(
            measure("dd", f"if={shard}", "of=/dev/null", "bs=16M").wall
            for shard in sorted(model.glob("*.safetensors"))
        )

    def write() -> float:
        seconds = 0.0
        for nbytes in shards:
            limit = (f"count={nbytes}", "iflag=count_bytes")
            seconds += measure("dd", f"if={source}", f"of={copy}", "bs=16M", "conv=fsync", *limit).wall
            copy.unlink()
        return seconds

    def in_turn() -> float:
        return read() + write()

    def at_once() -> float:
        with ThreadPoolExecutor(2) as pool:
            started = time.perf_counter()
            for work in [pool.submit(read), pool.submit(write)]:
                work.result()
            return time.perf_counter() - started

    try:
        limit = (f"count={max(shards)}", "iflag=count_bytes,fullblock")
        measure("dd", "if=/dev/urandom", f"of={source}", "bs=16M", *limit)
        seconds = {}
        for work in (at_once, in_turn) if swap else (in_turn, at_once):
            warm(model)
            drop_caches()
            time.sleep(REST)
            seconds[work] = work()
        return seconds[in_turn], seconds[at_once]
    finally:
        source.unlink(missing_ok=True)


def results(case: Case, runs: list[Usage], size: float) -> Line:
    """CPU and wall seconds of one case."""
    wall, cpu = ([getattr(u, part) for u in runs] for part in ("wall", "cpu"))
    seconds = statistics.median(wall)
    detail = (
        f"{spread(wall)} s wall, {size / seconds:.2f} GB/s; {spread(cpu)} CPU s; "
        f"peak {max(u.peak for u in runs) / 2**20:.0f} MiB"
    )
    what = f"{case.recipe}, {size:.1f} GB, {case.name}"
    return Line(what, statistics.median(cpu), "CPU s", None, detail)


def share(
    case: Case, runs: list[Usage], disk: list[tuple[float, float]], size: float, *, barred: bool
) -> list[Line]:
    """What dd takes over what the conversion takes, round by round."""
    lines = []
    for number, how in enumerate(("reads, then writes", "reads and writes at once")):
        seconds = [both[number] for both in disk]
        shares = [one / u.wall for one, u in zip(seconds, runs, strict=True)]
        detail = (
            f"{spread(shares)}; dd {spread(seconds)} s, conversion {spread([u.wall for u in runs])} s"
        )
        floor = NEAR_THE_DISK if barred and case.recipe in BARRED and not number else None
        what = f"dd that {how} / {case.recipe}, {size:.1f} GB, {case.cache}"
        lines.append(Line(what, statistics.median(shares), "", None, detail, floor))
    return lines


if __name__ == "__main__":
    main()
