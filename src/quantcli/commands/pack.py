"""`pack` as functions: a quantized checkpoint in another format, its numbers untouched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.hub import display_name
from quantcli.commands.job import USUAL, Job, JobOptions, job_json, make_job, open_model, run_job
from quantcli.core.errors import InputError, one_of
from quantcli.core.events import SILENT, Progress
from quantcli.core.registry import discover
from quantcli.core.untrusted.names import utf8_fault
from quantcli.core.untrusted.yaml_text import read_yaml

if TYPE_CHECKING:
    from quantcli.convert.execute import Written
    from quantcli.planning.repack import Repacking
    from quantcli.targets.base import Target


def plan_pack(
    checkpoint: str,
    target: str,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    options: JobOptions = USUAL,
    progress: Progress = SILENT,
) -> Job[Repacking]:
    """Check everything that can be checked before the first byte of weights is read.

    out: a folder, or a URL as text. overrides: options of the target, as KEY=VALUE.
    InputError for a checkpoint that `target` cannot hold.
    """
    from quantcli.convert.destination import destination_of

    values = _values(overrides)
    opened = open_model(checkpoint, progress)
    place = destination_of(out, progress)
    place.check(opened.path, force=options.force, what="the checkpoint")
    progress.say(f"planning {checkpoint} in the format {target}")

    from quantcli.planning.repack import plan_repacking

    plan = plan_repacking(opened, _target(target, values))
    from quantcli.commands.explain import explain_job

    job = make_job(plan, place, options.of_run())
    explain_job(job, progress)
    return job


def _values(options: Sequence[str]) -> dict[str, Any]:
    """The options of a target by their keys. InputError for one that is not KEY=VALUE."""
    values: dict[str, Any] = {}
    for option in options:
        if (fault := utf8_fault(option)) is not None:
            raise InputError(fault, where=f"--set {option}", fix="write it in UTF-8")
        key, equals, text = option.partition("=")
        if not equals:
            what, fix = f"`{option}` is not of the form KEY=VALUE", "KEY is an option of the target"
            raise InputError(what, where=f"--set {option}", fix=fix)
        values[key] = read_yaml(text, f"--set {option}").data
    return values


def _target(name: str, values: dict[str, Any]) -> Target:
    """The target `name` with its options. InputError for one that there is not."""
    from pydantic import ValidationError

    from quantcli.targets.base import Target

    targets = discover(Target)
    if name not in targets:
        raise InputError(f"no target `{name}`", where=f"--target {name}", fix=one_of(name, targets))
    try:
        chosen: Target = targets[name].model_validate(values)
        return chosen
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        fields = sorted(targets[name].model_fields)
        fix = "its options: " + ", ".join(fields) if fields else f"target `{name}` has no options"
        what = f"`{key}`: {first['msg'][:1].lower()}{first['msg'][1:]}"
        if first["type"] == "extra_forbidden":
            what = f"unknown key `{key}`"
        raise InputError(what, where=f"--set {key}={values.get(key)}", fix=fix) from None


def pack(job: Job[Repacking], progress: Progress | None = None) -> Written[Repacking]:
    """Write a planned checkpoint. Interrupted, the same job continues where it stopped.

    InputError for numbers that the target would round; nothing is left then.
    """
    return run_job(job, progress, final=True)


def to_json(job: Job[Repacking]) -> dict[str, Any]:
    """A planned job as JSON-able data."""
    plan = job.plan
    return {
        "checkpoint": display_name(plan.checkpoint.path),
        "from": plan.origin.name,
        **job_json(job),
        "state": plan.state,
        "modules": [
            {
                "before": line.before,
                "label": line.label,
                "modules": line.modules,
                "bytes_before": line.nbytes_before,
                "bytes_after": line.nbytes_after,
                "loads_on": line.loads_on,
            }
            for line in plan.lines
        ],
        "copied_tensors": plan.floats,
    }
