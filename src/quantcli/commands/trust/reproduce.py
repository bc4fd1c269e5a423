"""`reproduce` as functions: a checkpoint made again by its own recipe, and compared byte by byte.

Nothing is written but OUT.reproduction: the calibration, and a journal of the files that were compared.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.files import MANIFEST, RECIPE_FILE
from quantcli.checkpoint.hub import find_model
from quantcli.checkpoint.manifest import Recorded, has_recipe, read_manifest, tool_of, tool_text
from quantcli.commands.api import resources_of
from quantcli.commands.job import open_model
from quantcli.commands.keywords import PathLike, Reproducing, path_of, takes
from quantcli.commands.results import Reproduction
from quantcli.commands.steps import OnProgress, progress_of
from quantcli.core.cluster.executor import TASK_WORKERS
from quantcli.core.disk import disk_errors
from quantcli.core.errors import InputError
from quantcli.core.events import SILENT, Progress
from quantcli.core.place import expanded
from quantcli.core.text import count
from quantcli.core.threads import default_workers
from quantcli.core.untrusted.names import printable

if TYPE_CHECKING:
    from quantcli.calibration.resources import Resources
    from quantcli.calibration.session import Session
    from quantcli.calibration.text.examples import Examples
    from quantcli.core.cluster.cluster import Cluster
    from quantcli.planning.measured import Measured
    from quantcli.planning.plan import Plan, Work
    from quantcli.recipe.recipe import Recipe
    from quantcli.verification.again.whole import Unlike, Whole

FOLDER = ".reproduction"  # ends the name of the folder next to OUT
_MAKE = "give a checkpoint that `quantcli quantize` or `quantcli pack` wrote"
_GIVE = "give --data FILE"


@dataclass(frozen=True)
class Wish:
    """What is to be reproduced, and with what.

    checkpoint, model: folders, Hub ids or addresses.
    data:        the text, in place of the name in the recipe; None: the text that comes with quantcli,
                 or a data set of the Hub.
    examples:    samples that a program holds, in place of it.
    calibration: the folder of a calibration to use or to make; None: one is made, and deleted later.
    fresh:       start over in place of continuing.
    """

    checkpoint: str
    model: str
    data: str | None = None
    examples: Examples | None = None
    calibration: Path | None = None
    fresh: bool = False


@dataclass
class Attempt:
    """A reproduction under way.

    work:  the folder for what is needed for a while.
    notes: what is not recorded, and other remarks.
    """

    wish: Wish
    folder: Path
    manifest: dict[str, Any]
    checkpoint: Checkpoint
    work: Path
    notes: list[str] = field(default_factory=list)

    @cached_property
    def recorded(self) -> Recorded:
        """What the manifest says of the calibration."""
        return Recorded.of(self.manifest)


@takes(Reproducing)
def reproduce(
    checkpoint: PathLike,
    model: PathLike,
    *,
    data: PathLike | None = None,
    example_inputs: Iterable[Any] | Mapping[str, Any] | None = None,
    on_progress: OnProgress = None,
    **options: Unpack[Reproducing],
) -> Reproduction:
    """Make a checkpoint again by its own recipe, and compare every byte. `ok` of the result says so.

    Nothing is written but a folder OUT.reproduction for the time of the work; the same call again
    continues an interrupted one.

    checkpoint:  a folder, a Hub id or an address that `quantize` or `pack` wrote.
    model:       what it was made of.
    data:        the text that it was calibrated on; not needed for the sample that comes with quantcli
                 and for data sets of the Hub.
    example_inputs: the samples, if it was calibrated on some: see `quantize`.
    calibration: the folder of a calibration to use in place of running the text again, or to make.
    fresh:       start over in place of continuing.
    workers, executor, device, max_memory, trust_remote_code, on_progress: as of `quantize`.

    Raises InputError if the model, the tokenizer or the text is another one than the checkpoint
    records, and MachineError for the disk, the memory or the device.
    """
    examples = None
    if example_inputs is not None:
        from quantcli.calibration.text.examples import Examples

        examples = Examples.of(example_inputs)
    wish = Wish(
        str(checkpoint),
        str(model),
        None if data is None else str(data),
        examples,
        path_of(options["calibration"]),
        options["fresh"],
    )
    return Reproduction(**run(wish, resources_of(options), progress_of(on_progress)))


def run(wish: Wish, resources: Resources, progress: Progress = SILENT) -> dict[str, Any]:
    """Make a checkpoint again and compare: the document of `reproduce`, see docs/trust.md.

    The same call again continues an interrupted one. InputError if the model, the tokenizer or the text
    is another one than recorded, and if the checkpoint does not say how it was made.
    """
    from quantcli.core.cluster.connect import connected

    attempt = _begin(wish, progress)
    with connected(resources.executor, progress) as cluster:
        with _working(attempt):
            plan = _plan(attempt, resources, progress)
            outcome = _compare(attempt, plan, resources, cluster, progress)
        _tidy(attempt.work)
    return outcome


def _begin(wish: Wish, progress: Progress) -> Attempt:
    """Open both. InputError without a sound manifest, and for another model."""
    folder = find_model(wish.checkpoint, progress)
    if not folder.is_dir():
        raise InputError("no such folder", where=wish.checkpoint, fix="check the path")
    if not (folder / MANIFEST).is_file():
        what = f"there is no {MANIFEST}, which says how a checkpoint was made"
        raise InputError(what, where=wish.checkpoint, fix=_MAKE)
    manifest = read_manifest(folder)
    from quantcli.planning.files import other_weights

    checkpoint = open_model(wish.model, progress)
    source = manifest.get("source")
    source = source if isinstance(source, dict) else {}
    if source.get("fingerprint") != checkpoint.fingerprint:
        recorded = source.get("fingerprint")
        if recorded is None:
            what = f"{MANIFEST} does not say which model it was made of"
            raise InputError(what, where=wish.checkpoint, fix=_MAKE)
        raise InputError(
            f"this is another model: its headers and config.json have the fingerprint "
            f"{checkpoint.fingerprint}; the checkpoint was made of {recorded:.80}",
            where=f"--model {wish.model}",
            fix="give the model that the checkpoint was made of",
        )
    recorded = source.get("files")
    if recorded is not None:
        workers = default_workers()
        if (name := other_weights(recorded, checkpoint, workers, progress)) is not None:
            raise InputError(
                f"this is another model: its file `{printable(name):.200}` is not what was converted",
                where=f"--model {wish.model}",
                fix="give the model that the checkpoint was made of",
            )
        checkpoint = replace(checkpoint, weight_hashes=recorded)
    named = source.get("id")
    if isinstance(named, str):  # the card says it, wherever the model is now
        checkpoint = replace(checkpoint, hub_id=named)
    place = expanded(wish.checkpoint)
    if place.is_dir():
        place = place.resolve()
        work = place.with_name(place.name + FOLDER)
    else:
        work = Path(f"{place.name.partition('@')[0]}{FOLDER}")
    return Attempt(wish, folder, manifest, checkpoint, work)


@contextmanager
def _working(attempt: Attempt) -> Iterator[None]:
    """The folder for what is needed for a while. InputError if it holds other things."""
    work = attempt.work
    if work.is_dir():
        with disk_errors(work):
            strange = sorted({each.name for each in work.iterdir()} - {"calibration", "compared"})
        if strange:
            what = f"the folder is not of an interrupted `reproduce`: it holds `{strange[0]}`"
            raise InputError(what, where=str(work), fix="move it away")
        if attempt.wish.fresh:
            _tidy(work)
    try:
        yield
    finally:
        with suppress(OSError):  # there is something in it, or there never was
            work.rmdir()


def _tidy(work: Path) -> None:
    if work.is_dir():
        with disk_errors(work):
            shutil.rmtree(work)


def _plan(attempt: Attempt, resources: Resources, progress: Progress) -> Work:
    """The plan by which the checkpoint was made, with statistics if it needs them."""
    if "state" in attempt.manifest:
        return _repacking(attempt)
    from quantcli.calibration.rotation.basis import in_basis, learned_basis
    from quantcli.planning.planner import make_plan

    recipe = _recipe(attempt)
    trust = resources.trust_remote_code
    checkpoint = in_basis(recipe, attempt.checkpoint, trust_remote_code=trust)
    plan = make_plan(recipe, checkpoint)
    wish = attempt.wish
    if plan.needs_calibration:
        measured = _measured(attempt, plan, resources, progress)
        return make_plan(recipe, learned_basis(plan, measured.folder), measured)
    for option, value in (("--calibration", wish.calibration), ("--data", wish.data)):
        if value is not None:
            what = "nothing in the checkpoint's recipe needs a calibration"
            raise InputError(what, where=f"{option} {value}", fix=f"leave {option} out")
    return plan


def _repacking(attempt: Attempt) -> Work:
    """The plan of a checkpoint that `pack` wrote."""
    from quantcli.checkpoint.checkpoint import scan_checkpoint
    from quantcli.planning.repack import plan_repacking
    from quantcli.targets.base import target_of

    target = target_of(scan_checkpoint(attempt.folder))
    if target is None:
        what = "the format of the checkpoint is not known"
        raise InputError(what, where=attempt.wish.checkpoint, fix=_MAKE)
    return plan_repacking(attempt.checkpoint, target)


def _recipe(attempt: Attempt) -> Recipe:
    """The recipe of the checkpoint, from its file. InputError if the manifest has another one."""
    from quantcli.recipe.recipe import load_recipe

    path = attempt.folder / RECIPE_FILE
    if not has_recipe(attempt.manifest, path):
        what = f"{RECIPE_FILE} is missing, or is not the recipe of the manifest"
        raise InputError(what, where=attempt.wish.checkpoint, fix="copy the checkpoint again")
    return load_recipe(path)


def _measured(attempt: Attempt, plan: Plan, resources: Resources, progress: Progress) -> Measured:
    """The statistics, measured again from the text; or those of the folder that the user gave."""
    from quantcli.calibration.session import load, load_for, prepare_session, run
    from quantcli.calibration.text.dataset import tokenizer_files

    wish, recorded = attempt.wish, attempt.recorded
    if recorded.text is None:
        attempt.notes.append("which text it was calibrated on is not recorded: this run cannot tell")
    if recorded.tokenizer is None:
        attempt.notes.append("which tokenizer it was calibrated with is not recorded")
    elif recorded.tokenizer:
        _check_tokenizer(recorded.tokenizer, tokenizer_files(attempt.checkpoint.path), wish.model)
    if recorded.statistics is None:
        attempt.notes.append("the sha256 of its statistics is not recorded")
    if recorded.tool is None:
        attempt.notes.append("which versions calibrated it is not recorded")
    given = wish.data is not None or wish.examples is not None
    if wish.calibration is not None and wish.calibration.is_dir() and not given:
        found = load_for(plan, wish.calibration)
        same = [m for m in found if m.basis and recorded.text in {None, m.basis.text}]
        if not same:
            texts = ", ".join(str(m.basis and m.basis.text) for m in found)
            raise _another_text(f"--calibration {wish.calibration}", texts, recorded)
        attempt.notes.append(f"the text was not run again: statistics are those of {wish.calibration}")
        return same[0]
    data = _data(attempt, plan)
    folder = wish.calibration or attempt.work / "calibration"
    session: Session = prepare_session(plan, folder, examples=wish.examples, data=data)
    if not session.complete:
        progress.say(f"calibrating again, as {wish.checkpoint} was")
        run(session, resources, progress)
    return load(session)


def _check_tokenizer(recorded: Mapping[str, str], here: Mapping[str, str], model: str) -> None:
    """InputError for another tokenizer."""
    for name in sorted(recorded.keys() | here.keys()):
        if recorded.get(name) != here.get(name):
            raise InputError(
                f"this is another tokenizer: `{name}` {_sha256(here.get(name))}; in the one that "
                f"the checkpoint was calibrated with, it {_sha256(recorded.get(name))}",
                where=f"--model {model}",
                fix="give the model with the tokenizer that it had then",
            )


def _sha256(sha256: str | None) -> str:
    return "is not there" if sha256 is None else f"has the sha256 {sha256}"


def _data(attempt: Attempt, plan: Plan) -> str | None:
    """The text to calibrate on; None for the one that the recipe itself leads to.

    InputError for another text than the one that is recorded, as far as that is known by now.
    """
    from quantcli.calibration.text.documents import HUB, file_digest
    from quantcli.calibration.text.examples import NAME
    from quantcli.recipe.shipped import is_sample_text

    wish, recorded, block = attempt.wish, attempt.recorded, plan.recipe.file.calibration
    name = (block and block.data) or ""
    if wish.examples is not None:
        if recorded.text not in {None, wish.examples.digest}:
            raise _another_text(NAME, wish.examples.digest, recorded)
        return None
    if wish.data is not None:
        sha256 = file_digest(wish.data, f"--data {wish.data}")
        if sha256 is not None and recorded.text not in {None, sha256}:
            raise _another_text(f"--data {wish.data}", sha256, recorded)
        return wish.data
    if name.startswith(HUB) or is_sample_text(plan.recipe.data_path()):
        return None
    digest = f" (sha256 {recorded.text})" if recorded.text else ""
    fix = _GIVE
    if name == NAME:
        fix = "call quantcli.reproduce with these `example_inputs`"
    raise InputError(
        f"the checkpoint was calibrated on the text `{name:.200}`{digest}, which is needed again",
        where=wish.checkpoint,
        fix=fix,
    )


def _another_text(where: str, sha256: str, recorded: Recorded) -> InputError:
    return InputError(
        f"this is another text: its sha256 is {sha256}; the checkpoint was calibrated on "
        f"`{recorded.name!s:.200}`, whose sha256 is {recorded.text!s:.80}",
        where=where,
        fix="give the text that the checkpoint was calibrated on",
    )


def _compare(
    attempt: Attempt, plan: Work, resources: Resources, cluster: Cluster | None, progress: Progress
) -> dict[str, Any]:
    """Compare all files; the weight files that an interrupted run found equal are not read again."""
    from quantcli.planning.files import source_files
    from quantcli.verification.again.whole import Whole
    from quantcli.verification.spread.pool import Pool

    manifest, here = attempt.manifest, tool_of(plan.packages)
    whole = Whole(attempt.folder, plan, manifest, same_version=manifest.get("tool") == here)
    workers = resources.workers
    if cluster is not None:
        workers = resources.task_workers or TASK_WORKERS
    files = [path for shard in plan.shards if (path := attempt.folder / shard.file).is_file()]
    pool = Pool(workers, cluster, (*files, *source_files(plan, plan.shards)) if cluster else ())
    progress.say(f"comparing {attempt.wish.checkpoint}, file by file")
    differences = [*_shards(attempt, whole, pool, progress), *whole.files()]
    different = {each.file for each in differences}
    differences += whole.listing(different)
    for name in sorted(different & whole.changed.keys()):
        attempt.notes.append(f"`{name}` is not what {MANIFEST} lists: it was changed later")
    if whole.figures():
        attempt.notes.append("README.md also has the figures of `quantcli verify --card`")
    if others := whole.others():
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        what = f"`{others[0]:.120}`{more}: not in the manifest, and not compared"
        attempt.notes.append(what)
    return _document(attempt, plan, whole, differences)


def _shards(attempt: Attempt, whole: Whole, pool: Any, progress: Progress) -> Iterator[Unlike]:
    """The differences of the weight files."""
    from quantcli.convert.execute import run_head
    from quantcli.convert.journal import Journal

    plan = whole.plan
    head = run_head(plan, checksum=True)
    for shard in plan.shards:  # another OUT under this name is compared anew
        path = attempt.folder / shard.file
        if path.is_file():
            status = path.stat()
            head["source"][f"OUT/{shard.file}"] = [status.st_size, status.st_mtime_ns]
    journal = Journal(attempt.work / "compared", head)
    try:
        progress.begin(sum(shard.source_nbytes for shard in plan.shards), len(plan.shards), "file")
        equal = len(journal.done)
        for shard in plan.shards:
            if shard.file in journal.done:
                progress.advance(shard.source_nbytes)
                progress.shard(shard.file, shard.nbytes, reused=True)
                continue
            found = whole.shard(shard, pool, progress)
            yield from found
            if not found:
                journal.record(shard.file, shard.nbytes, None)
                equal += 1
            progress.shard(shard.file, shard.nbytes, reused=False)
            progress.keeps(f"{count(equal, 'file')} compared, as {attempt.work} says")
    finally:
        journal.close()


def _document(attempt: Attempt, plan: Work, whole: Whole, differences: list[Unlike]) -> dict[str, Any]:
    """The outcome, JSON-able."""
    from quantcli.planning.plan import Plan

    recorded, statistics = attempt.recorded, None
    made_by, here = tool_text(attempt.manifest.get("tool")), tool_text(tool_of(plan.packages))
    block = plan.manifest().get("calibration") if isinstance(plan, Plan) else None
    if block is not None:
        statistics = {"recorded": recorded.statistics, "now": block["statistics"]}
    if block is not None and recorded.tool is not None:
        made_by, here = (
            f"{t}; calibrated by {c}" for t, c in ((made_by, recorded.tool), (here, block["tool"]))
        )
    if made_by != here:
        attempt.notes.append(f"other versions made the checkpoint: {made_by}; here are {here}")
    return {
        "ok": not differences,
        "checkpoint": attempt.wish.checkpoint,
        "model": attempt.wish.model,
        "difference": differences[0].to_json() if differences else None,
        "differences": [each.to_json() for each in differences],
        "files": len(attempt.manifest["files"]) + 1,
        "tensors": sum(len(shard.tensors) for shard in plan.shards),
        "bytes": plan.nbytes,
        "statistics": statistics,
        "made_by": made_by,
        "here": here,
        "notes": attempt.notes,
        "summary": str(differences[0]) if differences else None,
    }
