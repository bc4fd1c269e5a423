"""What runs on the nodes: work in a thread, while its progress goes to the driver piece by piece.

A task is a generator. Ray hands each value that it yields to the driver at once: first a `Place`, then
calls of the progress, and in the end a `Result` or a `Failure`.
"""

from __future__ import annotations

import gc
import os
import pickle
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from quantcli.core.cluster.relay import Call, Relay
from quantcli.core.cluster.software import CPU, differences, software
from quantcli.core.errors import AccessError, MachineError, QuantError
from quantcli.core.events import Progress

ALIKE = "install the same versions on all nodes, such as one container image"


@dataclass(frozen=True)
class Place:
    """Where work runs."""

    node: str  # Ray's id
    address: str
    pid: int


@dataclass(frozen=True)
class Result:
    """What the work returned."""

    value: Any


@dataclass(frozen=True)
class Failure:
    """What the work raised. trace: its traceback, if it is not an error of ours."""

    error: BaseException
    trace: str


Message: TypeAlias = Place | list[Call] | Result | Failure


@dataclass(frozen=True)
class Setting:
    """How work runs. interval: seconds between messages; detailed: whether details are wanted;
    software: of the driver; cpu: the kind that a node must have, None: any."""

    interval: float
    detailed: bool
    software: Mapping[str, str]
    cpu: str | None = None


@dataclass(frozen=True)
class Shared:
    """An object that all tasks of a run get. It is in Ray's store, pickled, and each process reads it
    once: `key` tells it from others."""

    key: str
    reference: Any


_values: dict[str, Any] = {}  # the object of the last run


def value_of(shared: Shared) -> Any:
    """A shared object, in this process."""
    if shared.key not in _values:
        import ray

        gc.set_threshold(200_000, 50, 100)  # see __main__
        value = pickle.loads(ray.get(shared.reference))
        _values.clear()
        _values[shared.key] = value
    return _values[shared.key]


def task(
    work: Callable[[Any, Any, Progress], Any], shared: Shared, request: Any, setting: Setting
) -> Iterator[Message]:
    """Do work as a task of Ray: `work(common, request, progress)`."""

    def run(progress: Progress) -> Any:
        return work(value_of(shared), request, progress)

    yield from _messages(run, setting)


def _messages(run: Callable[[Progress], Any], setting: Setting) -> Iterator[Message]:
    """Run in a thread, and yield what the driver is to know."""
    import ray

    context = ray.get_runtime_context()
    yield Place(context.get_node_id(), node_address(), os.getpid())
    outcome: list[Result | Failure] = []
    progress, ended = Relay(detailed=setting.detailed), threading.Event()

    def thread() -> None:
        try:
            check_software(setting.software)
            check_cpu(setting.cpu)
            outcome.append(Result(run(progress)))
        except BaseException as error:
            outcome.append(_failure(error))
        ended.set()

    working = threading.Thread(target=thread, name="quantcli-work", daemon=True)
    working.start()
    while not ended.wait(setting.interval):
        if calls := progress.take():
            yield calls
    working.join()
    if calls := progress.take():
        yield calls
    yield outcome[0]


def _failure(error: BaseException) -> Failure:
    if isinstance(error, QuantError):
        name_node(error, node_address())
    trace = "" if isinstance(error, QuantError) else "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return Failure(error, trace)


def name_node(error: QuantError, address: str) -> None:
    """Say on which node an error was, if others may not have it."""
    if not error.of_machine or "node " in (error.where or ""):
        return
    error.where = f"{error.where} on node {address}" if error.where else f"node {address}"
    if isinstance(error, AccessError):
        error.fix = f"there, before Ray is started: {error.fix}"


def node_address() -> str:
    """The address of this machine in the cluster."""
    import ray

    return str(ray.util.get_node_ip_address())


def check_software(driver: Mapping[str, str]) -> None:
    """MachineError if the software of this machine is not that of the driver."""
    if driver is not _checked[0] and driver != _checked[0]:
        if found := differences(driver, software()):
            node = f"{node_address()} ({socket.gethostname()})"
            raise MachineError(software_differs([(node, found)]), fix=ALIKE)
        _checked[0] = driver


def check_cpu(kind: str | None) -> None:
    """MachineError if the CPU of this machine is not of the kind of the other nodes."""
    own = software()[CPU]
    if kind not in (None, own):
        raise cpus_differ(f"node {node_address()} has {own}, the others {kind}")


def cpus_differ(where: str) -> MachineError:
    """The error for nodes whose bits would differ. where: which nodes have which CPUs."""
    return MachineError(
        "nodes have several kinds of CPU, whose sums of floats differ",
        where=where,
        fix="use nodes of one kind, or hide instructions with ONEDNN_MAX_CPU_ISA and "
        "ATEN_CPU_CAPABILITY on all of them",
    )


_checked: list[Mapping[str, str] | None] = [None]  # the driver's that was found to be the same


def software_differs(nodes: list[tuple[str, list[str]]]) -> str:
    """What to say of nodes with other software than the driver has: each with its differences."""
    texts = list(dict.fromkeys(f"{node} has {', '.join(found)}" for node, found in nodes))
    more = f"; so do {len(texts) - 3} other nodes" if len(texts) > 3 else ""
    return "nodes do not have the software of this machine: " + "; ".join(texts[:3]) + more
