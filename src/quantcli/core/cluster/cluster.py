"""A cluster that this process is connected to."""

from __future__ import annotations

import pickle
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.core.cluster.relay import Heard
from quantcli.core.cluster.software import CPU, differences, software
from quantcli.core.cluster.streams import Lost, Stream, cancel, error_of, ready
from quantcli.core.cluster.tasks import Done, TaskOptions, TaskRun
from quantcli.core.cluster.worker import (
    ALIKE,
    Result,
    Setting,
    Shared,
    cpus_differ,
    software_differs,
    task,
)
from quantcli.core.disk import disk_errors
from quantcli.core.errors import InputError, MachineError
from quantcli.core.events import SILENT, Progress
from quantcli.core.place import existing_ancestor

_USUAL = TaskOptions()
_MESSAGES = 100  # a second, that the driver reads at most
_SLOWEST = 0.2  # seconds between messages of one task, or more
_WAITS = (0.0, 0.5, 2.0)  # seconds
_RECENT = 1.0  # seconds
_NOTICED = 1.0  # seconds
_UNHEALTHY = 20.0  # seconds until a node without a heartbeat counts as gone, and some more
_MOST_CRASHES = 2  # of processes on a node that lives on
_ALIKE = f"{ALIKE}; or use --executor ray:local, a new cluster on this machine"
_START = 120.0  # seconds that a node may take to answer at first


@dataclass(frozen=True)
class Node:
    """A machine of the cluster. cpus: those that Ray may use."""

    id: str
    address: str
    cpus: int


