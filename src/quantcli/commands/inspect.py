"""`inspect` as functions: the contents of a checkpoint, its outliers, supported combinations."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import open_checkpoint, scan_checkpoint
from quantcli.checkpoint.hub import find_model
from quantcli.checkpoint.inspection import inspect_checkpoint
from quantcli.core.disk import check_file, write_file
from quantcli.core.errors import InputError
from quantcli.core.events import SILENT, Progress


def inspect(model: str, tensors: str | None = None, progress: Progress = SILENT) -> dict[str, Any]:
    """The contents of a checkpoint, from its headers alone, as JSON-able data.

    tensors: a glob; the tensors that match are listed one by one.
    """
    checkpoint = scan_checkpoint(find_model(model, progress), progress)
    summary = inspect_checkpoint(checkpoint, tensors)
    if summary["quantization"] is None and "quantization_config" in checkpoint.config:
        # a stale block, or codes that only a target knows by their names: targets load torch
        progress.say("looking for the format of the weights")
        from quantcli.targets.base import quantization_of

        if (found := quantization_of(checkpoint)) is not None:
            summary["quantization"] = asdict(found)
    return summary


def support(progress: Progress = SILENT) -> list[dict[str, Any]]:
    """Every pair of scheme and target, tried by quantizing and packing a weight without data.

    Each entry has `scheme`, `target` and `supported`, and either `label`, `loads_on` and the `tensors`
    of a weight [256, 256], or `why` it is not supported.
    """
    progress.say("trying each scheme with each target")
    from quantcli.checkpoint.spec import TensorSpec
    from quantcli.core.registry import discover
    from quantcli.planning.items import dry_run
    from quantcli.schemes.base import Scheme
    from quantcli.targets.base import Target

    cells = []
    for scheme_name, scheme_class in discover(Scheme).items():
        for target_name, target_class in discover(Target).items():
            scheme, target = scheme_class(), target_class()
            cell: dict[str, Any] = {"scheme": scheme_name, "target": target_name}
            try:
                weight = TensorSpec("weight", "BF16", (256, 256))
                outputs = dry_run(scheme, target, weight, "BF16").outputs
                label = target.label(scheme.numerics)
                cell |= {"supported": True, "label": label, "loads_on": target.loads_on(label)}
                specs = [output.spec for output in outputs]
                cell["tensors"] = {s.name: {"dtype": s.dtype, "shape": s.shape} for s in specs}
            except InputError as error:
                cell |= {"supported": False, "why": error.what}
            cells.append(cell)
    return cells


def outliers(model: str, progress: Progress = SILENT, page: Path | None = None) -> dict[str, Any]:
    """The weights of a checkpoint, hardest to quantize first: see `planning.outliers`.

    page: an HTML file for the same result with charts. InputError if it cannot be written.
    """
    if page is not None:
        from quantcli.verification.report.page import require_plotly

        require_plotly()
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

        write_file(page.resolve(), outliers_page(str(checkpoint.path), ranking).encode())
    return ranking
