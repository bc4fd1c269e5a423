"""A Ray cluster of this machine. `make test-ray` has more: several nodes, and how they fail."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.convert.shards import ShardRun
from quantcli.convert.spread.run import check_spread, sums_floats, write_spread
from quantcli.core.cluster import tasks
from quantcli.core.cluster.connect import connect
from quantcli.core.cluster.executor import Executor
from quantcli.core.cluster.sources import check_sources, identities
from quantcli.core.cluster.tasks import TaskOptions, TaskRun
from quantcli.core.cluster.worker import Failure, Result
from quantcli.core.errors import InputError, MachineError
from quantcli.core.events import SILENT
from quantcli.planning.planner import make_plan
from quantcli.recipe.recipe import load_recipe
from quantcli.recipe.shipped import find_recipe
from tests import ray_work
from tests.builders import pack
from tests.e2e.conftest import Box, snapshot
from tests.unit.core.test_cluster import Calls, Told

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


def test_a_later_result_that_comes_with_an_error_is_dropped(cluster, monkeypatch):
    monkeypatch.setattr(tasks, "ready", lambda streams, seconds: [*streams])
    run = TaskRun(cluster, ray_work.multiply, None, TaskOptions(), SILENT)
    first, later = Told(1, Failure(InputError("no"), "")), Told(2, Result(2))
    run._live = [first, later]
    pending = [3, 0]
    assert run._finished(pending) == []
    assert later.cancelled
    assert (run._live, pending, [*run._errors]) == ([], [0], [1])


def test_a_request_whose_process_dies_is_done_again(cluster, tmp_path):
    calls = Calls()
    mark = str(tmp_path / "mark")
    assert cluster.run(ray_work.die_once, range(4), common=mark, progress=calls) == [0, 1, 2, 3]
    assert calls.nbytes == 40  # those of the process that died were taken back
    ((_, said),) = calls.calls
    assert said.startswith("a process on node")
    assert "has died: 1 task is done again" in said


def test_a_folder_is_shared_if_all_nodes_write_there(cluster, tmp_path):
    cluster.check_shared(tmp_path / "new" / "folder", "--out")
    assert list(tmp_path.iterdir()) == []
    cluster.check_alike()


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


def test_only_learned_transforms_need_nodes_of_one_kind(cluster, monkeypatch):
    def planned(recipe):
        model = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
        return make_plan(load_recipe(find_recipe(recipe)), open_checkpoint(model))

    monkeypatch.setattr(cluster, "_cpus", {"10.0.0.3": "x86_64 AVX2", "10.0.0.4": "x86_64 AMX"})
    learned = planned("w4a4_flatquant")
    run = SimpleNamespace(missing=learned.shards, progress=SILENT)
    with pytest.raises(MachineError, match="several kinds of CPU"):
        write_spread(run, learned, LOCAL, 1)
    assert not sums_floats(planned("w8a8_static_smooth").shards)


SHARDED = ("--set", "max_shard=1200")
ON_RAY = (*SHARDED, "--executor", "ray:local", "--workers", 1)


def test_a_conversion_by_tasks_has_the_bytes_of_one_by_threads(cluster, box, monkeypatch):
    threads = Box(box.root, box.model, box.recipe, box.root / "threads")
    assert threads.run(*SHARDED).code == 0
    monkeypatch.chdir(box.root)  # tasks have another working directory
    relative = Box(box.root, box.model, box.recipe, box.out.relative_to(box.root))
    result = relative.run(*ON_RAY)
    assert result.code == 0, result.err
    assert result.err.count("shard ") == 5
    assert snapshot(box.out) == snapshot(threads.out)


def test_what_an_interrupted_run_of_tasks_leaves_is_used_by_threads(cluster, box, monkeypatch):
    finished = ShardRun.finished

    def interrupted(run, file, entry):
        finished(run, file, entry)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardRun, "finished", interrupted)
        result = box.run(*ON_RAY)
    assert result.code == 130
    assert "kept: 1 of 5 shards" in result.err
    assert cluster.run(ray_work.refuse, [1]) == [1]  # the tasks are gone, the cluster is not
    result = box.run(*SHARDED, "--json")
    assert result.json["shards_reused"] == 1
    threads = Box(box.root, box.model, box.recipe, box.root / "threads")
    assert threads.run(*SHARDED).code == 0
    assert snapshot(box.out) == snapshot(threads.out)


def test_a_refused_value_is_reported_as_by_threads(cluster, box):
    weights = box.model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-34:-32] = b"\xc0\x7f"  # NaN at the end of down_proj, before a norm of 16 values
    weights.write_bytes(content)
    failed = [box.run("--fresh", *options) for options in (SHARDED, ON_RAY)]
    errors = [result.err[result.err.index("error: ") :] for result in failed]
    assert [result.code for result in failed] == [2, 2]
    assert "weight is nan" in errors[0]
    assert errors[0] == errors[1]


def test_a_source_that_nodes_see_differently_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(pack({}, b"12"))
    sources = identities([file])
    check_sources(dict(sources))
    file.write_bytes(pack({}, b"123"))
    with pytest.raises(MachineError, match="is another one on a node"):
        check_sources(dict(sources))
    file.unlink()
    with pytest.raises(MachineError, match="cannot be read: No such file"):
        check_sources(dict(sources))


def test_a_model_in_memory_stays_with_threads():
    checkpoint = SimpleNamespace(in_memory=True)
    with pytest.raises(InputError, match="in memory"):
        check_spread(SimpleNamespace(checkpoint=checkpoint))
