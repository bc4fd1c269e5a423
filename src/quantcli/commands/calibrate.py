"""`calibrate` as functions: check first, then run or go on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.commands.job import _calibration_folder, _default_name, _load
from quantcli.core.errors import InputError

if TYPE_CHECKING:
    from quantcli.calibration.session import Resources, Session
    from quantcli.core.events import Progress


def prepare_calibration(
    recipe: Path,
    *,
    model: str | None = None,
    out: Path | None = None,
    overrides: tuple[str, ...] = (),
    fresh: bool = False,
) -> Session:
    """Check all that can be checked before a calibration reads weights."""
    from quantcli.calibration.session import prepare_session
    from quantcli.planning.planner import make_plan

    loaded, named, checkpoint = _load(recipe, model, overrides, "calibrate")
    plan = make_plan(loaded, checkpoint)
    if not plan.needs_calibration:
        raise InputError(
            "nothing in this recipe needs a calibration",
            where=str(recipe),
            fix="`quantcli quantize` converts with it as it is",
        )
    folder = out or _calibration_folder(Path(loaded.file.output or _default_name(named, recipe)))
    return prepare_session(plan, folder, fresh=fresh)


def calibrate(
    session: Session,
    resources: Resources | None = None,
    progress: Progress | None = None,
    *,
    fresh: bool = False,
) -> dict[str, Any]:
    """Run or continue a calibration; its summary, JSON-able. A complete one is not run again."""
    from quantcli.calibration.session import Resources, run, summary
    from quantcli.core.events import SILENT

    if not session.complete:
        run(session, resources or Resources(), progress or SILENT, fresh=fresh)
    return summary(session)
