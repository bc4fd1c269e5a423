"""Carry out a plan: a checkpoint that is atomic, resumable, and has the same bytes each time."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from quantcli.checkpoint.checkpoint import must_be_unchanged
from quantcli.checkpoint.files import MANIFEST, PART
from quantcli.checkpoint.manifest import encode_manifest
from quantcli.convert.destination import Destination, Entry, Start
from quantcli.convert.shards import ShardRun
from quantcli.convert.spread.run import Spread, write_spread
from quantcli.core.cluster.executor import Executor
from quantcli.core.errors import InputError, QuantError
from quantcli.core.events import SILENT, Progress
from quantcli.core.kernels.machine import announced, problem
from quantcli.core.threads import thread_pool
from quantcli.planning.parts import Part, part_head
from quantcli.planning.plan import Plan, Work

P = TypeVar("P")
W = TypeVar("W", bound=Work)


@dataclass(frozen=True)
class RunOptions:
    """How a plan is carried out; none of it changes a byte of the weights.

    workers:        threads that convert.
    fresh:          start again, without what an interrupted run left.
    force:          replace an output that exists.
    checksum:       hash every file for the manifest.
    block_elements: elements of a row block; None: see `elements_of`.
    executor:       the cluster whose nodes write shards; None: threads of this process do.
    """

    workers: int
    fresh: bool = False
    force: bool = False
    checksum: bool = True
    block_elements: int | None = None
    executor: Executor | None = None


@dataclass(frozen=True)
class Written(Generic[P]):
    """A finished checkpoint. plan: what was carried out; None for parts that were joined."""

    out: Destination
    files: dict[str, Entry]  # name -> {"bytes": n, "sha256": hex or None}
    shards_reused: int  # of an interrupted run
    plan: P
    notes: tuple[str, ...]  # faults that the source has too, and why it took longer

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(int(entry["bytes"]) for entry in self.files.values())


def run_head(plan: Work, *, checksum: bool) -> dict[str, Any]:
    """The head of the journal: a later run continues with these shards only if it has the same."""
    source = {shard: list(plan.checkpoint.stamps[shard]) for shard in plan.checkpoint.shards}
    return {"plan": plan.digest, "checksum": checksum, "source": source}


def execute(
    plan: W,
    out: Destination,
    options: RunOptions,
    *,
    progress: Progress = SILENT,
    part: Part | None = None,
    final: bool = False,
) -> Written[W]:
    """Write the planned checkpoint, or a part of it, to `out`, which appears whole or not at all.

    An interrupted run leaves `out`.partial; the same call continues after its last whole shard.
    final: delete `out`.partial if a value is refused: no other run could continue with it.
    InputError for NaN or Inf in a weight and for a plan that still needs data, MachineError for a full
    or unwritable disk.
    """
    if isinstance(plan, Plan) and plan.needs_data:
        raise InputError(
            f"the inputs of {len(plan.needs_data)} modules have not been measured",
            where=f"`{plan.needs_data[0]}`",
            fix="run `quantcli calibrate` with this recipe and model first",
        )
    checksum = options.checksum
    head = run_head(plan, checksum=checksum)
    start = Start(head, planned_files(plan, part), options.fresh, options.force, progress)
    draft = out.begin(start)
    useless = False
    try:
        run = ShardRun(plan.target, draft, progress, checksum, options.block_elements)
        try:
            shards = part.shards(plan) if part else plan.shards
            if options.executor is None:
                with thread_pool(options.workers) as pool, announced(progress.say):
                    run.write(shards, pool, options.workers)
            else:
                write_spread(run, plan, shards, Spread(options.executor, options.workers))
        except InputError:
            useless = final
            raise
        files = run.files
        if part is None or part.carries:
            for name, content in plan.sidecars.items():
                files[name] = draft.put(name, content, checksum=checksum)
            for name in plan.copies:
                files[name] = draft.copy(plan.checkpoint.path / name, name, checksum=checksum)
        must_be_unchanged(plan.checkpoint)
        head = plan.manifest()
        notes: tuple[str, ...] = ()
        if part is None:
            draft.close_with(MANIFEST, listing(head, files), files)
            ours, faults = draft.verified()
            notes = (*faults, *draft.notes)
            assert not ours, f"{ours[0].check}: {ours[0].what} ({ours[0].where}), in {draft.place}"
        else:
            head = part_head(plan, part, head, checksum=checksum)
            draft.close_with(PART, listing(head, files), files)
        # again: OUT may exist by now, and without the journal no later run could reuse the shards
        out.check(plan.checkpoint.path, force=options.force)
        draft.publish()
    finally:
        if useless:
            with suppress(QuantError):  # the error that is reported is the refusal
                draft.discard()
        draft.close()
    if missing := problem():
        notes += (f"compiled kernels are not used ({missing}): the conversion takes longer",)
    return Written(out, files, run.reused, plan, notes)


def planned_files(plan: Work, part: Part | None) -> list[str]:
    """The names of all files that a run writes."""
    names = [shard.file for shard in (part.shards(plan) if part else plan.shards)]
    if part is None or part.carries:
        names += [*plan.sidecars, *plan.copies]
    return [*names, PART if part else MANIFEST]


def listing(head: dict[str, Any], files: dict[str, Entry]) -> bytes:
    """A manifest, or the description of a part, with its files."""
    return encode_manifest({**head, "files": dict(sorted(files.items()))})
