"""Nodes of a Ray cluster killed at random moments: the bytes of threads, and how much is done again.

Three nodes with a CPU each, and a head that only holds the cluster together, are on this machine. In
each round one of the three is killed (SIGKILL of all its processes) at a moment of the conversion,
uniform from its beginning to its end as the last rounds took it. Up to three seconds later a new node
takes its place. Calibration and weights are made anew in each round. What is done again is counted from
the messages.
"""

from __future__ import annotations

import random
import re
import shutil
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calibration import make_model
from common import ROOT, Line, finish, hashes, parser, workplace

NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
STATIC = {"calibration.samples": 24, "calibration.length": 256, "max_shard": "8MB"}
LEARNED = {"calibration.samples": 8, "calibration.length": 64, "max_shard": "2MB",
           "rules.0.scheme": {"name": "w4a4_flatquant", "epochs": 2}}  # fmt: skip
_AGAIN = re.compile(r"node \S+ is gone: (\d+) (.+?) (?:is|are) done again")
_MOST = 1  # of what a node does at a time
_LATE = 3.0  # seconds until a new node comes, at most


@dataclass
class Nodes:
    """The cluster. workers: its nodes that work."""

    cluster: Any
    workers: list[Any] = field(default_factory=list)

    def complete(self) -> None:
        """Have three nodes that work."""
        while len(self.workers) < 3:
            self.workers.append(self.cluster.add_node(**NODE))

    def kill(self, number: int) -> None:
        """Kill a node, with all its processes."""
        self.workers.pop(number).kill_all_processes(check_alive=False, allow_graceful=False)


@contextmanager
def started() -> Iterator[Nodes]:
    """A head without CPUs, and three nodes."""
    from ray.cluster_utils import Cluster

    head = {**NODE, "num_cpus": 0, "include_dashboard": False}
    # without handlers of signals, which a thread that adds a node could not set
    nodes = Nodes(Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False))
    try:
        nodes.complete()
        yield nodes
    finally:
        for node in nodes.workers:
            with suppress(Exception):
                node.kill_all_processes(check_alive=False, allow_graceful=False)
        nodes.cluster.shutdown()


@dataclass
class Killer:
    """Kills a node in a while, if the block has not ended by then. moment, late: seconds."""

    nodes: Nodes
    moment: float
    number: int
    late: float
    has_killed: bool = False
    _over: threading.Event = field(default_factory=threading.Event)

    def _act(self) -> None:
        if self._over.wait(self.moment):
            return
        self.nodes.kill(self.number)
        self.has_killed = True
        if not self._over.wait(self.late):
            self.nodes.complete()

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._act)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@dataclass(frozen=True)
class Case:
    """A conversion. model: its folder. changes: of the recipe."""

    recipe: str
    model: Path
    changes: dict[str, Any]

    def convert(self, folder: Path, executor: str) -> tuple[dict[str, str], list[str], float]:
        """Hashes of the checkpoint and of its calibration; the messages; seconds."""
        import quantcli

        for name in ("out", "out.calibration"):
            shutil.rmtree(folder / name, ignore_errors=True)
        messages: list[str] = []
        began = time.monotonic()
        quantcli.quantize(
            self.recipe,
            model=self.model,
            out=folder / "out",
            set=self.changes,
            workers=1,
            executor=executor,
            on_progress=lambda event: messages.append(str(event)),
        )
        seconds = time.monotonic() - began
        return hashes(folder / "out") | hashes(folder / "out.calibration"), messages, seconds


def rounds(
    case: Case, folder: Path, count: int, moments: random.Random
) -> tuple[Sequence[Counter[str]], list[str]]:
    """What was done again in each round in which a node was killed, and what went wrong."""
    from quantcli.core.cluster.connect import connected
    from quantcli.core.cluster.executor import parse_executor

    expected, _, _ = case.convert(folder, "threads")
    again: list[Counter[str]] = []
    wrong: list[str] = []
    with started() as nodes:
        executor = f"ray:{nodes.cluster.address}"
        with connected(parse_executor(executor)):
            case.convert(folder, executor)  # starts processes
            spans = deque([case.convert(folder, executor)[2]], maxlen=5)
            while len(again) < count:
                nodes.complete()
                moment, late = moments.uniform(0, min(spans)), moments.uniform(0, _LATE)
                killer = Killer(nodes, moment, moments.randrange(3), late)
                with killer:
                    found, messages, seconds = case.convert(folder, executor)
                if not killer.has_killed:
                    spans.append(seconds)
                    continue
                parts = [match for text in messages for match in _AGAIN.findall(text)]
                again.append(Counter({noun: 0 for _, noun in parts}))
                for times, noun in parts:
                    again[-1][noun] += int(times)
                print(f"{case.recipe}, round {len(again)}: {dict(again[-1])}", file=sys.stderr)
                if found != expected:
                    wrong.append(f"round {len(again)}, killed at {moment:.2f} s: other bytes")
    return again, wrong


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=20, help="of each recipe")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--recipes", default="w8a8_static,w4a4_flatquant")
    options = arguments.parse_args()
    lines = []
    with workplace(options.dir) as folder:
        make_model(folder / "model", layers=4, hidden=1024)
        tiny = ROOT / "examples" / "tiny-qwen3"
        cases = {
            "w8a8_static": Case("w8a8_static", folder / "model", STATIC),
            "w4a4_flatquant": Case("w4a4_flatquant", tiny, LEARNED),
        }
        for name in options.recipes.split(","):
            moments = random.Random(options.seed)
            again, wrong = rounds(cases[name], folder, options.rounds, moments)
            detail = "; ".join(wrong[:5]) or f"{len(again)} nodes killed"
            lines.append(Line(f"{name}: rounds with other bytes", len(wrong), "", 0, detail))
            most = max((sum(counts.values()) for counts in again), default=0)
            total = sum(again, Counter[str]())
            detail = ", ".join(f"{noun} {times}" for noun, times in sorted(total.items()))
            lines.append(Line(f"{name}: done again, at most", most, "", _MOST, f"in all: {detail}"))
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
