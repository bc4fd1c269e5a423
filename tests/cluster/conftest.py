"""A cluster of three nodes on this machine, each with a CPU, and what happens to them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantcli.core.cluster.connect import _QUIET
from quantcli.core.cluster.executor import Executor
from quantcli.core.cluster.tasks import TaskRun
from quantcli.core.cluster.worker import Place
from tests.e2e.conftest import RECIPE, Box, make_llama
from tests.object_server import Objects

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


class Three:
    """Three nodes: a head, where drivers connect, and two more."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {**NODE, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.others = [self.cluster.add_node(**NODE) for _ in range(2)]

    @property
    def executor(self) -> Executor:
        """How to connect."""
        return Executor(self.cluster.address)

    @property
    def option(self) -> tuple[str, str]:
        """How to connect, on the command line."""
        return "--executor", str(self.executor)

    def complete(self) -> None:
        """Have three nodes again."""
        while len(self.others) < 2:
            self.others.append(self.cluster.add_node(**NODE))

    def remove(self, node: str) -> bool:
        """Kill the node with an id. False if it is the head."""
        import ray

        (socket,) = (n["ObjectStoreSocketName"] for n in ray.nodes() if n["NodeID"] == node)
        for other in self.others:
            if other.plasma_store_socket_name == socket:
                self.others.remove(other)
                self.cluster.remove_node(other, allow_graceful=False)
                return True
        return False


@pytest.fixture(scope="session")
def started(objects: Objects) -> Iterator[Three]:
    """Nodes find the server of object storage by their environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _QUIET.items():
            patch.setenv(name, value)
        three = Three()
        try:
            yield three
        finally:
            three.cluster.shutdown()


@pytest.fixture
def three(started: Three) -> Three:
    started.complete()
    return started


@pytest.fixture
def box(tmp_path: Path) -> Box:
    """A small conversion."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    return Box(tmp_path, make_llama(tmp_path / "model"), recipe, tmp_path / "out")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 88 MB: its shards take tasks a moment."""
    return make_llama(tmp_path_factory.mktemp("models") / "model", layers=4, side=1024)


@pytest.fixture
def large(model: Path, tmp_path: Path) -> Box:
    """A conversion of it."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    return Box(tmp_path, model, recipe, tmp_path / "out")


@pytest.fixture
def when_begun(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Place], bool]], list[Place]]:
    """Call a function with the place of each task, as it begins, until it returns True."""

    def watch(act: Callable[[Place], bool]) -> list[Place]:
        places: list[Place] = []
        acted: list[Place] = []
        finished = TaskRun._finished

        def watched(run: TaskRun, pending: list[int]) -> Any:
            results = finished(run, pending)
            for place in [stream.place for stream in run._live]:
                if place is not None and place not in places:
                    places.append(place)
                    if not acted and act(place):
                        acted.append(place)
            return results

        monkeypatch.setattr(TaskRun, "_finished", watched)
        return places

    return watch


def kill(place: Place) -> bool:
    """Kill the process of a task."""
    os.kill(place.pid, signal.SIGKILL)
    return True
