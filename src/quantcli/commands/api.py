"""The Python API: the commands as functions of a script or a notebook.

They print nothing, touch no signal handlers, and leave no setting of the process changed. What is wrong
with the input or the machine is a QuantError.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from quantcli.commands.job import JobOptions, signer_of, with_text
from quantcli.commands.keywords import (
    Calibrating,
    Converting,
    LiveModel,
    LiveTokenizer,
    Packing,
    PathLike,
    Planning,
    Verifying,
    assignments,
    check,
    path_of,
    place_of,
    takes,
    verify_defaults,
    verify_options,
)
from quantcli.commands.results import (
    Calibrated,
    Comparison,
    Converted,
    Inspection,
    Merged,
    Outliers,
    Packed,
    Planned,
    Recommendation,
    Repacked,
    Support,
    Verification,
)
from quantcli.commands.steps import Job, OnProgress, files_of, planned_of, progress_of
from quantcli.core.cluster.executor import THREADS, parse_executor
from quantcli.core.errors import InputError

if TYPE_CHECKING:
    from quantcli.calibration.resources import Resources
    from quantcli.calibration.text.examples import Examples
    from quantcli.checkpoint.checkpoint import Checkpoint
    from quantcli.commands.job import Job as PlannedJob
    from quantcli.core.events import Progress
    from quantcli.planning.plan import Plan

Recipe = PathLike | Mapping[str, Any]
Model = PathLike | LiveModel
ExampleInputs = Iterable[Any] | Mapping[str, Any] | None


@takes(Planning)
def plan(
    recipe: Recipe,
    *,
    model: Model | None = None,
    out: PathLike | None = None,
    tokenizer: LiveTokenizer | None = None,
    example_inputs: ExampleInputs = None,
    on_progress: OnProgress = None,
    **options: Unpack[Planning],
) -> Planned:
    """What `quantize` with the same arguments would write. Reads headers only.

    Arguments are those of `quantize`. Raises AnswerNo if the plan misses a limit of the recipe's
    `expect` block, InputError for a recipe or a model that cannot be converted so, and MachineError if
    the disk is too small.
    """
    from quantcli.commands import quantize as commands

    given = _Given(model, tokenizer, example_inputs, progress_of(on_progress))
    job = _plan(recipe, given, out, options)
    commands.check(job)
    return planned_of(job)


@takes(Converting)
def quantize(
    recipe: Recipe,
    *,
    model: Model | None = None,
    out: PathLike | None = None,
    tokenizer: LiveTokenizer | None = None,
    example_inputs: ExampleInputs = None,
    on_progress: OnProgress = None,
    **options: Unpack[Converting],
) -> Converted:
    """Convert a checkpoint with a recipe; calibrate first if the recipe needs data.

    The same call again continues an interrupted run.

    recipe:      the name of a shipped recipe, a YAML file, or its content as a mapping; "auto" for the
                 one that `recommend` puts first for `for_`.
    for_:        with "auto", the devices to serve on, such as "2x910B".
    model:       a folder, a Hub id, an address, or a transformers model in memory, whose weights are
                 read from there without a copy and must not change meanwhile; wins over the recipe's.
    out:         the folder to write, which appears whole or not at all; or an address, see
                 docs/remote.md and docs/hub.md. By default the recipe's, or MODEL-RECIPE here.
    tokenizer:   of a model in memory, for its output and for text.
    example_inputs: calibration data in place of what the recipe names: a list of texts; or token ids as
                 lists, as tensors [tokens] or [samples, tokens], or as dicts with `input_ids` and
                 perhaps `attention_mask`. Each is one sample, and all are taken.
    on_progress: is called with each `Event`, from any thread; `print` shows them.
    set:         changes of the recipe: {"calibration.samples": 64}, or ["calibration.samples=64"].
    data:        text to calibrate on: a file, or "datasets:ID"; wins over the recipe's.
    workers:     threads; by default one for each core.
    fresh:       start over in place of continuing.
    force:       replace `out` once the new checkpoint is complete.
    checksum:    hash every file for the manifest.
    sign:        a private key in PEM, which signs the checkpoint; its certificates may be in its file.
    hash_model:  also record the hashes of the model's weight files, which are read once more for it.
    calibration: the folder of a calibration to use or to make; by default OUT.calibration.
    part:        "2/3": write only part 2 of 3, for `pack(..., merge=True)`; "nodes": each node of
                 `executor` writes one to its own disk, as notes of the result say.
    executor:    "threads" of this process, "ray", "ray:local" or "ray:HOST:PORT": tasks on a cluster,
                 with `workers` threads each.
    device:      where a calibration computes: cpu, cuda or npu.
    max_memory:  bytes that a calibration may use, or a text such as "8GB".
    trust_remote_code: allow the model's own Python code to run.

    Raises AnswerNo if the plan misses a limit of the recipe's `expect` block, InputError for a recipe
    or a model that cannot be converted so, and MachineError for the disk, the memory or the device.
    """
    resources = resources_of(options)
    given = _Given(model, tokenizer, example_inputs, progress_of(on_progress))
    return Job(_plan(recipe, given, out, options), resources).run(on_progress)


@takes(Converting)
def prepare(
    recipe: Recipe,
    model: Model | None = None,
    example_inputs: ExampleInputs = None,
    *,
    out: PathLike | None = None,
    tokenizer: LiveTokenizer | None = None,
    on_progress: OnProgress = None,
    **options: Unpack[Converting],
) -> Job:
    """A conversion in steps: `job.plan`, `job.calibrate()` if the recipe needs data, `job.convert()`.

    Arguments and errors are those of `quantize`; nothing is written yet. Limits of the recipe's
    `expect` block are checked by `convert`.
    """
    resources = resources_of(options)
    given = _Given(model, tokenizer, example_inputs, progress_of(on_progress))
    return Job(_plan(recipe, given, out, options), resources)


class _Given:
    """The model and the data of a call, as the functions below the API take them."""

    def __init__(self, model: Any, tokenizer: Any, example_inputs: Any, progress: Progress) -> None:
        self.progress = progress
        self.examples: Examples | None = None
        if example_inputs is not None:
            from quantcli.calibration.text.examples import Examples

            self.examples = Examples.of(example_inputs)
        self.model: str | Checkpoint | None = None
        if model is None or isinstance(model, str | os.PathLike):
            if tokenizer is not None:
                what = "`tokenizer` is only for a model in memory"
                raise InputError(what, where=f"model: {model}", fix="leave it out: the folder has one")
            self.model = None if model is None else str(model)
        else:
            from quantcli.commands.live import live_checkpoint

            self.model = live_checkpoint(model, tokenizer, progress)


def _plan(
    recipe: Recipe, given: _Given, out: PathLike | None, options: Mapping[str, Any]
) -> PlannedJob[Plan]:
    from quantcli.commands import quantize as commands
    from quantcli.commands.budget.spending import Request, without_budget
    from quantcli.commands.recommend import choose

    chosen = choose(
        recipe if isinstance(recipe, Mapping) else str(recipe),
        given.model,
        options["for_"],
        _changes(options),
        with_data=given.examples is not None or options["calibration"] is not None,
        progress=given.progress,
    )
    how = JobOptions(
        options["workers"],
        options["fresh"],
        options["force"],
        options["checksum"],
        path_of(options["calibration"]),
        options["part"],
        parse_executor(options["executor"]),
        signer_of(options["sign"]),
        options["hash_model"],
        options["trust_remote_code"],
    )
    ordinary = without_budget(
        Request(chosen.recipe, chosen.overrides, given.model, place_of(out), how),
        resources=resources_of(options),
        examples=given.examples,
        progress=given.progress,
    )
    return commands.plan(
        ordinary.recipe,
        model=ordinary.model,
        out=ordinary.out,
        overrides=ordinary.overrides,
        options=ordinary.options,
        examples=given.examples,
        progress=given.progress,
    )


def _changes(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The changes of a recipe by `set` and `data`."""
    data = options["data"]
    return with_text(assignments(options["set"]), None if data is None else str(data))


