"""`inspect` as functions: the contents of a checkpoint, its outliers, supported combinations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from quantcli.checkpoint.checkpoint import open_checkpoint, scan_checkpoint
from quantcli.checkpoint.hub import display_name, find_headers, find_model
from quantcli.checkpoint.inspection import inspect_checkpoint
from quantcli.checkpoint.rotation.summary import recorded
from quantcli.core.disk import check_file, write_file
from quantcli.core.errors import InputError
from quantcli.core.events import SILENT, Progress

if TYPE_CHECKING:  # schemes and targets import torch
    from quantcli.commands.choosing.devices import Device
    from quantcli.schemes.base import Scheme
    from quantcli.targets.base import Target


def inspect(model: str, tensors: str | None = None, progress: Progress = SILENT) -> dict[str, Any]:
    """The contents of a checkpoint, from its headers alone, as JSON-able data.

    Only the headers are fetched of a model on the Hub that is not in its cache.
    tensors: a glob; the tensors that match are listed one by one.
    """
    with find_headers(model, progress) as folder:
        checkpoint = scan_checkpoint(folder, progress)
        summary = inspect_checkpoint(checkpoint, tensors)
        summary["path"] = display_name(checkpoint.path)
        if (rotation := recorded(checkpoint.path)) is not None:
            summary["notes"] = [*summary["notes"], f"{rotation}, says its manifest"]
        if summary["quantization"] is None and "quantization_config" in checkpoint.config:
            # a stale block, or codes that only a target knows by their names: targets load torch
            progress.say("looking for the format of the weights")
            from quantcli.targets.base import quantization_of

            if (found := quantization_of(checkpoint)) is not None:
                summary["quantization"] = asdict(found)
        return summary


def support(progress: Progress = SILENT, device: str | None = None) -> list[dict[str, Any]]:
    """Every pair of scheme and target, tried by quantizing and packing a weight without data.

    Each entry has `scheme`, `target`, `supported` and `options`, and either `label`, `loads_on` and the
    `tensors` of a weight [256, 256], or `why` it is not supported. options: those that the scheme needs
    with this target; empty if its usual ones do.

    device: such as `2x910B`: only pairs that its engine has kernels for, with what these do for linears
    as `kernels` and for experts as `expert_kernels`, each None if there is no kernel. InputError for an
    unknown device.
    """
    from quantcli.commands.choosing.devices import parse_device

    served = None if device is None else parse_device(device)
    progress.say("trying each scheme with each target")
    from quantcli.core.registry import discover
    from quantcli.schemes.base import Scheme
    from quantcli.targets.base import Target

    cells = []
    for name, scheme_class in discover(Scheme).items():
        for target_name, target_class in discover(Target).items():
            tried = (_cell(*variant, target_class()) for variant in _variants(scheme_class))
            usual = next(tried)
            cell = usual if usual["supported"] else next((c for c in tried if c["supported"]), usual)
            cells.append({"scheme": name, "target": target_name} | cell)
    return cells if served is None else list(_served(cells, served))


def _served(cells: list[dict[str, Any]], device: Device) -> Iterator[dict[str, Any]]:
    """The pairs that a device's engine has kernels for."""
    for cell in cells:
        if cell["supported"]:
            place = cell["target"], cell["label"]
            kernels, expert = device.kernel(*place), device.kernel(*place, expert=True)
            if kernels or expert:
                yield {**cell, "kernels": kernels, "expert_kernels": expert}


def _variants(scheme_class: type[Scheme]) -> Iterator[tuple[Scheme, dict[str, Any]]]:
    """A scheme with its usual options, and what these leave to the target; then with each other value
    of an option that changes its numerics. Next to each, the options to set."""
    usual = scheme_class()
    yield usual, {}
    yield from ((choice, {}) for choice in usual.choices)
    for name, field in scheme_class.model_fields.items():
        values = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        for value in values:
            option = {field.alias or name: value}
            scheme = scheme_class.model_validate(option)
            if scheme.numerics != usual.numerics:
                yield scheme, option


def _cell(scheme: Scheme, options: dict[str, Any], target: Target) -> dict[str, Any]:
    """Whether a target can store a weight of a scheme, and how."""
    from quantcli.checkpoint.spec import TensorSpec
    from quantcli.planning.items import dry_run

    try:
        label = target.label(scheme.numerics)
        weight = TensorSpec("weight", "BF16", (256, 256))
        outputs = dry_run(scheme, target, weight, "BF16").outputs
    except InputError as error:
        return {"supported": False, "options": {}, "why": error.what}
    specs = [output.spec for output in outputs]
    tensors = {s.name: {"dtype": s.dtype, "shape": s.shape} for s in specs}
    return {
        "supported": True, "options": options, "label": label, "loads_on": target.loads_on(label),
        "tensors": tensors,
    }  # fmt: skip


def outliers(model: str, progress: Progress = SILENT, page: Path | None = None) -> dict[str, Any]:
    """The weights of a checkpoint, hardest to quantize first: see `planning.outliers`.

    page: an HTML file for the same result with charts. InputError if it cannot be written.
    """
    if page is not None:
        check_file("--report", page)
    checkpoint = open_checkpoint(find_model(model, progress), progress)
    progress.say(f"ranking the weights of {model}")

    from quantcli.core.registry import discover
    from quantcli.planning.outliers import inspect_outliers
    from quantcli.targets.base import Target

    target = discover(Target)["ascend"]()
    ranking = inspect_outliers(checkpoint, target, progress=progress)
    if page is not None:
        from quantcli.verification.report.outliers import outliers_page

        write_file(page.resolve(), outliers_page(display_name(checkpoint.path), ranking).encode())
    return ranking
