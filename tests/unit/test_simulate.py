"""benchmarks/simulate.py: schedules that can be computed by hand."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "simulate.py"


@pytest.fixture(scope="module")
def simulate():
    spec = importlib.util.spec_from_file_location("simulate", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["simulate"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["simulate"]


@pytest.fixture
def cluster(simulate):
    def make(nodes, slots=1, *, host=False, startup=0.0, dispatch=0.0, **rates):
        """Nodes of 4 cores, and a link of 10 bytes a second."""
        storage = simulate.Storage("store", 10.0, **{"read": 1e9, "write": 1e9} | rates, host=host)
        return simulate.Cluster(nodes, 4, slots, storage, startup, dispatch)

    return make


def test_a_phase_is_as_slow_as_its_slowest_part(simulate, cluster):
    task = simulate.Task((simulate.Phase(cpu=20, read=30, written=10),))
    assert simulate.schedule([task], cluster(1)) == pytest.approx([5.0])  # 20 s on 4 cores
    assert simulate.schedule([task], cluster(1, write=1.0)) == pytest.approx([10.0])
    two = simulate.Task((simulate.Phase(cpu=20, threads=2, wait=1), simulate.Phase(read=30)))
    assert simulate.schedule([two], cluster(1)) == pytest.approx([1 + 10 + 3])


def test_tasks_share_a_link_and_a_store(simulate, cluster):
    short, long = (simulate.Task((simulate.Phase(read=n),)) for n in (10, 30))
    # each at 5 bytes a second until the short one ends; then the long one alone
    assert simulate.schedule([short, long], cluster(1, 2)) == pytest.approx([2.0, 4.0])
    # two nodes: their links are their own, the store is not
    assert simulate.schedule([short, long], cluster(2)) == pytest.approx([1.0, 3.0])
    assert simulate.schedule([short, short], cluster(2, read=4.0)) == pytest.approx([5.0, 5.0])


def test_a_task_that_needs_little_leaves_room_for_others(simulate, cluster):
    slow = simulate.Task((simulate.Phase(cpu=20, read=10),))  # 2 cores: 10 s, 1 byte a second
    fast = simulate.Task((simulate.Phase(read=18),))
    assert simulate.schedule([slow, fast], cluster(1, 2, read=3.0)) == pytest.approx([10.0, 9.0])


def test_slots_dispatch_start_and_order(simulate, cluster):
    task = simulate.Task((simulate.Phase(cpu=8),))  # 2 s on 4 cores
    assert simulate.schedule([task] * 3, cluster(2)) == pytest.approx([2, 2, 4])
    assert simulate.schedule([task] * 3, cluster(2, startup=5, dispatch=0.5)) == pytest.approx(
        [7.5, 8, 10]
    )
    first = simulate.Task((simulate.Phase(cpu=4),), node=1)
    last = simulate.Task((simulate.Phase(cpu=4),), after=(0, 1))
    assert simulate.schedule([task, first, last], cluster(2)) == pytest.approx([2, 1, 3])


def test_the_disk_of_one_node_serves_others_through_its_link(simulate, cluster):
    task = simulate.Task((simulate.Phase(read=20),))
    near = cluster(3, host=True, read=40.0)
    # the others share its link, and node 0 has the rest of its disk
    assert simulate.schedule([task] * 3, near) == pytest.approx([20 / 30, 4, 4])
    limit = simulate.bound([task] * 3, near)
    assert (limit.seconds, limit.by) == (pytest.approx(60 / 40), "store read")


@pytest.mark.parametrize(
    ("change", "seconds", "by"),
    [
        ({}, 8 * 10 / 8, "CPU"),
        ({"read": 2.0}, 40.0, "store read"),
        ({"write": 1.0}, 40.0, "store write"),
        ({"dispatch": 3.0}, 24.0, "driver"),
    ],
)
def test_what_bounds_a_schedule(simulate, cluster, change, seconds, by):
    tasks = [simulate.Task((simulate.Phase(cpu=10, read=10, written=5),))] * 8
    limit = simulate.bound(tasks, cluster(2, startup=1.0, **change))
    assert (limit.seconds, limit.by) == (pytest.approx(seconds + 1.0), by)
    assert simulate.makespan(tasks, cluster(2, startup=1.0, **change)) >= limit.seconds - 1e-6


def test_a_phase_waits_for_a_phase_of_another_task(simulate, cluster):
    load, run = simulate.Phase(cpu=8), simulate.Phase(cpu=4)
    first = simulate.Task((load, run, run))
    second = simulate.Task((load, *(simulate.Phase(cpu=4, needs=(0, n)) for n in (1, 2))))
    # both load until 2; a run takes 1, and the second task is one behind
    assert simulate.schedule([first, second], cluster(2)) == pytest.approx([4, 5])
    # on one node of one slot the second task begins when the first has ended
    assert simulate.schedule([first, second], cluster(1)) == pytest.approx([4, 8])


def test_the_longest_chain_bounds_a_schedule(simulate, cluster):
    tasks = [simulate.Task((simulate.Phase(cpu=4),), after=(n - 1,) if n else ()) for n in range(5)]
    limit = simulate.bound(tasks, cluster(8))
    assert (limit.seconds, limit.by) == (5.0, "longest chain")
    assert simulate.makespan(tasks, cluster(8)) == pytest.approx(5.0)
