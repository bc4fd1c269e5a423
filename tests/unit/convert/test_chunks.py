"""A shard in chunks: any number of tasks, in any order, write the bytes that one run writes."""

import pickle

import pytest

from quantcli.commands.quantize import plan, quantize
from quantcli.convert.folder import FolderSink
from quantcli.convert.queue import ordered_jobs
from quantcli.convert.spread import chunks
from quantcli.convert.spread.chunks import Finish, begin_shard, chunk_counts, chunks_of
from quantcli.convert.spread.task import Common, InChunks, write
from quantcli.core.disk import file_entry
from quantcli.core.events import SILENT
from quantcli.planning import block
from tests.e2e.conftest import RECIPE, make_llama

FILE = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A conversion of 4 MB, and what it writes. Its jobs are small, so that there are many."""
    folder = tmp_path_factory.mktemp("chunks")
    (folder / "recipe.yaml").write_text(RECIPE)
    model = make_llama(folder / "model", layers=2, side=384)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "JOB_BYTES", 50_000)
        job = plan(folder / "recipe.yaml", model=str(model), out=folder / "out")
        quantize(job)
        yield job


@pytest.fixture
def task(job, tmp_path):
    """Does a task of the conversion into a folder."""
    common = Common(job.plan.target, FolderSink(tmp_path), 2, True, None, {})

    def do(request):
        return write(common, pickle.loads(pickle.dumps(request)), SILENT)

    return do


def test_chunks_in_any_order_make_the_file_of_one_run(job, task, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "EXTENT", 2**16)
    (shard,) = job.plan.shards
    parts = chunks_of(shard, 7)
    assert len(parts) == 7
    assert sum(len(ordered_jobs(part)) for part in parts) == len(ordered_jobs(shard)) > 70
    folder = begin_shard(tmp_path, shard)
    done = [task(InChunks(part, folder))["edges"] for part in parts[::-1]]
    task(InChunks(parts[3], folder))  # again, as after the loss of its node
    for edges in done:
        assert sum(n for _, n in edges.places) < edges.nbytes  # most went to its place
    finish = Finish(shard.file, folder, shard.header, shard.nbytes, tuple(done))
    whole = job.out.folder / FILE
    entry = task(finish)
    assert entry == file_entry(whole, checksum=True)
    assert (tmp_path / FILE).read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert task(finish) == entry  # after a process that had done it could not report it


def test_a_shard_that_misses_bytes_is_not_finished(job, task, tmp_path):
    (shard,) = job.plan.shards
    first, *_ = parts = chunks_of(shard, 3)
    folder = begin_shard(tmp_path, shard)
    edges = tuple(task(InChunks(part, folder))["edges"] for part in parts if part is not first)
    with pytest.raises(AssertionError):
        task(Finish(shard.file, folder, shard.header, shard.nbytes, edges))
    assert not (tmp_path / FILE).exists()


def test_a_whole_shard_replaces_what_other_attempts_have_left(job, task, tmp_path):
    (shard,) = job.plan.shards
    begin_shard(tmp_path, shard)
    entry = task(shard)
    assert entry == file_entry(job.out.folder / FILE, checksum=True)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_shards_are_cut_only_if_there_are_few_of_them(job, monkeypatch):
    (shard,) = job.plan.shards
    assert chunk_counts([shard], 100) == [1]  # too small
    monkeypatch.setattr(chunks, "LEAST", 1)
    assert chunk_counts([shard], 1) == [1]
    assert chunk_counts([shard], 3) == [3]
    assert chunk_counts([shard] * 8, 24) == [3] * 8
    assert chunk_counts([shard] * 8, 16) == [2] * 8
    assert chunk_counts([shard] * 8, 15) == [1] * 8
    assert chunk_counts([shard] * 500, 3) == [1] * 500
