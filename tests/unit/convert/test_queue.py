"""The order in which the jobs of a run are handed out, and what happens after one failed."""

import pytest

from quantcli.commands import quantize as commands
from quantcli.convert.folder import FolderSink
from quantcli.convert.queue import JobQueue
from quantcli.core.extents import ExtentFile
from tests.e2e.conftest import make_llama

RECIPE = """\
target: ascend
rules: [{match: "*_proj", scheme: w8a8_dynamic}]
max_shard: 20KB
"""


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setattr("quantcli.planning.block.JOB_BYTES", 2048)
    model, recipe = make_llama(tmp_path / "m", side=64), tmp_path / "r.yaml"
    recipe.write_text(RECIPE)
    shards = commands.plan(recipe, model=str(model), out=tmp_path / "out").plan.shards
    assert len(shards) > 2
    return shards


def taken(queue):
    tasks = []
    while (task := queue.take()) is not None:
        tasks.append(task)
        if queue.done(task):
            queue.finished(task.shard)
            task.shard.writer.abandon()
    return tasks


def test_jobs_come_in_the_order_of_the_files(tmp_path, shards):
    queue = JobQueue(shards, FolderSink(tmp_path), 3, checksum=False)
    tasks = taken(queue)
    queue.close()
    assert [task.number for task in tasks] == list(range(len(tasks)))
    places = []
    for task in tasks:
        file = task.shard.shard
        names = [spec.name for spec in file.tensors]
        first = min(names.index(output.spec.name) for output in task.job.item.outputs)
        places.append((shards.index(file), first, task.job.start))
    assert places == sorted(places)
    assert len({(file, first) for file, first, _ in places}) < len(places), "some have several jobs"
    rows = sum(task.job.stop - task.job.start for task in tasks)
    assert rows == sum(item.height for shard in shards for item in shard.items)


def test_each_job_is_announced_at_most_once(tmp_path, shards):
    queue = JobQueue(shards, FolderSink(tmp_path), 1, checksum=False)
    tasks = taken(queue)
    queue.close()
    announced = [id(job) for task in tasks for job in task.later]
    assert len(announced) == len(set(announced)) == len(tasks) - len(shards)


def test_a_shard_whose_hash_is_behind_lets_the_next_one_begin(tmp_path, shards, monkeypatch):
    monkeypatch.setattr(ExtentFile, "backlog", 100)
    queue = JobQueue(shards, FolderSink(tmp_path), 2, checksum=True)
    tasks = [queue.take() for _ in range(3)]
    queue.close()
    assert [shards.index(task.shard.shard) for task in tasks] == [0, 1, 0]


def test_after_a_failure_only_jobs_before_it_are_handed_out(tmp_path, shards, monkeypatch):
    """Whatever order jobs fail in, the error of the first one is raised."""
    monkeypatch.setattr(ExtentFile, "backlog", 100)
    queue = JobQueue(shards, FolderSink(tmp_path), 2, checksum=True)
    first, other = queue.take(), queue.take()
    assert first.number == 0 < other.number
    queue.fail(other, ValueError("later"))
    assert queue.is_in_vain(other) is False
    between = queue.take()
    assert between.number == 1
    queue.fail(between, ValueError("sooner"))
    assert queue.is_in_vain(other)
    assert not queue.is_in_vain(first)
    assert queue.take() is None
    assert str(queue.error) == "sooner"
    queue.close()


def test_without_memory_one_job_at_a_time_is_handed_out(tmp_path, shards, monkeypatch):
    """A worker waits until another one has left its job; the last one gets a job all the same."""
    monkeypatch.setattr(FolderSink, "in_memory", True)
    queue = JobQueue(shards, FolderSink(tmp_path), 2, checksum=False)
    tasks, waits = [queue.take(), queue.take()], []
    while queue._buffers.take() is not None:
        pass

    def wait():  # in place of another worker
        waits.append(len(tasks))
        queue.let_go()

    monkeypatch.setattr(queue._lock, "wait", wait)
    tasks.append(queue.take())
    assert waits == [2, 2]
    queue.let_go()
    tasks.append(queue.take())
    assert [task.number for task in tasks] == [0, 1, 2, 3]
    assert waits == [2, 2]
    queue.close()
