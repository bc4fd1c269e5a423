"""A cluster on paper: tasks that read, compute and write, on nodes that share links and a store.

A task has phases, one after the other. Within a phase it reads, computes and writes at the same pace,
as a conversion does, and is as slow as the slowest of the three. What several tasks want of one
resource is shared evenly: the bytes a second of all of them grow together. A task stays as it is when
it is as fast as if it were alone, or when a resource that it uses is full; the others grow on.

The scheduler is that of `core/cluster`: tasks in the order of requests, each to a node with a free
slot, the emptiest first. The driver needs some time for each, one after the other.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

Uses = Mapping[str, float]  # of each resource: bytes
_LEAST = 1e-9  # seconds, and shares of a phase


@dataclass(frozen=True)
class Phase:
    """What goes on at one time.

    cpu: core seconds. read, written: bytes. wait: seconds before it. threads: the most cores it uses.
    needs: the task and the phase of it, by numbers, that must have ended before.
    """

    cpu: float = 0.0
    read: float = 0.0
    written: float = 0.0
    wait: float = 0.0
    threads: float = inf
    needs: tuple[int, int] | None = None

    @property
    def moved(self) -> float:
        """Bytes read and written."""
        return self.read + self.written


@dataclass(frozen=True)
class Task:
    """What one slot does without a pause. node: where it must run. after: the tasks before it."""

    phases: tuple[Phase, ...]
    node: int | None = None
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Storage:
    """Where source and output lie. Bytes a second.

    link:  of a node, each way.
    read, write: of the store, all nodes together.
    host:  whether node 0 holds the store on its own disk, so that others come through its link.
    """

    name: str
    link: float
    read: float
    write: float
    host: bool = False

    def capacity(self, nodes: int) -> dict[str, float]:
        """Bytes a second of each resource."""
        links = {f"{way} {node}": self.link for node in range(nodes) for way in ("in", "out")}
        return {"store read": self.read, "store write": self.write, **links}

    def uses(self, node: int, read: float, written: float) -> dict[str, float]:
        """Bytes that pass each resource if a node reads and writes so many."""
        through = {"store read": read, "store write": written}
        if not self.host:
            return {**through, f"in {node}": read, f"out {node}": written}
        if node == 0:
            return through
        return {**through, f"in {node}": read, "out 0": read, f"out {node}": written, "in 0": written}


@dataclass(frozen=True)
class Cluster:
    """nodes: how many. cores: of each. slots: tasks at a time on each; they share its cores evenly.

    startup: seconds until a node's first task begins. dispatch: seconds of the driver for each task.
    """

    nodes: int
    cores: int
    slots: int
    storage: Storage
    startup: float = 0.0
    dispatch: float = 0.0

    @property
    def threads(self) -> float:
        """Cores of one task."""
        return self.cores / self.slots


@dataclass
class _Running:
    number: int
    node: int
    phases: list[Phase]  # what is left, the present one first
    left: float = 1.0  # share of the present phase
    pace: float = 0.0  # shares a second
    wakes: float = 0.0  # until then the phase waits
    fastest: float = 0.0  # pace, if it were alone
    uses: dict[str, float] = field(default_factory=dict)  # of the present phase


def makespan(tasks: Sequence[Task], cluster: Cluster) -> float:
    """Seconds from the start to the end of the last task."""
    return max(schedule(tasks, cluster), default=0.0)


def schedule(tasks: Sequence[Task], cluster: Cluster) -> list[float]:
    """When each task ends, in seconds from the start."""
    ends = [0.0] * len(tasks)
    missing = [len(task.after) for task in tasks]
    followers: dict[int, list[int]] = defaultdict(list)
    for number, task in enumerate(tasks):
        for before in task.after:
            followers[before].append(number)
    ready = [number for number, count in enumerate(missing) if not count]  # a heap: sorted
    free = [cluster.slots] * cluster.nodes
    running: list[_Running] = []
    capacity = cluster.storage.capacity(cluster.nodes)
    passed = [0] * len(tasks)  # phases that have ended
    now, driver = cluster.startup, cluster.startup

    def wakes(phase: Phase, ready: float) -> float:
        """When a phase begins; never, if it needs another one that has not ended."""
        blocked = phase.needs is not None and passed[phase.needs[0]] <= phase.needs[1]
        return inf if blocked else ready + phase.wait

    while ready or running:
        for number, node in _placed(ready, tasks, free):
            driver = max(driver, now) + cluster.dispatch
            started = _Running(number, node, list(tasks[number].phases))
            started.wakes = wakes(started.phases[0], driver)
            _prepare(started, cluster, capacity)
            running.append(started)
        assert running, "tasks wait for each other, or for a node that is not there"
        _share([r for r in running if r.wakes <= now + _LEAST], capacity)
        step = min(_seconds(r, now) for r in running)
        assert step < inf, "phases need each other"
        now += step
        still = []
        for r in running:
            r.left -= r.pace * step
            if r.wakes > now + _LEAST or r.left > _LEAST:
                still.append(r)
                continue
            r.phases.pop(0)
            passed[r.number] += 1
            if r.phases:
                r.pace, r.wakes = 0.0, inf
                _prepare(r, cluster, capacity)
                still.append(r)
                continue
            free[r.node] += 1
            ends[r.number] = now
            for follower in followers[r.number]:
                missing[follower] -= 1
                if not missing[follower]:
                    heapq.heappush(ready, follower)
        running = still
        for r in running:
            if r.wakes == inf:
                r.wakes = wakes(r.phases[0], now)
    return ends


def _placed(ready: list[int], tasks: Sequence[Task], free: list[int]) -> list[tuple[int, int]]:
    """Takes tasks that can begin from `ready`, and their slots from `free`: number and node of each."""
    placed, waiting = [], []
    while ready and any(free):
        number = heapq.heappop(ready)
        node = tasks[number].node
        if node is None:
            node = max(range(len(free)), key=lambda n: (free[n], -n))
        if not free[node]:
            waiting.append(number)
            continue
        free[node] -= 1
        placed.append((number, node))
    for number in waiting:
        heapq.heappush(ready, number)
    return placed


def _seconds(r: _Running, now: float) -> float:
    """Until something happens to a task."""
    if r.wakes > now + _LEAST:
        return r.wakes - now
    return r.left / r.pace if r.left > _LEAST else 0.0


def _prepare(r: _Running, cluster: Cluster, capacity: Mapping[str, float]) -> None:
    """What the present phase of a task uses, and its fastest pace."""
    phase = r.phases[0]
    each = cluster.storage.uses(r.node, phase.read, phase.written)
    r.uses = {name: nbytes for name, nbytes in each.items() if nbytes}
    r.fastest = _alone(phase, r.uses, capacity, cluster.threads)
    r.left = 0.0 if r.fastest == inf else 1.0


def _share(active: Sequence[_Running], capacity: Mapping[str, float]) -> None:
    """Give each task its pace: its own fastest, or what is left for it."""
    wanted: Counter[str] = Counter()
    for r in active:
        r.pace = r.fastest
        for name, nbytes in r.uses.items() if r.left else ():
            wanted[name] += nbytes * r.fastest
    scarce = {name for name, rate in wanted.items() if rate > capacity[name]}
    growing = [r for r in active if r.left and not scarce.isdisjoint(r.uses)]
    room = dict(capacity)
    for r in active:
        if r.left and scarce.isdisjoint(r.uses):
            for name, nbytes in r.uses.items():
                room[name] -= nbytes * r.pace
    for r in growing:
        r.pace = 0.0
    while growing:
        rate: Counter[str] = Counter()  # of each resource, if each task moves a byte a second more
        for r in growing:
            for name, nbytes in r.uses.items():
                rate[name] += nbytes / r.phases[0].moved
        more = min(room[name] / each for name, each in rate.items())
        more = min(more, *((r.fastest - r.pace) * r.phases[0].moved for r in growing))
        for r in growing:
            r.pace += more / r.phases[0].moved
        for name, each in rate.items():
            room[name] -= more * each
        full = {name for name, each in rate.items() if room[name] <= _LEAST * each}
        growing = [r for r in growing if r.pace < r.fastest * (1 - _LEAST) and full.isdisjoint(r.uses)]


def _alone(phase: Phase, uses: Uses, room: Mapping[str, float], threads: float) -> float:
    """Shares a second of a phase that has all resources to itself."""
    moving = (nbytes / room[name] for name, nbytes in uses.items())
    seconds = max([phase.cpu / min(threads, phase.threads), *moving])
    return 1.0 / seconds if seconds > _LEAST else inf


@dataclass(frozen=True)
class Bound:
    """What no schedule can beat: seconds, and what sets them."""

    seconds: float
    by: str


def bound(tasks: Sequence[Task], cluster: Cluster) -> Bound:
    """The slowest resource if work could be cut anywhere, the longest chain of tasks, or the driver."""
    phases = [phase for task in tasks for phase in task.phases]
    total = Phase(*(sum(getattr(p, name) for p in phases) for name in ("cpu", "read", "written")))
    alone = 0.0
    chains: list[float] = []
    passed: dict[tuple[int, int], float] = {}
    for number, task in enumerate(tasks):
        end = max((chains[earlier] for earlier in task.after), default=0.0)
        for place, phase in enumerate(task.phases):
            seconds = _phase_alone(phase, task.node, cluster)
            end = max(end, passed[phase.needs] if phase.needs else 0.0) + seconds
            passed[number, place] = end
            alone += seconds
        chains.append(end)
    found = [
        *_resources(total, cluster),
        Bound(alone / (cluster.nodes * cluster.slots), "tasks at a time"),
        Bound(max(chains, default=0.0), "longest chain"),
        Bound(len(tasks) * cluster.dispatch, "driver"),
    ]
    slowest = max(found, key=lambda one: one.seconds)
    return replace(slowest, seconds=slowest.seconds + cluster.startup)


def _phase_alone(phase: Phase, node: int | None, cluster: Cluster) -> float:
    """Seconds of a phase that is alone in the cluster, on its node or the best one."""
    room, found = cluster.storage.capacity(cluster.nodes), []
    for place in {0, cluster.nodes - 1} if node is None else {node}:
        uses = cluster.storage.uses(place, phase.read, phase.written)
        found.append(1 / _alone(phase, uses, room, cluster.threads))
    return phase.wait + min(found)


def _resources(total: Phase, cluster: Cluster) -> list[Bound]:
    """The time of each resource, by the best share of the work for node 0, whose disk may be near."""
    low = high = 1 / cluster.nodes
    if cluster.storage.host and cluster.nodes > 1:
        high = 1.0
        for _ in range(100):  # the slowest is convex in the share
            left, right = low + (high - low) / 3, high - (high - low) / 3
            if _slowest(left, total, cluster) <= _slowest(right, total, cluster):
                high = right
            else:
                low = left
    return _loads(high, total, cluster)


def _slowest(share: float, total: Phase, cluster: Cluster) -> float:
    return max(one.seconds for one in _loads(share, total, cluster))


def _loads(share: float, total: Phase, cluster: Cluster) -> list[Bound]:
    """Seconds of each resource if node 0 does a share of all work and the others the same each."""
    others = cluster.nodes - 1
    shares = [share] + [(1 - share) / others for _ in range(others)]
    used: Counter[str] = Counter()
    for node, part in enumerate(shares):
        used.update(cluster.storage.uses(node, total.read * part, total.written * part))
    room = cluster.storage.capacity(cluster.nodes)
    times = [Bound(nbytes / room[name], _kind(name)) for name, nbytes in used.items()]
    return [*times, *(Bound(total.cpu * part / cluster.cores, "CPU") for part in shares)]


def _kind(resource: str) -> str:
    return resource if resource.startswith("store") else "link"
