"""What needs no cluster: the option, the comparison of nodes, progress that was noted elsewhere."""

import pickle
import threading

import pytest

from quantcli.core.cluster.actors import ActorLost
from quantcli.core.cluster.executor import Executor, parse_executor
from quantcli.core.cluster.relay import Heard, Relay
from quantcli.core.cluster.software import CPU, differences, software
from quantcli.core.cluster.worker import software_differs
from quantcli.core.errors import InputError
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
    with pytest.raises(InputError, match="there is no such executor"):
        parse_executor(text)


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
    message = software_differs([("10.0.0.3", found)]).what
    assert "10.0.0.3 has torch 1.0.0" in message


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
    calls = {name for name in vars(Progress) if not name.startswith("_")} - {"detailed", "keeps"}
    assert calls <= vars(Relay).keys()


def test_a_lost_actor_survives_pickling():
    error = ActorLost(3, "10.0.0.3", "it died")
    again = pickle.loads(pickle.dumps(error))
    assert (again.number, again.where) == (3, "node 10.0.0.3: it died")
