"""The driver of a conversion on a cluster: nodes write shards, and the journal is here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantcli.convert.destination import Entry
from quantcli.convert.shards import ShardRun
from quantcli.convert.spread.chunks import Edges, Finish, begin_shard, chunk_counts, chunks_of
from quantcli.convert.spread.task import Common, InChunks, Request, write
from quantcli.core.cluster.connect import connect
from quantcli.core.cluster.executor import Executor
from quantcli.core.cluster.sources import identities, see_sources
from quantcli.core.cluster.tasks import TaskOptions
from quantcli.core.errors import InputError
from quantcli.planning.files import source_files
from quantcli.planning.plan import Quantize, Shard, Work


def write_spread(run: ShardRun, plan: Work, executor: Executor, workers: int) -> None:
    """Write each shard that `begin_together` has found missing, on the nodes of a cluster.

    workers: threads of a task, which are as many CPUs of its node. MachineError if a node does not see
    the model or the output, and for several kinds of CPU if bits depend on them.
    """
    missing = run.missing
    if not missing:
        return
    with connect(executor, run.progress) as cluster:
        if sums_floats(missing):
            cluster.check_alike()
        cpus = cluster.task_cpus(workers)
        run.progress.detail(f"each task has {cpus} of the CPUs of its node")
        sources = identities(source_files(plan, missing))
        cluster.everywhere(see_sources, common=sources, progress=run.progress)
        sink = run.draft.sink.on_all()
        if sink.shared is not None:
            cluster.check_shared(sink.shared, "--out")

        tasks = _Tasks(run, missing, sink.shared, cluster.slots(cpus, spare=0))
        common = Common(plan.target, sink, cpus, run.checksum, run.block_elements, sources)
        options = TaskOptions(cpus, tasks.noun)
        cluster.run(
            write, tasks.first, common=common, options=options, done=tasks.done, progress=run.progress
        )


class _Tasks:
    """The tasks of a run. `first` are those that can begin."""

    def __init__(self, run: ShardRun, shards: Sequence[Shard], folder: Path | None, slots: int) -> None:
        self._run = run
        counts = [1] * len(shards) if folder is None else chunk_counts(shards, slots)
        self.first: list[Request] = []
        self._places: list[tuple[Shard, Path | None]] = []  # of each task, with its folder of chunks
        self._edges: dict[str, list[Edges]] = {}
        self._left: dict[str, int] = {}
        for shard, count in zip(shards, counts, strict=True):
            chunks = chunks_of(shard, count) if count > 1 else []
            if folder is None or len(chunks) < 2:
                self._add(shard, shard, None)
                continue
            own = begin_shard(folder, shard)
            for chunk in chunks:
                self._add(InChunks(chunk, own), shard, own)
            self._edges[shard.file], self._left[shard.file] = [], len(chunks)
        self.noun = "chunk" if self._left else "shard"
        for file, number in self._left.items():
            run.progress.detail(f"{file} is written in {number} chunks")

    def _add(self, request: Request, shard: Shard, folder: Path | None) -> None:
        self.first.append(request)
        self._places.append((shard, folder))

    def done(self, index: int, entry: Entry) -> list[Request]:
        """Note what a task has written. Returns the tasks that can begin now."""
        shard, folder = self._places[index]
        if folder is None:
            self._run.finished(shard.file, entry)
            return []
        self._edges[shard.file].append(entry["edges"])
        self._left[shard.file] -= 1
        if self._left[shard.file]:
            return []
        self._places.append((shard, None))
        edges = tuple(self._edges.pop(shard.file))
        return [Finish(shard.file, folder, shard.header, shard.nbytes, edges)]


def sums_floats(shards: Sequence[Shard]) -> bool:
    """Whether bits depend on the kind of CPU: those of weights that are multiplied by learned
    transforms do."""
    return any(
        isinstance(item, Quantize) and item.scheme.numerics.transform is not None
        for shard in shards
        for item in shard.items
    )


def check_spread(plan: Work) -> None:
    """InputError for a model that other processes cannot read."""
    if plan.checkpoint.in_memory:
        raise InputError(
            "a model in memory cannot be converted on a cluster",
            fix="save it, and give the folder",
        )