def resources_of(options: Mapping[str, Any]) -> Resources:
    """The resources of a calibration. InputError for a device or a size that does not exist."""
    from quantcli.calibration.resources import Resources, check_device
    from quantcli.core.threads import default_workers
    from quantcli.recipe.fields import parse_size

    device, limit = options.get("device", "cpu"), options.get("max_memory")
    check_device(device)
    try:
        size = None if limit is None else parse_size(limit)
    except ValueError as error:
        fix = 'give bytes, or a text such as "8GB"'
        raise InputError(f"`max_memory`: {error}", where=f"max_memory={limit!r}", fix=fix) from None
    workers = options["workers"] or default_workers()
    executor = parse_executor(options.get("executor", THREADS))
    trust = options.get("trust_remote_code", False)
    return Resources(device, workers, size, trust, executor, options["workers"])


@takes(Calibrating)
def calibrate(
    recipe: Recipe,
    *,
    model: Model | None = None,
    out: PathLike | None = None,
    tokenizer: LiveTokenizer | None = None,
    example_inputs: ExampleInputs = None,
    on_progress: OnProgress = None,
    **options: Unpack[Calibrating],
) -> Calibrated:
    """Run samples through the model, one layer at a time, and keep statistics for `quantize`.

    The same call again continues an interrupted one after its last layer.

    recipe, model, tokenizer, example_inputs, set, data, workers, executor, device, max_memory,
    trust_remote_code, on_progress: as of `quantize`.
    out:   the folder to write, for `quantize(..., calibration=out)`.
    fresh: start over in place of continuing.

    Raises InputError for a recipe that needs no data, or for data or a model that cannot be used, and
    MachineError for the disk, the memory or the device.
    """
    from quantcli.commands import calibrate as commands

    resources, progress = resources_of(options), progress_of(on_progress)
    given = _Given(model, tokenizer, example_inputs, progress)
    session = commands.plan_calibration(
        recipe if isinstance(recipe, Mapping) else str(recipe),
        model=given.model,
        out=path_of(out),
        overrides=_changes(options),
        options=JobOptions(fresh=options["fresh"], trust_remote_code=resources.trust_remote_code),
        examples=given.examples,
        progress=progress,
    )
    return Calibrated.of(commands.calibrate(session, resources, progress, fresh=options["fresh"]))


