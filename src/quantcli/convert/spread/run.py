"""The driver of a conversion on a cluster: nodes write shards, and the journal is here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantcli.convert.destination import Entry
from quantcli.convert.shards import ShardRun
from quantcli.convert.spread.task import Common, identities, see_sources, write_shard
from quantcli.core.cluster.connect import connect
from quantcli.core.cluster.executor import Executor
from quantcli.core.cluster.tasks import TaskOptions
from quantcli.core.errors import InputError
from quantcli.planning.plan import Copy, Quantize, Shard, Work


@dataclass(frozen=True)
class Spread:
    """How shards are spread. workers: threads of a task, which are as many CPUs of its node."""

    executor: Executor
    workers: int


def write_spread(run: ShardRun, plan: Work, shards: Sequence[Shard], spread: Spread) -> None:
    """Write each of these shards that is not there yet, on the nodes of a cluster.

    InputError for a model in memory, MachineError if a node does not see the model or the output.
    """
    missing = run.missing(shards)
    if not missing:
        return
    with connect(spread.executor, run.progress) as cluster:
        cpus = cluster.task_cpus(spread.workers)
        run.progress.detail(f"each task has {cpus} of the CPUs of its node")
        sources = identities(sorted(_files(plan, missing)))
        cluster.everywhere(see_sources, common=sources, progress=run.progress)
        sink = run.draft.sink.on_all()
        if sink.shared is not None:
            cluster.check_shared(sink.shared, "--out")

        def done(index: int, entry: Entry) -> None:
            run.finished(missing[index].file, entry)

        common = Common(plan.target, sink, cpus, run.checksum, run.block_elements, sources)
        options = TaskOptions(cpus, "shard")
        cluster.run(
            write_shard, missing, common=common, options=options, done=done, progress=run.progress
        )


def check_spread(plan: Work) -> None:
    """InputError for a model that other processes cannot read."""
    if plan.checkpoint.in_memory:
        raise InputError(
            "a model in memory cannot be converted on a cluster",
            fix="save it, and give the folder",
        )


def _files(plan: Work, shards: Sequence[Shard]) -> set[Path]:
    """The files that tasks read."""
    return {*_weights(plan), *_calibrated(shards)}


def _weights(plan: Work) -> Iterator[Path]:
    return (plan.checkpoint.path / name for name in plan.checkpoint.shards)


def _calibrated(shards: Sequence[Shard]) -> Iterator[Path]:
    """Files of a calibration."""
    for shard in shards:
        for item in shard.items:
            edits = [] if not isinstance(item, Copy | Quantize) else [item.edit]
            if isinstance(item, Quantize):
                yield from (stored.file for stored in item.stats.values())
                edits.append(item.bias_edit)
            for edit in filter(None, edits):
                parts = (edit.rows, edit.columns, edit.value)
                yield from (stored.file for stored in parts if stored is not None)
