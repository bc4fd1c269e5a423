"""A Ray cluster of this machine. `make test-ray` has more: several nodes, and how they fail."""

import os
import signal

import pytest

from quantcli.core.cluster.actors import ActorLost
from quantcli.core.cluster.connect import connect
from quantcli.core.cluster.executor import Executor
from quantcli.core.errors import InputError, MachineError
from tests import ray_work
from tests.unit.core.test_cluster import Calls

LOCAL = Executor("local")


@pytest.fixture(scope="module")
def cluster():
    before = signal.getsignal(signal.SIGTERM)
    with connect(LOCAL) as cluster:
        assert signal.getsignal(signal.SIGTERM) == before
        yield cluster


def test_requests_are_done_in_other_processes_and_answered_in_order(cluster):
    calls, done = Calls(), {}
    results = cluster.run(ray_work.multiply, range(4), common=7, done=done.__setitem__, progress=calls)
    assert [value for value, _ in results] == [0, 7, 14, 21]
    assert os.getpid() not in {pid for _, pid in results}
    assert done == dict(enumerate(results))
    assert calls.nbytes == 40
    assert sorted(calls.calls) == [("say", f"at {n}") for n in range(4)]


def test_the_first_error_in_the_order_of_requests_is_raised(cluster):
    done = {}
    with pytest.raises(InputError, match="3 is too large") as caught:
        cluster.run(ray_work.refuse, range(6), done=done.__setitem__)
    assert (caught.value.where, caught.value.fix) == ("here", "give less")
    assert done.keys() == {0, 1, 2}
    with pytest.raises(ZeroDivisionError) as bug:
        cluster.run(ray_work.divide, [0])
    assert "in divide" in bug.value.__notes__[0]


def test_a_request_whose_process_dies_is_done_again(cluster, tmp_path):
    calls = Calls()
    mark = str(tmp_path / "mark")
    assert cluster.run(ray_work.die_once, range(4), common=mark, progress=calls) == [0, 1, 2, 3]
    assert calls.nbytes == 40  # those of the process that died were taken back
    ((_, said),) = calls.calls
    assert said.startswith("a process on node")
    assert "has died: 1 task is done again" in said


def test_actors_keep_what_they_hold_and_say_when_they_are_lost(cluster):
    with cluster.actors(ray_work.make_adder, [1, 2], common=10) as actors:
        assert actors.each("add", [5, 6]) == [16, 18]
        results = dict(actors.map("add", range(5)))
        assert {result - index for index, result in results.items()} <= {11, 12}
        with pytest.raises(TypeError):
            actors.each("add", [1, "two"])
        with pytest.raises(ActorLost) as caught:
            actors.each("add", [None, 1])
        assert caught.value.number == 0


def test_a_folder_is_shared_if_all_nodes_write_there(cluster, tmp_path):
    cluster.check_shared(tmp_path / "new" / "folder", "--out")
    assert list(tmp_path.iterdir()) == []
    cluster.check_alike()


def test_more_cpus_than_a_node_has_are_refused(cluster):
    most = max(node.cpus for node in cluster.nodes)
    cluster.check_cpus(most)
    with pytest.raises(InputError, match=f"no node has {most + 1} CPUs"):
        cluster.check_cpus(most + 1)


def test_one_cluster_at_a_time(cluster):
    with connect(LOCAL) as again:
        assert again is cluster
    with pytest.raises(InputError, match="connected to another cluster"), connect(Executor("a:1")):
        pass


def test_an_address_where_nothing_answers(monkeypatch):
    from quantcli.core.cluster import connect as module

    monkeypatch.setattr(module, "_present", [])
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with (
        pytest.raises(MachineError, match="no Ray cluster answers"),
        connect(Executor("127.0.0.1:1")),
    ):
        pass
