"""A planned conversion: what would be done, where, and what it would cost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.checkpoint.encoded import decoded_kinds
from quantcli.checkpoint.hub import HUB_ID, Pending, display_name, find_model, locate
from quantcli.core.cluster.executor import TASK_WORKERS, Executor
from quantcli.core.errors import InputError
from quantcli.core.memory.shortage import check_memory
from quantcli.core.text import count
from quantcli.core.threads import default_workers
from quantcli.core.untrusted.names import utf8_fault

if TYPE_CHECKING:
    from quantcli.calibration.session import Session
    from quantcli.checkpoint.signature.keys import Signer
    from quantcli.convert.destination import Destination, Room
    from quantcli.convert.execute import RunOptions, Written
    from quantcli.core.events import Progress
    from quantcli.planning.parts import Part
    from quantcli.planning.plan import Plan, Shard, Work
    from quantcli.recipe.written import GivenRecipe, WrittenRecipe
    from quantcli.targets.serving import ServeCommand

W = TypeVar("W", bound="Work")


@dataclass(frozen=True)
class Job(Generic[W]):
    """A conversion that was planned and would be accepted: the plan, its place and its cost."""

    plan: W
    out: Destination
    options: RunOptions
    room: Room | None  # on a disk of this machine; None if none is needed
    memory: int  # bytes above a bare torch import, estimated
    shards_done: int  # whole shards that an interrupted run left
    session: Session | None = None  # the calibration, if the recipe needs one
    part: Part | None = None  # of the shards that this machine writes; None: all
    download: Download[W] | None = None  # of the model, before the conversion

    @property
    def shards(self) -> tuple[Shard, ...]:
        """What this job writes."""
        return self.part.shards(self.plan) if self.part else self.plan.shards

    @property
    def nbytes(self) -> int:
        """Bytes of what this job writes, without the manifest."""
        return self.part.nbytes(self.plan) if self.part else self.plan.nbytes

    @property
    def serve(self) -> tuple[ServeCommand, ...]:
        """The commands that serve the checkpoint."""
        commands = self.plan.target.serve(self.plan.served, self.out.served_as)
        flags = self.out.serve_flags
        return tuple(replace(command, words=(*command.words, *flags)) for command in commands)


@dataclass(frozen=True)
class Download(Generic[W]):
    """Files of the model that the Hub's cache does not have. job: makes the job of the folder there."""

    pending: Pending
    job: Callable[[Checkpoint], Job[W]]


@dataclass(frozen=True)
class JobOptions:
    """How a conversion is to be run.

    workers:     threads, on a cluster those of a task; None: one for each core, or a few.
    fresh:       delete what an interrupted run left.
    force:       replace an output that exists.
    checksum:    hash every file for the manifest.
    calibration: the folder of a calibration to use or to make; None: OUT.calibration.
    part:        as in "2/3"; it goes to OUT.part-2-of-3. "nodes": each node of the cluster writes one.
    executor:    the cluster whose nodes write; None: threads of this process.
    signer:      signs the output; None leaves it unsigned. InputError if there are no hashes to sign.
    hash_model:  record the hashes of the model's weight files; InputError without `checksum`.
    trust_remote_code: the model's own code may run, which a rotation is planned with.
    """

    workers: int | None = None
    fresh: bool = False
    force: bool = False
    checksum: bool = True
    calibration: Path | None = None
    part: str | None = None
    executor: Executor | None = None
    signer: Signer | None = None
    hash_model: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.signer is not None and self.part is not None:
            what = "a part is not signed: the checkpoint is, when its parts are joined"
            fix = "give --sign to `quantcli pack --merge`"
            raise InputError(what, where=f"--part {self.part}", fix=fix)
        if self.hash_model and self.part is not None:
            what = "--hash-model reads all of the model, and a part only its share"
            raise InputError(what, where=f"--part {self.part}", fix="leave one of them out")
        asked = {"--sign": self.signer is not None, "--hash-model": self.hash_model}
        refused = [] if self.checksum else [option for option, is_asked in asked.items() if is_asked]
        if refused:
            what = f"{refused[0]} needs the hashes that --no-checksum leaves out"
            raise InputError(what, fix="leave one of them out")

    def of_run(self) -> RunOptions:
        """The options of the run itself."""
        from quantcli.convert.execute import RunOptions
        from quantcli.planning.parts import ON_NODES

        workers = self.workers or default_workers()
        if self.executor is not None and self.workers is None:
            workers = min(workers, TASK_WORKERS)
        parts = self.part == ON_NODES
        how = self.fresh, self.force, self.checksum
        return RunOptions(
            workers,
            *how,
            executor=self.executor,
            parts=parts,
            signer=self.signer,
            hash_model=self.hash_model,
        )


USUAL = JobOptions()