class Cluster:
    """Nodes that work. Not for several threads at once."""

    def __init__(self, name: str) -> None:
        """name: of the cluster, for messages."""
        self.name = name
        self._nodes: tuple[Node, ...] = ()
        self._asked = -_RECENT
        self._cpus: dict[str, str] = {}  # their kinds by address
        self._kind: str | None = None  # the one that all nodes must have

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that are alive and have CPUs, in the order of their addresses. They may be those of
        a second ago."""
        if time.monotonic() - self._asked >= _RECENT:
            self._nodes, self._asked = self._ask(), time.monotonic()
        return self._nodes

    def _ask(self) -> tuple[Node, ...]:
        import ray

        found = [
            Node(
                entry["NodeID"],
                entry["NodeManagerAddress"],
                int(entry["Resources"].get("CPU", 0)),
            )
            for entry in ray.nodes()
            if entry["Alive"]
        ]
        return tuple(sorted((n for n in found if n.cpus), key=lambda node: (node.address, node.id)))

    def is_gone(self, node: str, seconds: float = _NOTICED) -> bool:
        """Whether the node of this id is gone, or so within some seconds: the cluster has to notice."""
        end = time.monotonic() + seconds
        while any(other.id == node for other in self._ask()):
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        self._asked = -_RECENT
        return True

    def slots(self, cpus: int, spare: int | None = None) -> int:
        """The number of tasks of some CPUs that may be under way: as many as can run at a time, and one
        more for each node, which waits there. spare: in place of these."""
        nodes = self.nodes
        most = sum(node.cpus // cpus for node in nodes)
        return most + (max(1, len(nodes)) if spare is None else spare)

    def task_cpus(self, workers: int | None) -> int:
        """The CPUs of a task: as many as asked for, if each node has them; None: all of the smallest
        node."""
        return min(
            [node.cpus for node in self.nodes] + ([] if workers is None else [workers]), default=1
        )

    def setting(self, progress: Progress) -> Setting:
        """How work runs: the driver can read so many messages a second."""
        most = sum(node.cpus for node in self.nodes)
        interval = max(_SLOWEST, most / _MESSAGES)
        return Setting(interval, progress.detailed, software(), self._kind)

    def share(self, common: Any) -> Shared:
        """Put an object where all tasks find it."""
        import ray
        from ray import cloudpickle  # takes functions without a name, too

        content = cloudpickle.dumps(common, protocol=pickle.HIGHEST_PROTOCOL)
        return Shared(secrets.token_hex(8), ray.put(content))

    def run(
        self,
        work: Callable[[Any, Any, Progress], Any],
        requests: Sequence[Any],
        *,
        common: Any = None,
        options: TaskOptions = _USUAL,
        done: Done = lambda index, result: None,
        progress: Progress = SILENT,
    ) -> list[Any]:
        """Do `work(common, request, progress)` for each request. Results in the order of the requests.

        work: a function of a module, that gives the same for the same request: it is done again if its
        process or its node is gone, which `progress` says. It may run on any node, and its result
        should be small. done(index, result) is called here as results come; requests that it returns
        are done next, and their results are behind all others. common: an object for all, or what
        `share` has made of it.

        If work fails, the error of the first such request is raised, as it would be here. MachineError
        if a process dies again and again, or if there is no node.
        """
        shared = common if isinstance(common, Shared) else self.share(common)
        run = TaskRun(self, work, shared, options, progress)
        return run.results(requests, done)

    def everywhere(
        self,
        work: Callable[[Any, Any, Progress], Any],
        *,
        common: Any = None,
        progress: Progress = SILENT,
        whole: bool = False,
    ) -> dict[Node, Any]:
        """Do `work(common, node, progress)` on every node. Results by node; one that is gone by then is
        left out.

        whole: it takes all CPUs; else it should be little work. The error of the first node that has
        one is raised; MachineError if one does not begin.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        shared, setting, nodes = self.share(common), self.setting(progress), self.nodes
        remote = ray.remote(task)

        def start(index: int) -> Stream:
            on = remote.options(
                num_cpus=nodes[index].cpus if whole else 0,
                num_returns="streaming",
                max_retries=0,
                scheduling_strategy=On(nodes[index].id, soft=False),
            )
            return Stream(on.remote(work, shared, nodes[index], setting), index)

        results = self._all(nodes, start, Heard(progress))
        return {nodes[index]: result for index, result in sorted(results.items())}

    def _all(
        self, nodes: Sequence[Node], start: Callable[[int], Stream], heard: Heard
    ) -> dict[int, Any]:
        """The results of work that is started on every node, by the node's index. Nodes that are gone
        by then have none."""
        streams, lost = [start(index) for index in range(len(nodes))], Counter[int]()
        results: dict[int, Any] = {}
        errors: dict[int, BaseException] = {}
        try:
            while streams:
                found = ready(streams, _START)
                if not found and (waiting := [each for each in streams if each.place is None]):
                    raise _silent(nodes[waiting[0].index], f"no answer in {_START:.0f} s")
                for stream in found:
                    try:
                        outcome = stream.read(heard)
                    except Lost as why:
                        streams.remove(stream)
                        if why.with_node or self.is_gone(nodes[stream.index].id, _UNHEALTHY):
                            continue
                        lost[stream.index] += 1
                        if lost[stream.index] == _MOST_CRASHES:
                            raise _silent(nodes[stream.index], str(why)) from None
                        streams.append(start(stream.index))
                        continue
                    if outcome is None:
                        continue
                    streams.remove(stream)
                    if isinstance(outcome, Result):
                        results[stream.index] = outcome.value
                    else:
                        errors[stream.index] = error_of(outcome)
        finally:
            cancel(streams)
        if errors:
            raise errors[min(errors)]
        return results

    def check_software(self) -> None:
        """InputError if a node has other software than this machine."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        nodes, remote = self.nodes, ray.remote(_prober())
        asked = [
            remote.options(num_cpus=0, scheduling_strategy=On(node.id, soft=False)).remote()
            for node in nodes
        ]
        there = {}
        for node, reference in zip(nodes, asked, strict=True):
            try:
                there[node] = ray.get(reference, timeout=_START)
            except ray.exceptions.RayError as error:
                if not self.is_gone(node.id, _UNHEALTHY):
                    raise _silent(node, str(error).partition("\n")[0]) from None
        differing = []
        for node, found in there.items():
            if isinstance(found, str):
                raise InputError(
                    f"a node cannot import quantcli: {found}",
                    where=f"node {node.address}",
                    fix=_ALIKE,
                )
            if differ := differences(software(), found):
                differing.append((node.address, differ))
        if differing:
            raise InputError(software_differs(differing), where=self.name, fix=_ALIKE)
        self._cpus = {node.address: found[CPU] for node, found in there.items()}

    def check_alike(self) -> None:
        """MachineError if CPUs are of several kinds: sums of floats would differ. A node that joins
        later is checked when its first task starts."""
        kinds = {kind: address for address, kind in self._cpus.items()}
        if len(kinds) > 1:
            texts = ", ".join(f"{address} has {kind}" for kind, address in sorted(kinds.items()))
            raise cpus_differ(f"{self.name}: {texts}")
        self._kind = next(iter(kinds), None)

    def check_shared(self, folder: Path, option: str) -> None:
        """MachineError unless every node sees the files of a folder that is written, and can write
        there. folder: need not exist. option: that names it."""
        place = existing_ancestor(folder)
        word = secrets.token_hex(8)
        probe = place / f".quantcli-{word}"
        try:
            with disk_errors(probe):
                probe.write_text(word)
            found = self.everywhere(_probe, common=(probe, word))
        finally:
            probe.unlink(missing_ok=True)
        for node, problem in found.items():
            if problem:
                raise MachineError(
                    f"a node of the cluster {problem}",
                    where=f"node {node.address}, {place}",
                    fix=f"give a folder that all nodes share as {option}",
                )


def _prober() -> Callable[[], Any]:
    """A function that Ray sends by its code, so that it runs on a node without quantcli, too."""

    def probe() -> Any:
        try:
            from quantcli.core.cluster.software import software
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return dict(software())

    return probe


def _probe(common: Any, node: Node, progress: Progress) -> str:
    """What is wrong with a folder as this node sees it; empty if nothing."""
    probe, word = common
    try:
        for wait in _WAITS:  # network file systems may be late
            time.sleep(wait)
            if probe.exists():
                break
        if probe.read_text() != word:
            return "sees another folder here"
    except FileNotFoundError:
        return "does not see the files here"
    except OSError as error:
        return f"cannot read here: {error.strerror}"
    own = probe.with_name(f"{probe.name}-{secrets.token_hex(4)}")
    try:
        own.write_text(word)
        own.unlink()
    except OSError as error:
        return f"cannot write here: {error.strerror}"
    return ""


def _silent(node: Node, why: str) -> MachineError:
    return MachineError(
        "a node of the cluster does not work",
        where=f"node {node.address}: {why}",
        fix="look at it with `ray status` and in Ray's logs there, or remove it",
    )
