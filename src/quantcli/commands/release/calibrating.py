"""The calibration of all checkpoints of a release that need one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.calibration.session import Session, prepare_session, run
from quantcli.core.events import Progress

if TYPE_CHECKING:
    from quantcli.calibration.resources import Resources
    from quantcli.planning.plan import Plan


@dataclass(frozen=True)
class Joint:
    """Calibrations in one folder. sessions: by the plan's target and name"""

    folder: Path
    sessions: tuple[Session, ...]

    def of(self, plan: Plan) -> Session | None:
        """The session of a plan; None if it needs none."""
        return next((session for session in self.sessions if session.plan is plan), None)

    def run(self, resources: Resources, progress: Progress) -> None:
        """Run all that are not complete."""
        for session in self.sessions:
            if not session.complete:
                run(session, resources, progress)


def joint_sessions(plans: Sequence[Plan], folder: Path) -> Joint:
    """The calibration of those plans that need one."""
    needing = [plan for plan in plans if plan.needs_calibration]
    return Joint(
        folder, tuple(prepare_session(plan, folder / str(n)) for n, plan in enumerate(needing))
    )
