"""`calibrate` as functions: check first, then run or resume."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.commands.job import _calibration_folder, _default_name, _load
from quantcli.core.errors import InputError

if TYPE_CHECKING:
    from quantcli.calibration.session import Resources, Session
    from quantcli.core.events import Progress


def plan_calibration(
    recipe: str | Path,
    *,
    model: str | None = None,
    out: Path | None = None,
    overrides: tuple[str, ...] = (),
    fresh: bool = False,
) -> Session:
    """Check everything that can be checked before a calibration reads weights.

    recipe: a file, or the name of a shipped one.
    out: the folder of the calibration; by default it is named after the recipe's output.
    overrides: `KEY=VALUE` strings that win over the recipe. fresh: do not resume.
    Raises InputError for a recipe or a model that cannot be calibrated, or that needs no calibration.
    """
    from quantcli.calibration.session import prepare_session
    from quantcli.planning.planner import make_plan

    loaded, model_name, checkpoint = _load(recipe, model, overrides, "calibrate")
    plan = make_plan(loaded, checkpoint)
    if not plan.needs_calibration:
        raise InputError(
            "nothing in this recipe needs a calibration",
            where=str(recipe),
            fix="`quantcli quantize` converts with it as it is",
        )
    folder = out or _calibration_folder(Path(loaded.file.output or _default_name(model_name, recipe)))
    return prepare_session(plan, folder, fresh=fresh)


def calibrate(
    session: Session,
    resources: Resources | None = None,
    progress: Progress | None = None,
    *,
    fresh: bool = False,
) -> dict[str, Any]:
    """Run or resume a calibration, unless it is complete. Returns its report as JSON-able data."""
    from quantcli.calibration.session import Resources, run, summary
    from quantcli.core.events import SILENT

    if not session.complete:
        run(session, resources or Resources(), progress or SILENT, fresh=fresh)
    return summary(session)
