"""A verification from end to end: the depths that were asked for, each after the ones before."""

from __future__ import annotations

from pathlib import Path

import yaml

from quantcli.checkpoint.files import RECIPE_FILE, SOURCE_RECIPE
from quantcli.checkpoint.hub import find_model
from quantcli.core.events import SILENT, Progress
from quantcli.core.threads import default_workers
from quantcli.recipe.fields import Verify
from quantcli.verification.options import VerifyOptions
from quantcli.verification.outcome import Report
from quantcli.verification.structure import verify_structure


def verify(options: VerifyOptions, progress: Progress = SILENT) -> Report:
    """Verify a checkpoint. Depths after a failed one still run if they can.

    Raises InputError if there is nothing to verify, or nothing to verify it with. Writes no files.
    """
    against = None if options.against is None else find_model(options.against)
    workers = options.workers or default_workers()
    structure = verify_structure(options.checkpoint, options.tp_sizes)
    report = structure.report
    report.limits = _limits(options)
    if structure.stored is None:
        return report
    if options.full:
        from quantcli.verification.full import verify_full

        verify_full(structure, workers, progress)
    if against is None:
        return report
    from quantcli.verification.against import verify_against
    from quantcli.verification.reference import open_reference
    from quantcli.verification.replan import plan_again

    reference = open_reference(against)
    conversion = plan_again(structure, against, options.calibration)
    if options.run:
        from quantcli.verification.on_text import text_batches, verify_run

        # before the long comparison of weights: an error in the text is reported at once
        batches = text_batches(options, reference.checkpoint, progress)
    verify_against(structure, reference, workers, progress)
    if conversion is not None:
        conversion.run(report, workers, progress)
    unreadable = any(error.check in {"headers", "index", "parameters"} for error in report.errors)
    if options.run and not unreadable:
        trust = options.trust_remote_code
        verify_run(structure, reference, batches, workers, progress, trust=trust)
    return report


def _limits(options: VerifyOptions) -> Verify:
    """The limits of the options, else those of the recipe in the checkpoint."""
    given = {key: getattr(options, key) for key in Verify.model_fields}
    given = {key: limit for key, limit in given.items() if limit is not None}
    return _recipe_limits(options.checkpoint).model_copy(update=given)


def _recipe_limits(folder: Path) -> Verify:
    """The `verify` block of the recipe that the checkpoint was made with; defaults if there is none."""
    own = folder / RECIPE_FILE
    try:
        table = yaml.safe_load((own if own.exists() else folder / SOURCE_RECIPE).read_bytes())
        return Verify.model_validate((table or {}).get("verify") or {})
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return Verify()