def signer_of(key: str | os.PathLike[str] | None) -> Signer | None:
    """What signs; None for nobody. InputError for a file without a private key."""
    from quantcli.checkpoint.signature.keys import load_signer

    return None if key is None else load_signer(Path(key))


def make_job(
    plan: W,
    out: Destination,
    options: RunOptions,
    session: Session | None = None,
    part: Part | None = None,
) -> Job[W]:
    """The job of a plan whose `out` was accepted. MachineError if the disk is too small for it, and
    InputError if an unfinished run of something else is in its place."""
    from quantcli.convert.execute import run_head
    from quantcli.convert.shards import memory_estimate

    unknown = options.fresh or (session is not None and not session.complete)
    head = None if unknown else run_head(plan, checksum=options.checksum)
    done = out.done(head)
    shards = [shard.nbytes for shard in (part.shards(plan) if part else plan.shards)]
    room = None
    if not options.parts:  # else it is the disks of the nodes that matter
        room = out.room(shards, (part.nbytes(plan) if part else plan.nbytes) - sum(shards))
    memory = memory_estimate(plan, options.workers) + out.memory(plan.shards)
    if options.executor is None:
        check_memory(memory, f"this conversion with {count(options.workers, 'worker')}")
    return Job(plan, out, options, room, memory, done, session, part)


def accepted_place(
    whole: Destination, options: JobOptions, model: Path
) -> tuple[Destination, Part | None]:
    """Where a job writes, and its part if it writes one. whole: the place of the whole checkpoint.

    InputError or MachineError for a place that it could not or must not write.
    """
    from quantcli.planning.parts import ON_NODES, Part, check_on_nodes, parse_part

    place, share = whole, None
    if options.part == ON_NODES:
        check_on_nodes(options.executor)
        whole.part(Part(1, 1))  # InputError if it takes none
    elif options.part is not None:
        share = parse_part(options.part)
        place = whole.part(share)
    if options.part is not None:
        whole.check(model, force=True)  # it need not be free yet
    if options.part != ON_NODES:
        place.check(model, force=options.force)
    return place, share


def needless(option: str, value: object) -> InputError:
    """The error of a calibration for a recipe that needs none."""
    what = "nothing in this recipe needs a calibration"
    return InputError(what, where=f"{option} {value}".strip(), fix=f"leave {option} out")


def with_model(job: Job[W], progress: Progress | None) -> Job[W]:
    """The job of a model on this machine: what is missing of it is fetched first."""
    from quantcli.core.events import SILENT

    if job.download is None:
        return job
    pending, progress = job.download.pending, progress or SILENT
    return job.download.job(_open(pending.given, pending.fetch(progress), progress))


def run_job(job: Job[W], progress: Progress | None, *, final: bool = False) -> Written[W]:
    """Carry out a job. Interrupted, the same job continues where it stopped."""
    from quantcli.convert.execute import execute
    from quantcli.core.events import SILENT

    if job.options.parts:
        from quantcli.convert.spread.parts import write_parts

        return write_parts(job.plan, job.out, job.options, progress or SILENT)
    return execute(
        job.plan, job.out, job.options, progress=progress or SILENT, part=job.part, final=final
    )


def job_json(job: Job[Any]) -> dict[str, Any]:
    """What every planned job has, as JSON-able data."""
    plan = job.plan
    return {
        "out": str(job.out),
        "target": plan.target.name,
        "serving_dtype": plan.serving_dtype,
        "digest": plan.digest,
        "bytes_before": plan.checkpoint.nbytes,
        "bytes_after": plan.weight_nbytes,
        "shards": [{"file": s.file, "bytes": s.nbytes, "tensors": len(s.tensors)} for s in plan.shards],
        "files": sorted([*plan.sidecars, *plan.copies]),
        "disk_needed": 0 if job.room is None else job.room.needed,
        "disk_free": None if job.room is None else job.room.free,
        "memory_needed": job.memory,
        "workers": job.options.workers,
        "shards_done": job.shards_done,
        "download": 0 if job.download is None else job.download.pending.nbytes,
        "serve": [command.to_json() for command in job.serve],
        "notes": list(plan.notes),
    }


