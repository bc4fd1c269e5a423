"""Carry out a plan: a checkpoint that is atomic, resumable, and has the same bytes each time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from quantcli.checkpoint.checkpoint import must_be_unchanged
from quantcli.checkpoint.files import MANIFEST, PART, SIGNATURE
from quantcli.checkpoint.manifest import encode_manifest
from quantcli.checkpoint.signature.bundle import bundle_bytes, statement_bytes
from quantcli.checkpoint.signature.keys import Signer
from quantcli.convert.destination import Destination, Draft, Entry, Start
from quantcli.convert.shards import ShardRun
from quantcli.convert.spread.run import write_spread
from quantcli.convert.together import begin_together, write_together
from quantcli.core.cluster.executor import Executor
from quantcli.core.errors import AccessError, InputError, QuantError
from quantcli.core.events import SILENT, Progress
from quantcli.core.kernels.machine import announced, problem
from quantcli.core.threads import thread_pool
from quantcli.planning.files import weight_hashes
from quantcli.planning.parts import Part, part_head
from quantcli.planning.plan import Plan, Shard, Work

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
    parts:          each node of the cluster writes a part to a disk of its own.
    signer:         signs the checkpoint; None: nobody does. Needs `checksum`.
    hash_model:     record the hashes of the model's weight files, too.
    """

    workers: int
    fresh: bool = False
    force: bool = False
    checksum: bool = True
    block_elements: int | None = None
    executor: Executor | None = None
    parts: bool = False
    signer: Signer | None = None
    hash_model: bool = False


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