@takes(Packing)
def pack(
    checkpoint: PathLike | Sequence[PathLike],
    target: str | None = None,
    *,
    out: PathLike,
    merge: bool = False,
    on_progress: OnProgress = None,
    **options: Unpack[Packing],
) -> Packed:
    """Write a quantized checkpoint in another format, its codes and scales unchanged; or join parts.

    checkpoint:  a folder, a Hub id or an address; with `merge` the folders of all parts of one
                 conversion.
    target:      the format to write, such as "compressed-tensors".
    out:         the folder or the address to write, as of `quantize`.
    set:         options of the target.
    on_progress, workers, fresh, force, checksum, sign, hash_model: as of `quantize`.

    Raises InputError for a checkpoint that the format cannot hold, and for parts that make no whole.
    """
    progress = progress_of(on_progress)
    workers, fresh, force = options["workers"], options["fresh"], options["force"]
    signer = signer_of(options["sign"])
    if merge:
        from quantcli.convert import merge as merging
        from quantcli.convert.destination import destination_of

        if target is not None or options["set"] or not options["checksum"] or options["hash_model"]:
            what = "`merge` takes no `target`, `set`, `checksum` or `hash_model`"
            raise InputError(what, fix="leave them out")
        folders = [checkpoint] if isinstance(checkpoint, str | os.PathLike) else checkpoint
        parts, place = [Path(folder) for folder in folders], destination_of(place_of(out))
        merge_job = merging.plan_merge(
            parts, place, workers=workers, fresh=fresh, force=force, signer=signer
        )
        joined = merging.merge(merge_job, progress)
        merged = Merged(**{**merging.to_json(merge_job), "out": merge_job.out.value})
        return Packed(**files_of(joined), notes=list(joined.notes), plan=merged)
    from quantcli.commands import pack as commands

    if target is None or not isinstance(checkpoint, str | os.PathLike):
        raise InputError("`pack` takes one checkpoint and a `target`", fix='such as target="fp8"')
    job = commands.plan_pack(
        str(checkpoint),
        target,
        place_of(out),
        overrides=assignments(options["set"]),
        options=JobOptions(
            workers, fresh, force, options["checksum"], signer=signer, hash_model=options["hash_model"]
        ),
        progress=progress,
    )
    written = commands.pack(job, progress)
    data = {**commands.to_json(job), "out": job.out.value}
    repacked = Repacked(origin=data.pop("from"), **data)
    return Packed(**files_of(written), notes=list(written.notes), plan=repacked)


@overload
def verify(
    checkpoint: PathLike, *, on_progress: OnProgress = None, **options: Unpack[Verifying]
) -> Verification: ...


@overload
def verify(
    checkpoint: list[PathLike] | tuple[PathLike, ...],
    *,
    on_progress: OnProgress = None,
    **options: Unpack[Verifying],
) -> Comparison: ...


