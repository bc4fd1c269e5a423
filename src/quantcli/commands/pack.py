"""`pack` as functions: a quantized checkpoint in another format, its numbers untouched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.hub import find_model
from quantcli.convert.execute import Written, execute, run_head
from quantcli.convert.journal import check_folder
from quantcli.convert.publish import check_destination
from quantcli.convert.shards import memory_estimate
from quantcli.core.errors import InputError, one_of
from quantcli.core.events import SILENT, Progress
from quantcli.core.place import check_space, partial_folder
from quantcli.core.registry import discover
from quantcli.core.threads import default_workers
from quantcli.planning.repack import Repacking, plan_repacking
from quantcli.targets.base import Target


@dataclass(frozen=True)
class PackJob:
    """A checkpoint to be packed anew, that was planned and would be accepted."""

    plan: Repacking
    out: Path
    workers: int
    checksum: bool
    fresh: bool
    force: bool
    disk_free: int  # bytes
    memory: int  # bytes above a bare torch import, estimated
    shards_done: int  # whole shards that an interrupted run left


def plan_pack(
    checkpoint: str,
    target: str,
    out: Path,
    *,
    options: Sequence[str] = (),
    workers: int | None = None,
    checksum: bool = True,
    fresh: bool = False,
    force: bool = False,
) -> PackJob:
    """Check everything that can be checked before the first byte of weights is read.

    options: of the target, as KEY=VALUE. InputError for a checkpoint that `target` cannot hold.
    """
    chosen = _target(target, options)
    opened = open_checkpoint(find_model(checkpoint))
    plan = plan_repacking(opened, chosen)
    check_destination(out, opened.path, force=force, what="the checkpoint")
    head = None if fresh else run_head(plan, checksum=checksum)
    done = check_folder(partial_folder(out), head)
    count = workers or default_workers()
    free = check_space(out, plan.nbytes)
    return PackJob(plan, out, count, checksum, fresh, force, free, memory_estimate(plan, count), done)


def _target(name: str, options: Sequence[str]) -> Target:
    targets = discover(Target)
    if name not in targets:
        raise InputError(f"no target `{name}`", where=f"--target {name}", fix=one_of(name, targets))
    values: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            fix = "give KEY=VALUE: an option of the target"
            raise InputError("is no KEY=VALUE", where=f"--set {option}", fix=fix)
        try:
            values[key] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise InputError("value is no YAML", where=f"--set {option}", fix="quote it") from None
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


def pack(job: PackJob, progress: Progress | None = None) -> Written[Repacking]:
    """Write a planned checkpoint. Interrupted, the same job continues where it stopped.

    InputError for numbers that the target would round; nothing is left then.
    """
    return execute(
        job.plan,
        job.out,
        workers=job.workers,
        progress=progress or SILENT,
        fresh=job.fresh,
        force=job.force,
        checksum=job.checksum,
        final=True,
    )


def to_json(job: PackJob) -> dict[str, Any]:
    """A planned job as JSON-able data."""
    plan = job.plan
    return {
        "checkpoint": str(plan.checkpoint.path),
        "out": str(job.out),
        "from": plan.origin.name,
        "target": plan.target.name,
        "state": "lossless",
        "serving_dtype": plan.serving_dtype,
        "digest": plan.digest,
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
        "bytes_before": plan.checkpoint.nbytes,
        "bytes_after": plan.weight_nbytes,
        "shards": [{"file": s.file, "bytes": s.nbytes, "tensors": len(s.tensors)} for s in plan.shards],
        "files": sorted([*plan.sidecars, *plan.copies]),
        "disk_needed": plan.nbytes,
        "disk_free": job.disk_free,
        "memory_needed": job.memory,
        "workers": job.workers,
        "shards_done": job.shards_done,
        "notes": list(plan.notes),
    }
