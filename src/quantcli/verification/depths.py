"""A verification from end to end: the depths that were asked for, each after the ones before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from quantcli import __version__
from quantcli.checkpoint.files import RECIPE_FILE, SOURCE_RECIPE
from quantcli.core.errors import InputError
from quantcli.core.events import SILENT, Progress
from quantcli.recipe.fields import Verify
from quantcli.verification.outcome import Report
from quantcli.verification.structure import verify_structure

if TYPE_CHECKING:
    from quantcli.calibration.text.dataset import Batch
    from quantcli.verification.reference import Reference


@dataclass(frozen=True)
class VerifyOptions:
    """What to verify, and how deep.

    against:  the model to compare with. run: also on text, the first `samples` windows of `length`
              tokens of `data`.
    limits:   min_sqnr (dB), max_ppl_ratio, max_kl; None: the recipe's, else the defaults.
    """

    path: Path
    full: bool = False
    against: Path | None = None
    run: bool = False
    data: str | None = None
    samples: int = 32
    length: int = 256
    tp: tuple[int, ...] = (1,)
    min_sqnr: float | None = None
    max_ppl_ratio: float | None = None
    max_kl: float | None = None
    workers: int = 1
    trust_remote_code: bool = False


def verify(options: VerifyOptions, progress: Progress = SILENT) -> Report:
    """Verify a checkpoint. Depths after a failed one still run where they can.

    Raises InputError where there is nothing to verify or to verify it with.
    """
    _check(options)
    structure = verify_structure(options.path, options.tp)
    report = structure.report
    report.limits = _limits(options)
    if structure.stored is None:
        return report
    if options.full:
        from quantcli.verification.full import verify_full

        verify_full(structure, options.workers, progress)
    if options.against is None:
        return report
    from quantcli.verification.against import verify_against
    from quantcli.verification.reference import open_reference

    reference = open_reference(options.against)
    batches = _batches(options, reference, progress) if options.run else ()  # or what is wrong with it
    verify_against(structure, reference, report.limits["min_sqnr"], options.workers, progress)
    # what cannot be read cannot be run
    if options.run and not any(f.check in {"headers", "index", "parameters"} for f in report.errors):
        from quantcli.verification.on_text import verify_run

        trust, limits = options.trust_remote_code, report.limits
        verify_run(structure, reference, batches, limits, options.workers, progress, trust=trust)
    return report


def _batches(options: VerifyOptions, reference: Reference, progress: Progress) -> Sequence[Batch]:
    from quantcli.verification.on_text import text_batches

    assert options.data is not None
    return text_batches(
        options.data,
        reference.checkpoint,
        options.samples,
        options.length,
        trust=options.trust_remote_code,
        progress=progress,
    )


def document(report: Report) -> dict[str, Any]:
    """The report as JSON-able data."""
    return report.document(f"quantcli {__version__}")


def _check(options: VerifyOptions) -> None:
    if options.run and options.against is None:
        raise InputError(
            "--run compares two models, and there is one", fix="give the float one: --against MODEL"
        )
    if options.run and options.data is None:
        raise InputError("--run needs text", fix="give --data FILE: text, or jsonl with `text`")
    needs = {
        "--data": (options.data, options.run, "--run"),
        "--max-ppl-ratio": (options.max_ppl_ratio, options.run, "--run"),
        "--max-kl": (options.max_kl, options.run, "--run"),
        "--min-sqnr": (options.min_sqnr, options.against is not None, "--against MODEL"),
    }
    for option, (value, there, other) in needs.items():
        if value is not None and not there:
            raise InputError(f"{option} has no effect without {other}", fix=f"add {other}")


def _limits(options: VerifyOptions) -> dict[str, float | None]:
    """The command line's, else those of the recipe that lies in the checkpoint."""
    found = _recipe_limits(options.path)
    given = {key: getattr(options, key) for key in ("min_sqnr", "max_ppl_ratio", "max_kl")}
    return {key: getattr(found, key) if value is None else value for key, value in given.items()}


def _recipe_limits(folder: Path) -> Verify:
    """The `verify` block of a recipe as it was applied; the defaults where there is none."""
    own = folder / RECIPE_FILE
    try:
        table = yaml.safe_load((own if own.exists() else folder / SOURCE_RECIPE).read_bytes())
        return Verify.model_validate((table or {}).get("verify") or {})
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return Verify()