@dataclass(frozen=True)
class Order(Generic[W]):
    """A plan to be carried out, or a part of it.

    final: delete the draft if a value is refused: no other run could continue with it.
    name:  of the output in messages; empty if it is the only one.
    """

    plan: W
    out: Destination
    part: Part | None = None
    final: bool = False
    name: str = ""

    @property
    def shards(self) -> Sequence[Shard]:
        """What is written."""
        return self.part.shards(self.plan) if self.part else self.plan.shards


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

    An interrupted run leaves a draft, such as OUT.partial; the same call continues after its last
    whole shard. final: see `Order`. InputError for NaN or Inf in a weight and for a plan that still
    needs data, MachineError for a full or unwritable disk.
    """
    (result,) = execute_all([Order(plan, out, part, final)], options, progress)
    if isinstance(result, QuantError):
        raise result
    return result


def execute_all(
    orders: Sequence[Order[W]], options: RunOptions, progress: Progress = SILENT
) -> list[Written[W] | QuantError]:
    """Write several checkpoints of one model side by side, as `execute` would write each.

    The source is read once, as far as the plans go over it in the same order. Gives the outcome of
    each: an error of one does not stop the others.
    """
    results: dict[int, Written[W] | QuantError] = {}
    with ExitStack() as drafts:
        runs: dict[int, tuple[Order[W], ShardRun, Draft]] = {}
        for number, order in enumerate(orders):
            try:
                draft = drafts.enter_context(_begin(order, options, progress))
            except QuantError as refusal:
                results[number] = refusal
                continue
            label = f"{order.name}/" if order.name else ""
            how = options.checksum, options.block_elements, label
            runs[number] = order, ShardRun(order.plan.target, draft, progress, *how), draft
        errors = _write([(order, run) for order, run, _ in runs.values()], options, progress)
        for (number, (order, run, draft)), error in zip(runs.items(), errors, strict=True):
            results[number] = error or _finished(order, run, draft, options, progress)
            # with other credentials a run can continue
            refused = isinstance(error, InputError) and not isinstance(error, AccessError)
            if refused and order.final:
                with suppress(QuantError):  # the error that is reported is the refusal
                    draft.discard()
    return [results[number] for number in range(len(orders))]


def _begin(order: Order[Any], options: RunOptions, progress: Progress) -> Draft:
    """Open the draft of an order. InputError for a plan that still needs data."""
    plan = order.plan
    if isinstance(plan, Plan) and plan.needs_data:
        raise InputError(
            f"the inputs of {len(plan.needs_data)} modules have not been measured",
            where=f"`{plan.needs_data[0]}`",
            fix="run `quantcli calibrate` with this recipe and model first",
        )
    if options.hash_model and plan.checkpoint.in_memory:
        what = "a model in memory has no weight files, whose hashes could be recorded"
        raise InputError(what, where="hash_model=True", fix="leave hash_model out, or give a folder")
    head = run_head(plan, checksum=options.checksum)
    files = planned_files(plan, order.part, signed=options.signer is not None)
    return order.out.begin(Start(head, files, options.fresh, options.force, progress))


def _write(
    orders: Sequence[tuple[Order[W], ShardRun]], options: RunOptions, progress: Progress
) -> list[QuantError | None]:
    """Write the shards of all orders. Gives the error of each."""
    work = [(run, order.shards) for order, run in orders]
    if options.executor is not None:
        begin_together(work, progress)
        return [_spread(order, run, options.executor, options.workers) for order, run in orders]
    source = {stored.file for order, _ in orders for stored in order.plan.checkpoint.on_disk.values()}
    with thread_pool(options.workers) as pool, announced(progress.say):
        return write_together(work, source, pool, options.workers, progress)


def _spread(order: Order[W], run: ShardRun, executor: Executor, workers: int) -> QuantError | None:
    """Write the shards of an order on a cluster."""
    try:
        write_spread(run, order.plan, executor, workers)
    except QuantError as error:
        return error
    return None


def _finished(
    order: Order[W], run: ShardRun, draft: Draft, options: RunOptions, progress: Progress
) -> Written[W] | QuantError:
    """The finished checkpoint, whose shards are all there; or the error."""
    try:
        return _finish(order, run, draft, options, progress)
    except QuantError as error:
        return error


def _finish(
    order: Order[W], run: ShardRun, draft: Draft, options: RunOptions, progress: Progress
) -> Written[W]:
    """Write all but the shards, and publish the draft."""
    plan, files, checksum = order.plan, run.files, options.checksum
    if order.part is None or order.part.carries:
        for name, content in plan.sidecars.items():
            files[name] = draft.put(name, content, checksum=checksum)
        for name in plan.copies:
            files[name] = draft.copy(plan.checkpoint.path / name, name, checksum=checksum)
    head = plan.manifest()
    if options.hash_model:
        hashes = weight_hashes(plan.checkpoint, options.workers, progress)
        head["source"] = {**head["source"], "files": hashes}
    must_be_unchanged(plan.checkpoint)  # what was hashed is then what was read
    notes: tuple[str, ...] = ()
    if order.part is None:
        files = close_signed(draft, order.out.name, listing(head, files), files, options.signer)
        ours, faults = draft.verified()
        notes = (*faults, *draft.notes)
        assert not ours, f"{ours[0].check}: {ours[0].what} ({ours[0].where}), in {draft.place}"
    else:
        head = part_head(plan, order.part, head, checksum=checksum)
        draft.close_with(PART, listing(head, files), files)
    # again: OUT may exist by now, and without the journal no later run could reuse the shards
    order.out.check(plan.checkpoint.path, force=options.force)
    draft.publish()
    run.progress.keeps(f"{order.out}, which is complete", lasting=True)
    if not order.name:
        run.progress.over()
    if missing := problem():
        notes += (f"compiled kernels are not used ({missing}): the conversion takes longer",)
    return Written(order.out, files, run.reused, plan, notes)


def close_signed(
    draft: Draft, model: str, content: bytes, files: dict[str, Entry], signer: Signer | None
) -> dict[str, Entry]:
    """Write the manifest, whose bytes are `content`, and if somebody signs, the signature over it and
    all files. Gives the files, the signature among them. model: the name of the checkpoint."""
    if signer is not None:
        digests = {name: str(entry["sha256"]) for name, entry in files.items()}
        digests[MANIFEST] = hashlib.sha256(content).hexdigest()
        signature = bundle_bytes(signer.sign(statement_bytes(model, digests)))
        files = {**files, SIGNATURE: draft.put(SIGNATURE, signature, checksum=False)}
    draft.close_with(MANIFEST, content, files)
    return files


def planned_files(plan: Work, part: Part | None, *, signed: bool = False) -> list[str]:
    """The names of all files that a run writes."""
    names = [shard.file for shard in (part.shards(plan) if part else plan.shards)]
    if part is None or part.carries:
        names += [*plan.sidecars, *plan.copies]
    return [*names, PART if part else MANIFEST, *([SIGNATURE] if signed else [])]


def listing(head: dict[str, Any], files: dict[str, Entry]) -> bytes:
    """A manifest, or the description of a part, with its files."""
    return encode_manifest({**head, "files": dict(sorted(files.items()))})