def to_json(job: Job[Plan]) -> dict[str, Any]:
    """A planned job as JSON-able data."""
    from quantcli.planning.planner import compare_expected

    plan = job.plan
    return {
        "model": display_name(plan.checkpoint.path),
        **job_json(job),
        "rules": [
            {
                "rule": f"rules.{line.number - 1}",
                "scheme": line.scheme,
                "label": line.label,
                "modules": line.modules,
                "bytes_before": line.nbytes_before,
                "bytes_after": line.nbytes_after,
                "loads_on": line.loads_on,
            }
            for line in plan.rules
        ],
        "kept": [
            {
                "reason": k.reason,
                "tensors": k.tensors,
                "bytes_before": k.nbytes_before,
                "bytes": k.nbytes,
                "names": k.names,
                "linear_params": k.linears,
                "quantizable_params": k.quantizable,
            }
            for k in plan.kept
        ],
        "kv_cache": None
        if plan.cache is None
        else {
            "cache": str(plan.cache.cache),
            "layers": list(plan.cache.layers),
            "measured": plan.cache.measured,
            "bytes": plan.cache_nbytes,
        },
        "quantized_params_pct": round(plan.quantized_params_pct, 4),
        "quantizable_pct": round(plan.coverage.quantizable_pct, 4),
        "linear_pct": round(plan.coverage.linear_pct, 4),
        "quantized_modules": plan.quantized_modules,
        "expected": [asdict(expected) for expected in compare_expected(plan)],
        "decoded": decoded_kinds(plan.checkpoint.tensors.values()),
        "rotation": plan.checkpoint.rotation,
        "calibration": None if job.session is None else describe(job.session),
        "experts": dict(plan.experts),
        "taken_from": dict(plan.taken_from),
        "part": None
        if job.part is None
        else {
            "part": job.part.number,
            "of": job.part.of,
            "shards": [shard.file for shard in job.shards],
            "files": sorted([*plan.sidecars, *plan.copies]) if job.part.carries else [],
            "bytes": job.nbytes,
        },
    }


def describe(session: Session) -> dict[str, Any]:
    """A calibration that was planned, as JSON-able data."""
    methods = [method.name for method in session.plan.recipe.methods]
    return {
        "folder": str(session.folder),
        "complete": session.complete,
        "layers_done": session.layers_done,
        "data": session.source.data,
        "samples": session.source.samples,
        "length": session.source.length,
        "modules": list(session.plan.measured),
        "smooth": "smooth" in methods,
        "methods": methods,
    }


def with_text(overrides: tuple[str, ...], data: str | None) -> tuple[str, ...]:
    """Changes of a recipe, and the text of --data, which wins over them. InputError for a name that is
    not UTF-8."""
    if data is None:
        return overrides
    if (fault := utf8_fault(data)) is not None:
        fix = "give the file another name: the manifest of the output holds it"
        raise InputError(f"the name of the text {fault}", where="--data", fix=fix)
    return (*overrides, f"calibration.data={json.dumps(data)}")


@dataclass(frozen=True)
class Opened:
    """A recipe and a model that were read, and the name of the model as it was given.

    pending: what of the model is still to be fetched, if its headers alone were read.
    """

    written: WrittenRecipe
    model: str
    checkpoint: Checkpoint
    pending: Pending | None = None


def open_both(
    recipe: GivenRecipe,
    model: str | Checkpoint | None,
    overrides: tuple[str, ...],
    verb: str,
    progress: Progress,
    *,
    headers: bool = False,
) -> Opened:
    """Read a recipe and open the model. InputError for what is wrong without schemes and targets, which
    need torch.

    headers: do not fetch a model of the Hub: its headers do for now.
    """
    from quantcli.recipe.written import name_of, read_recipe

    written = read_recipe(recipe, overrides, command=verb)
    if isinstance(model, Checkpoint):
        return Opened(written, model.path.name, model)
    named = written.file.model if model is None else model
    if named is None:
        raise InputError(
            f"no model to {verb}", where=name_of(recipe), fix="give --model, or `model:` in the recipe"
        )
    if not headers:
        return Opened(written, named, open_model(named, progress))
    located = locate(named, progress)
    return Opened(written, named, _open(named, located.folder, progress), located.pending)


def open_model(model: str, progress: Progress) -> Checkpoint:
    """The checkpoint that `model` names: a folder, a Hub id, or an address."""
    return _open(model, find_model(model, progress), progress)


def _open(model: str, folder: Path, progress: Progress) -> Checkpoint:
    name = model.removeprefix("hf://").removesuffix("/")
    is_id = HUB_ID.fullmatch(name) and folder != Path(model)
    return replace(open_checkpoint(folder, progress), hub_id=name if is_id else None)


def default_name(model: str, recipe: GivenRecipe) -> str:
    """The name of the folder to write, if the user gives none."""
    name = Path(recipe).stem if isinstance(recipe, str | Path) else "quantized"
    return f"{Path(os.path.abspath(model)).name}-{name}"  # noqa: PTH100 - keeps links


def say_if_new(calibration: Path | None, progress: Progress) -> None:
    """Say that a calibration which the user named is not there: the name may be misspelt."""
    if calibration is not None and not os.path.lexists(calibration):
        progress.say(f"note: {calibration} is not there: it will be made")


def calibration_folder(out: Destination) -> Path:
    """The default folder for the calibration of a checkpoint in `out`."""
    return out.sibling(".calibration")
