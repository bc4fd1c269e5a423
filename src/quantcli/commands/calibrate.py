"""`calibrate` as functions: check first, then run or resume."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.commands.job import (
    USUAL,
    JobOptions,
    calibration_folder,
    default_name,
    open_both,
)
from quantcli.core.errors import InputError
from quantcli.core.events import SILENT, Progress
from quantcli.core.place import check_calibration

if TYPE_CHECKING:
    from quantcli.calibration.resources import Resources
    from quantcli.calibration.session import Session
    from quantcli.calibration.text.examples import Examples
    from quantcli.checkpoint.checkpoint import Checkpoint
    from quantcli.recipe.written import GivenRecipe


def plan_calibration(
    recipe: GivenRecipe,
    *,
    model: str | Checkpoint | None = None,
    out: Path | None = None,
    overrides: tuple[str, ...] = (),
    options: JobOptions = USUAL,
    examples: Examples | None = None,
    progress: Progress = SILENT,
) -> Session:
    """Check everything that can be checked before a calibration reads weights.

    recipe: a file, the name of a shipped one, or a mapping with a file's content.
    out: the folder of the calibration; by default it is named after the recipe's output.
    overrides: `KEY=VALUE` strings that win over the recipe.
    options: `fresh`, which does not resume, and `trust_remote_code` count.
    examples: the data, in place of what the recipe names.
    Raises InputError for a recipe or a model that cannot be calibrated, or that needs no calibration.
    """
    overrides += () if examples is None else examples.overrides
    opened = open_both(recipe, model, overrides, "calibrate", progress)
    from quantcli.convert.destination import destination_of

    written = opened.written
    place = written.file.output
    place = default_name(opened.model, recipe) if place is None else place
    folder = out or calibration_folder(destination_of(place))
    check_calibration(folder, opened.checkpoint.path, None)
    from quantcli.recipe.written import name_of

    progress.say(f"planning {name_of(recipe)} for {opened.model}")

    from quantcli.calibration.rotation.basis import in_basis
    from quantcli.calibration.session import prepare_session
    from quantcli.planning.planner import make_plan
    from quantcli.recipe.recipe import resolve

    resolved = resolve(written)
    trust = options.trust_remote_code
    plan = make_plan(resolved, in_basis(resolved, opened.checkpoint, trust_remote_code=trust))
    if not plan.needs_calibration:
        raise InputError(
            "nothing in this recipe needs a calibration",
            where=name_of(recipe),
            fix="`quantcli quantize` converts with it as it is",
        )
    session = prepare_session(plan, folder, fresh=options.fresh, examples=examples)
    from quantcli.commands.explain import explain_plan, explain_session

    explain_plan(plan, progress)
    explain_session(session, progress)
    return session


def calibrate(
    session: Session,
    resources: Resources | None = None,
    progress: Progress | None = None,
    *,
    fresh: bool = False,
) -> dict[str, Any]:
    """Run or resume a calibration, unless it is complete. Returns its report as JSON-able data."""
    from quantcli.calibration.resources import Resources
    from quantcli.calibration.session import run, summary

    if not session.complete:
        run(session, resources or Resources(), progress or SILENT, fresh=fresh)
    return summary(session)
