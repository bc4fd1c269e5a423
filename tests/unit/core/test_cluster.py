"""What needs no cluster: the option, the comparison of nodes, progress that was noted elsewhere."""

import pickle
import socket
import threading

import pytest

from quantcli.core.cluster import cluster as module
from quantcli.core.cluster.cluster import Cluster, Node
from quantcli.core.cluster.connect import _answers
from quantcli.core.cluster.executor import Executor, parse_executor
from quantcli.core.cluster.relay import Heard, Relay
from quantcli.core.cluster.software import CPU, differences, software
from quantcli.core.cluster.worker import Place, Result, check_cpu, name_node, software_differs
from quantcli.core.errors import AccessError, InputError, MachineError
from quantcli.core.events import Progress


@pytest.mark.parametrize(
    ("text", "executor"),
    [
        ("threads", None),
        ("ray", Executor()),
        ("ray:local", Executor("local")),
        ("ray:10.0.0.1:6379", Executor("10.0.0.1:6379")),
        ("ray:head-1.cluster:6379", Executor("head-1.cluster:6379")),
        ("ray:[fd00::1]:6379", Executor("[fd00::1]:6379")),
    ],
)
def test_the_option_names_an_executor(text, executor):
    assert parse_executor(text) == executor
    assert str(executor or "threads") == text


@pytest.mark.parametrize(
    "text", ["", "Ray", "ray:", "ray:10.0.0.1", "ray:host:0", "ray:host:65536", "ray:a b:1", "dask"]
)
def test_an_option_that_names_none(text):
    with pytest.raises(InputError) as caught:
        parse_executor(text)
    assert caught.value.what == f"`{text}` is not an executor"
    assert caught.value.fix == "give threads, ray, ray:local, or ray:HOST:PORT"


def test_addresses_of_ray_client_are_refused_with_another_way():
    with pytest.raises(InputError, match="Ray Client") as caught:
        parse_executor("ray:ray://10.0.0.1:10001")
    assert "ray job submit" in caught.value.fix


def test_software_that_differs_is_named_with_both_versions():
    here = software()
    there = {**here, "torch": "1.0.0", CPU: "another"}
    del there["numpy"]
    found = differences(here, there)
    assert found == [f"torch 1.0.0, not {here['torch']}", f"numpy none, not {here['numpy']}"]
    assert differences(here, {**here, CPU: "another"}) == []
    nodes = [("10.0.0.3", found[:1])] * 3 + [("10.0.0.4", found[1:])]
    assert software_differs(nodes).partition(": ")[2] == (
        f"10.0.0.3 has torch 1.0.0, not {here['torch']}; 10.0.0.4 has numpy none, not {here['numpy']}"
    )


class Calls(Progress):
    def __init__(self):
        self.nbytes, self.calls = 0, []

    def say(self, text):
        self.calls.append(("say", text))

    def advance(self, nbytes):
        self.nbytes += nbytes

    def step(self, done, total, *, noun="batch", tokens=0, loss=None):
        self.calls.append((done, total, noun))


def test_noted_calls_are_made_again_and_bytes_are_added_up():
    relay, calls = Relay(detailed=False), Calls()
    threads = [threading.Thread(target=relay.advance, args=(100,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    relay.say("one")
    relay.step(1, 2, noun="epoch")
    noted = pickle.loads(pickle.dumps(relay.take()))
    assert relay.take() == []
    heard = Heard(calls)
    assert heard.make(noted) == calls.nbytes == 800
    assert calls.calls == [("say", "one"), (1, 2, "epoch")]


def test_a_message_of_several_nodes_is_said_once_and_lost_bytes_are_taken_back():
    calls = Calls()
    heard = Heard(calls)
    for _ in range(3):
        heard.make([("say", ("compiling",), {}), ("advance", (10,), {})])
    heard.take_back(10)
    assert calls.calls == [("say", "compiling")]
    assert calls.nbytes == 20


def test_every_call_of_a_progress_is_noted():
    calls = {name for name in vars(Progress) if not name.startswith("_")} - {
        "detailed",
        "keeps",
        "over",
    }
    assert calls <= vars(Relay).keys()


@pytest.mark.parametrize(
    ("answer", "is_grpc"),
    [
        (bytes([0, 0, 24, 4, 0, 0, 0, 0, 0]) + bytes(24), True),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", False),
        (b"", False),
    ],
)
def test_only_a_server_of_grpc_counts_as_an_answer(answer, is_grpc):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        assert _answers(f"127.0.0.1:{server.getsockname()[1]}") == is_grpc
        thread.join()


@pytest.mark.parametrize(
    ("error", "where", "fix"),
    [
        (
            AccessError("none", where="s3://a/b", fix="set KEY"),
            "s3://a/b on node 10.0.0.3",
            "there, before Ray is started: set KEY",
        ),
        (MachineError("full"), "node 10.0.0.3", None),
        (MachineError("gone", where="node 10.0.0.4: it died"), "node 10.0.0.4: it died", None),
        (InputError("NaN", where="a.weight"), "a.weight", None),
    ],
)
def test_an_error_that_other_machines_may_not_have_names_its_node(error, where, fix):
    name_node(error, "10.0.0.3")
    again = pickle.loads(pickle.dumps(error))
    assert (again.where, again.fix) == (where, fix)


class Told:
    """Messages of a task that end at once."""

    nbytes = 0

    def __init__(self, index, outcome, place=None):
        self.index, self.outcome, self.place = index, outcome, place
        self.cancelled = False

    def read(self, heard):
        return self.outcome

    def cancel(self):
        self.cancelled = True


def test_a_node_that_has_begun_may_be_silent_and_one_that_has_not_is_named(monkeypatch):
    nodes = [Node("a", "10.0.0.3", 1), Node("b", "10.0.0.4", 1)]
    place = Place("a", "10.0.0.3", 1)

    def everywhere(*places):
        found = iter([False, True])
        monkeypatch.setattr(module, "ready", lambda streams, _: [*streams] if next(found) else [])
        told = [Told(index, Result(index), place) for index, place in enumerate(places)]
        return Cluster("three")._all(nodes, told.__getitem__, Heard(Calls()))

    assert everywhere(place, place) == {0: 0, 1: 1}
    with pytest.raises(MachineError, match="does not work") as caught:
        everywhere(place, None)
    assert caught.value.where == "node 10.0.0.4: no answer in 120 s"


def test_nodes_of_one_kind_stay_so(monkeypatch):
    monkeypatch.setattr("quantcli.core.cluster.worker.node_address", lambda: "10.0.0.5")
    cluster, own = Cluster("three"), software()[CPU]
    monkeypatch.setattr(cluster, "_ask", lambda: ())
    cluster._cpus = {"10.0.0.3": own, "10.0.0.4": own}
    assert cluster.setting(Progress()).cpu is None
    check_cpu(None)
    cluster.check_alike()
    check_cpu(cluster.setting(Progress()).cpu)
    with pytest.raises(MachineError, match="several kinds of CPU") as caught:
        check_cpu("another")
    assert caught.value.where == f"node 10.0.0.5 has {own}, the others another"
    cluster._cpus["10.0.0.4"] = "another"
    with pytest.raises(MachineError, match="several kinds of CPU") as caught:
        cluster.check_alike()
    assert "10.0.0.4 has another" in caught.value.where