@takes(Verifying, verify_defaults())
def verify(
    checkpoint: PathLike | list[PathLike] | tuple[PathLike, ...],
    *,
    on_progress: OnProgress = None,
    **options: Unpack[Verifying],
) -> Verification | Comparison:
    """Check that a quantized checkpoint is whole, loadable and faithful. `ok` of the result says so.

    checkpoint:  a folder, a Hub id or an address, whoever wrote it. Several in a list are compared: the
                 result has the outcome of each, and the options apply to all.
    full:        read every byte: hashes, NaN, ranges.
    against:     the float model, or another quantized one, to compare with.
    calibration: the folder of the calibration: numbers that follow from it are computed again.
    run, data:   run both models on a text file, or several, as the engine computes; needs `against`.
    samples, length: windows of each text, and tokens of each window.
    layer:       a module to trace on the text, or several: where its error comes from.
    served:      the address of a server that runs the checkpoint, such as vLLM: it is asked, too.
    tasks:       a task of lm-evaluation-harness by name, or a YAML file; or several.
    task_docs:   documents of each task; None: all.
    tp:          tensor parallel sizes to serve with, as in "1,2,4".
    recipe:      a recipe, whose `verify` block sets limits.
    min_sqnr, max_ppl_ratio, max_kl: limits: dB, a ratio, nats per token.
    baseline:    a JSON report of before, to show the change against it.
    not_worse:   fail if the KL divergence is worse than that of the first checkpoint, or the baseline.
    junit, report: files to write: JUnit XML, and one HTML page.
    on_progress, workers, executor, trust_remote_code: as of `quantize`; `run` computes on this machine.

    Raises InputError if there is nothing to verify, or for options that do not go together.
    """
    from quantcli.commands import verify as commands

    if isinstance(checkpoint, str | os.PathLike):
        chosen = verify_options([checkpoint], options)
        return Verification(**commands.run(chosen, progress_of(on_progress)))
    for each in checkpoint:
        check("checkpoint", each, PathLike)
    if len(checkpoint) < 2:
        what, fix = "a list of checkpoints has two or more", "give one checkpoint without a list"
        raise InputError(what, where=f"checkpoint={list(checkpoint)}", fix=fix)
    document = commands.run(verify_options(checkpoint, options), progress_of(on_progress))
    outcomes = [Verification(**each) for each in document["checkpoints"]]
    return Comparison(ok=document["ok"], checkpoints=outcomes)


@overload
def inspect(
    model: PathLike,
    *,
    tensors: str | None = None,
    outliers: Literal[False] = False,
    on_progress: OnProgress = None,
) -> Inspection: ...


@overload
def inspect(
    model: PathLike,
    *,
    outliers: Literal[True],
    report: PathLike | None = None,
    on_progress: OnProgress = None,
) -> Outliers: ...


@takes()
def inspect(
    model: PathLike,
    *,
    tensors: str | None = None,
    outliers: bool = False,
    report: PathLike | None = None,
    on_progress: OnProgress = None,
) -> Inspection | Outliers:
    """The contents of a checkpoint, from its headers; with `outliers`, its weights ranked.

    model:    a folder, a Hub id or an address.
    tensors:  a glob; the tensors that match are listed in `matches`.
    outliers: read the weights and rank them by how hard they are to quantize.
    report:   with `outliers`, an HTML page to write.

    Raises InputError if nothing can be shown. Faults that do not hide the contents are in `problems`.
    """
    from quantcli.commands import inspect as commands

    progress = progress_of(on_progress)
    if not outliers:
        if report is not None:
            raise InputError("`report` needs `outliers`", fix="add outliers=True")
        contents = commands.inspect(str(model), tensors, progress)
        return Inspection(**{**contents, "path": Path(contents["path"])})
    if tensors is not None:
        raise InputError("`outliers` does not take `tensors`", fix="leave `tensors` out")
    ranking = commands.outliers(str(model), progress, path_of(report))
    return Outliers(**{**ranking, "path": Path(ranking["path"])})


@takes()
def support(*, for_: str | None = None, on_progress: OnProgress = None) -> Support:
    """Which schemes and targets go together, and how each pair is stored.

    for_: a device, as of `recommend`: only pairs that its engine has kernels for.
    """
    from quantcli.commands import inspect as commands

    return Support(commands.support(progress_of(on_progress), for_))


@takes()
def recommend(
    model: PathLike,
    for_: str,
    *,
    context: int | str | None = None,
    concurrency: int | None = None,
    on_progress: OnProgress = None,
) -> Recommendation:
    """Shipped recipes for a model on a device, the best first. Reads headers and config.json only.

    model:       a folder, a Hub id or an address.
    for_:        devices, such as "2x910B", "H100", "8xH100:94GB", "2x48GB-ada" or "cpu".
    context:     tokens of a sequence, such as 32768 or "32k"; by default 8192, or the model's own.
    concurrency: sequences at a time; by default 8.

    If nothing fits, `best` is None and `advice` says what would. Raises InputError for an unknown
    device, and for a model that is not a language model.
    """
    from quantcli.commands import recommend as commands

    return commands.recommend(
        str(model), for_, context=context, concurrency=concurrency, progress=progress_of(on_progress)
    )
