"""A release, planned: every checkpoint is checked before the first one is written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.commands.job import Job, JobOptions, default_name, make_job, open_model, say_if_new
from quantcli.commands.release.verifying import check_verification, verify_options
from quantcli.core.cluster.executor import Executor
from quantcli.core.errors import AnswerNo, InputError, MachineError, QuantError
from quantcli.core.events import SILENT, Progress
from quantcli.core.place import check_calibration, partial_folder
from quantcli.core.text import count
from quantcli.recipe.release import (
    PLACEHOLDER,
    GivenRelease,
    ReleaseEntry,
    WrittenRelease,
    read_release,
)
from quantcli.recipe.written import WrittenRecipe, read_recipe
from quantcli.verification.options import VerifyOptions

if TYPE_CHECKING:
    from quantcli.calibration.sets.joint import Joint
    from quantcli.convert.destination import Destination
    from quantcli.convert.execute import RunOptions
    from quantcli.planning.plan import Plan
    from quantcli.recipe.recipe import Recipe

# new: to be written. done: there already. unsure: there, and its statistics are not known yet.
State = Literal["new", "done", "unsure"]
_HOLDS = {
    False: "holds another checkpoint (other plan or settings)",
    True: "holds something else, or a damaged checkpoint",
}


@dataclass(frozen=True)
class ReleaseOptions:
    """How a release is to be run.

    only:        names of checkpoints; empty: all.
    out:         in place of the file's `output`.
    workers:     threads; None: one for each core.
    fresh:       delete what an interrupted run left.
    force:       replace outputs that exist and are not of this plan; with `fresh` those, too, that are.
    calibration: the folder of a calibration to use or to make; None: OUTPUT.calibration.
    page:        the HTML page to write.
    executor:    the cluster whose nodes work; None: threads of this process.
    trust_remote_code: the model's own code may run, which a rotation is planned with.
    """

    only: tuple[str, ...] = ()
    out: str | None = None
    workers: int | None = None
    fresh: bool = False
    force: bool = False
    calibration: Path | None = None
    page: Path | None = None
    executor: Executor | None = None
    trust_remote_code: bool = False

    def of_run(self) -> RunOptions:
        """The options of the conversions."""
        return JobOptions(self.workers, self.fresh, self.force, executor=self.executor).of_run()


@dataclass(frozen=True)
class Member:
    """A checkpoint of a release, planned.

    job:    its conversion.
    missed: the limit of the recipe's `expect` block that the plan misses; it is not written then.
    """

    entry: ReleaseEntry
    job: Job[Plan]
    state: State
    missed: AnswerNo | None

    @property
    def name(self) -> str:
        """Its name in the release."""
        return self.entry.name

    @property
    def is_wanted(self) -> bool:
        """Whether it is to be written, as far as is known."""
        return self.state != "done" and self.missed is None


@dataclass(frozen=True)
class Release:
    """A release that was planned and would be accepted.

    model:   as the user named it.
    joint:   the calibration of all that need one; None if none does.
    verify:  how the checkpoints are verified at the end; None: they are not.
    memory:  bytes above a bare torch import that conversions take together, estimated.
    """

    written: WrittenRelease
    model: str
    checkpoint: Checkpoint
    options: ReleaseOptions
    members: tuple[Member, ...]
    joint: Joint | None
    verify: VerifyOptions | None
    memory: int
    notes: tuple[str, ...]

    @property
    def missing(self) -> list[Member]:
        """What is to be written, as far as is known."""
        return [member for member in self.members if member.is_wanted]


def plan_release(
    release: GivenRelease,
    *,
    model: str | None = None,
    options: ReleaseOptions,
    progress: Progress = SILENT,
) -> Release:
    """Check everything that can be checked before the first byte of weights is read.

    release: a file, or a mapping with its content. model: in place of the file's.
    InputError for a release of which one checkpoint could not be written, MachineError if all of them
    together do not fit the disk. For a plan that misses a limit of `expect` see `Member`.
    """
    written = read_release(release)
    entries = written.only(options.only)
    recipes = []
    for entry in entries:
        with naming(entry):
            recipes.append(read_recipe(entry.recipe, entry.overrides))
    named = written.file.model if model is None else model
    if named is None:
        where = written.document.where(())
        raise InputError("the release has no model", where=where, fix="give --model, or `model:` in it")
    checkpoint = open_model(named, progress)
    verify = verify_options(written, options.page, options.workers, named)
    base = default_name(named, release)
    output = options.out if options.out is not None else written.file.output
    output = base if output is None else output
    places = _places(written, entries, output, checkpoint)
    if verify is not None:
        check_verification(verify, written, checkpoint, places, progress)
    progress.say(f"planning {count(entries, 'checkpoint')} of {named}")

    from quantcli.convert.together import memory_together

    plans = []
    for entry, recipe in zip(entries, recipes, strict=True):
        with naming(entry):
            trust = options.trust_remote_code
            plan = _plan_of(written, entry, recipe, checkpoint, progress, trust_remote_code=trust)
            plans.append(plan)
    joint, notes = _calibrated(written, plans, options, output, base, progress)
    if joint is not None:
        for entry, place in zip(entries, places, strict=True):
            with naming(entry):
                check_calibration(joint.folder, checkpoint.path, place.folder)
    members = []
    for entry, plan, place in zip(entries, plans, places, strict=True):
        with naming(entry):
            members.append(_member(entry, plan, place, options, joint))
    jobs = [member.job for member in members if member.is_wanted]
    _check_room(jobs)
    memory = memory_together([job.plan for job in jobs], options.of_run().workers)
    memory += sum(job.out.memory(job.plan.shards) for job in jobs)
    return Release(
        written, named, checkpoint, options, tuple(members), joint, verify, memory, tuple(notes)
    )


@contextmanager
def naming(entry: ReleaseEntry) -> Iterator[None]:
    """Errors of the block say which checkpoint of the release they are of."""
    try:
        yield
    except QuantError as error:
        raise of_entry(entry, error) from None


def of_entry(entry: ReleaseEntry, error: QuantError) -> QuantError:
    """An error that says which checkpoint of the release it is of."""
    what = f"checkpoint `{entry.name}`: {error.what}"
    where = error.where or entry.where
    return type(error)(what, where=where, fix=error.fix, payload=error.payload)


def _places(
    written: WrittenRelease, entries: Sequence[ReleaseEntry], output: str, checkpoint: Checkpoint
) -> list[Destination]:
    """Where each checkpoint goes. InputError for places that contain each other, and for those that no
    checkpoint could have."""
    from quantcli.convert.destination import destination_of

    repository = output.removeprefix("hf://").rstrip("/")
    is_whole = output.startswith("hf://") and "/" in repository and PLACEHOLDER not in output
    if is_whole and any(entry.out is None for entry in entries):
        raise InputError(
            "a repository of the Hub holds one checkpoint",
            where=output,
            fix=f"put {{name}} into the address: hf://{repository.partition('@')[0]}-{{name}}",
        )
    places: list[Destination] = []
    for entry in entries:
        with naming(entry):
            place = destination_of(written.place(entry, output))
            place.check(checkpoint.path, force=True)  # it may exist: what it is matters later
            for other, before in zip(entries, places, strict=False):
                if overlap(place, before):
                    raise InputError(
                        f"it goes to the place of checkpoint `{other.name}`, or into it",
                        where=str(place),
                        fix="give one of them another `out`",
                    )
        places.append(place)
    return places


def overlap(one: Destination, other: Destination) -> bool:
    """Whether one place is the other, or inside of it; or a draft is there while it is written."""
    if one.folder is not None and other.folder is not None:
        return any(
            first.is_relative_to(second) or second.is_relative_to(first)
            for first in (one.folder.resolve(), partial_folder(one.folder).resolve())
            for second in (other.folder.resolve(), partial_folder(other.folder).resolve())
        )
    return one.address.startswith(other.address) or other.address.startswith(one.address)


def _plan_of(
    written: WrittenRelease,
    entry: ReleaseEntry,
    recipe: WrittenRecipe,
    checkpoint: Checkpoint,
    progress: Progress,
    *,
    trust_remote_code: bool,
) -> Plan:
    """The plan of a checkpoint, before its calibration."""
    from quantcli.calibration.rotation.basis import in_basis
    from quantcli.commands.explain import explain_plan
    from quantcli.planning.planner import make_plan
    from quantcli.recipe.recipe import load_recipe, resolve

    resolved = resolve(recipe)
    if written.calibration and _needs_data(resolved):
        resolved = load_recipe(entry.recipe, (*written.calibration, *entry.overrides))
    checkpoint = in_basis(resolved, checkpoint, trust_remote_code=trust_remote_code)
    plan = make_plan(resolved, checkpoint)
    progress.detail(f"checkpoint `{entry.name}`, recipe {entry.recipe}:")
    explain_plan(plan, progress)
    return plan


def _needs_data(recipe: Recipe) -> bool:
    """Whether a recipe calibrates, if its rules match anything."""
    from quantcli.recipe.methods import methods_for

    schemes = [rule.scheme for rule in recipe.rules if rule.scheme is not None]
    return bool(methods_for(recipe.methods, schemes))


def _calibrated(
    written: WrittenRelease,
    plans: Sequence[Plan],
    options: ReleaseOptions,
    output: str,
    base: str,
    progress: Progress,
) -> tuple[Joint | None, list[str]]:
    """The calibration of all plans that need one, and notes about it.

    output: of the release. base: the name of the release, if its output has a `{name}` in it.
    """
    from quantcli.calibration.sets.joint import joint_sessions
    from quantcli.checkpoint.remote.address import address_of
    from quantcli.convert.destination import destination_of

    if not any(plan.needs_calibration for plan in plans):
        if options.calibration is not None:
            where = f"--calibration {options.calibration}"
            fix = "leave --calibration out"
            raise InputError("no checkpoint needs a calibration", where=where, fix=fix)
        unused = "`calibration` has no effect: no checkpoint needs data"
        return None, [unused] if written.calibration else []
    folder = options.calibration
    if folder is None:
        named = base if PLACEHOLDER in output else output
        if address_of(named) is not None:  # a folder here, named after the last part of the address
            named = PurePosixPath(named).name
        folder = destination_of(named).sibling(".calibration")
    say_if_new(options.calibration, progress)
    return joint_sessions(plans, folder), []


def _member(
    entry: ReleaseEntry, plan: Plan, out: Destination, options: ReleaseOptions, joint: Joint | None
) -> Member:
    """A checkpoint whose place was accepted. InputError if something else is in its place."""
    from quantcli.commands.quantize import check, with_statistics
    from quantcli.convert.shards import memory_estimate

    session = None if joint is None else joint.of(plan)
    is_known = session is None or session.complete
    if session is not None and is_known:
        plan = with_statistics(plan, session)
    again = options.fresh and options.force
    state: State = "new" if again else state_of(plan, out, is_known=is_known)
    run = options.of_run()
    if state == "done":
        job = Job(plan, out, run, None, memory_estimate(plan, run.workers), 0, session)
    else:
        if state == "new":
            check_free(plan, out, force=options.force)
        job = make_job(plan, out, run, session)
    try:
        check(job)
    except AnswerNo as missed:
        return Member(entry, job, state, missed)
    return Member(entry, job, state, None)


def state_of(plan: Plan, out: Destination, *, is_known: bool) -> State:
    """Whether a plan's checkpoint is there already: its manifest is the plan's, and so are its files.

    is_known: whether the plan has all its numbers, or needs none.
    """
    from quantcli.checkpoint.files import MANIFEST
    from quantcli.convert.execute import planned_files

    manifest = out.manifest()
    if manifest is None:
        return "new"
    head = plan.manifest()
    digest = head.pop("plan")
    if not is_known:  # the recipe there also has the sha256 of its text
        manifest, head = ({**t, "recipe": _unpinned(str(t.get("recipe")))} for t in (manifest, head))
    if any(manifest.get(key) != value for key, value in head.items()):
        return "new"
    if {*planned_files(plan, None)} != {*manifest["files"], MANIFEST}:
        return "new"
    if not is_known:
        return "unsure"
    return "done" if manifest.get("plan") == digest else "new"


def _unpinned(recipe: str) -> str:
    """A recipe in a checkpoint without the sha256 of its text."""
    return re.sub(r"^  sha256: [0-9a-f]{64}\n", "", recipe, count=1, flags=re.MULTILINE)


def check_free(plan: Plan, out: Destination, *, force: bool) -> None:
    """InputError or MachineError if a checkpoint that is not there yet cannot go to its place."""
    if out.exists and not force:
        raise InputError(
            f"{out} {_HOLDS[out.manifest() is None]}",
            fix="move it away, give the checkpoint another `name` or `out`, or replace it with --force",
        )
    out.check(plan.checkpoint.path, force=force)


def _check_room(jobs: Sequence[Job[Plan]]) -> None:
    """MachineError if the outputs together need more than a disk has."""
    from quantcli.core.place import check_spaces

    check_spaces([(job.out.folder, job.nbytes) for job in jobs if job.out.folder is not None])
    scratch = [job.room for job in jobs if job.out.folder is None and job.room is not None]
    needed, free = sum(room.needed for room in scratch), min((room.free for room in scratch), default=0)
    if needed > free:
        raise MachineError(
            f"disk is too full: needs {needed:,} bytes{scratch[0].where}, {free:,} are free",
            fix="free some space, or make fewer checkpoints at a time with --only",
        )
