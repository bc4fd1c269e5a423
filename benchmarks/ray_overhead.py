"""The same conversion by threads, by one node of Ray and by three: CPU seconds and bytes.

All nodes are on this machine, so the wall time says nothing. What counts is the CPU time of all
processes, the driver's and Ray's own among them. The start of processes is left out: all of them have
begun, and have done a small conversion. Three tasks run at a time each way, on one node or on three, or
three threads: tasks that run together slow each other down, on any number of nodes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import Line, finish, hashes, parser, qwen3, workplace, write_model

OVERHEAD = 0.05
RECIPE = "w8a8_dynamic"
_AT_ONCE = 3
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> float:
    """CPU seconds of this process and of all below it, those that have ended among them."""
    parents, seconds = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            parents[int(entry.name)] = int(words[1])
            seconds[int(entry.name)] = sum(map(int, words[11:15])) / _TICKS
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(seconds[pid] for pid in ours)


@contextmanager
def raylets(count: int) -> Iterator[str]:
    """A cluster of some nodes with three CPUs in all. Its address as an executor."""
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": _AT_ONCE // count, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        for _ in range(count - 1):
            cluster.add_node(**node)
        yield f"ray:{cluster.address}"
    finally:
        cluster.shutdown()


def convert(model: Path, out: Path, executor: str, max_shard: str = "300MB") -> float:
    """CPU seconds of a conversion."""
    import quantcli

    before = cpu_seconds()
    workers = _AT_ONCE if executor == "threads" else 1
    changes = {"max_shard": max_shard}
    quantcli.quantize(RECIPE, model=model, out=out, set=changes, workers=workers, executor=executor)
    return cpu_seconds() - before


def start(marks: Path, number: int, progress: Any) -> None:
    """Load what a task needs, and wait until all processes have: Ray begins a second one late."""
    import quantcli.convert.spread.task  # noqa: F401

    (marks / str(number)).touch()
    while len(list(marks.iterdir())) < _AT_ONCE:
        time.sleep(0.05)


def measured(small: Path, model: Path, folder: Path, executor: str) -> tuple[float, dict[str, str]]:
    """CPU seconds after the start of all processes, and the hashes of what was written."""
    from quantcli.core.cluster.connect import connected
    from quantcli.core.cluster.executor import parse_executor

    with connected(parse_executor(executor)) as cluster:
        if cluster is not None:
            marks = Path(tempfile.mkdtemp(dir=folder))
            cluster.run(start, range(_AT_ONCE), common=marks)
        convert(small, folder / "small-out", executor)
        seconds = convert(model, folder / "out", executor)
    found = hashes(folder / "out")
    for name in ("small-out", "out"):
        shutil.rmtree(folder / name)
    return seconds, found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--gb", type=float, default=12.0, help="of the model")
    arguments.add_argument("--runs", type=int, default=2)
    options = arguments.parse_args()
    with workplace(options.dir) as folder:
        layers = max(3, round(options.gb * 1e9 / 1.0e8))
        model, small = folder / "model", folder / "small"
        nbytes = write_model(model, qwen3(layers), shards=max(3, round(2 * options.gb)))
        write_model(small, qwen3(6), shards=9)
        best: dict[str, float] = {}
        contents = {}
        for _ in range(options.runs):
            for count in (0, 1, 3):
                name = f"{count} nodes" if count else "threads"
                if count:
                    with raylets(count) as executor:
                        seconds, contents[name] = measured(small, model, folder, executor)
                else:
                    seconds, contents[name] = measured(small, model, folder, "threads")
                best[name] = min(seconds, best.get(name, seconds))
    lines = [Line(f"CPU of {name}", seconds, "s") for name, seconds in best.items()]
    over = best["3 nodes"] / best["1 nodes"] - 1
    lines.append(Line("3 nodes over 1 node", 100 * over, "%", 100 * OVERHEAD, f"{nbytes / 1e9:.1f} GB"))
    lines.append(Line("1 node over threads", 100 * (best["1 nodes"] / best["threads"] - 1), "%"))
    same = len({tuple(sorted(found.items())) for found in contents.values()}) == 1
    lines.append(Line("contents that differ", 0 if same else 1, "", 0))
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
