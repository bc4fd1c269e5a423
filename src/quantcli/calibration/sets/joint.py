"""The calibrations of several recipes for one model: one replay for all that see the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantcli.calibration.resources import Resources
from quantcli.calibration.session import Session, prepare_session, run_together
from quantcli.calibration.sets.identity import digest_of
from quantcli.calibration.text.dataset import Dataset
from quantcli.calibration.text.examples import Examples
from quantcli.core.events import Progress
from quantcli.core.text import count
from quantcli.planning.plan import Plan


@dataclass(frozen=True)
class Joint:
    """Calibrations that were checked as far as headers and files allow.

    folder:   of all of them. Each of them is what its recipe alone would have made.
    sessions: one for each plan that needs a calibration, in the order of the plans; those of plans
              that ask for the same have one folder.
    """

    folder: Path
    sessions: tuple[Session, ...]

    def of(self, plan: Plan) -> Session | None:
        """The session of a plan; None if it needs none."""
        return next((session for session in self.sessions if session.plan is plan), None)

    @property
    def groups(self) -> tuple[tuple[Session, ...], ...]:
        """The sessions that are measured together, as their layers are given the same inputs; each
        folder once. Groups are run one after another."""
        folders: dict[Path, Session] = {}
        for session in self.sessions:
            folders.setdefault(session.folder, session)
        groups: dict[str, list[Session]] = {}
        for session in folders.values():
            key = session.key
            alone = "" if key.float_inputs else key.digest
            groups.setdefault(digest_of([key.data, key.inputs, alone]), []).append(session)
        return tuple(map(tuple, groups.values()))

    def explain(self) -> Iterator[str]:
        """Lines for people: what is measured together, and what was there."""
        for group in self.groups:
            todo = [session for session in group if not session.complete]
            names = [", ".join(s.name for s in self.sessions if s.folder == t.folder) for t in todo]
            if todo:
                passes = (
                    "one replay of the layers for " if len(todo) > 1 else "a replay of the layers for "
                )
                yield passes + "; ".join(names)
            done = [session for session in group if session.complete]
            if done:
                yield f"{count(done, 'calibration')} of {self.folder} is used: " + ", ".join(
                    session.name for session in done
                )

    def run(self, resources: Resources, progress: Progress) -> None:
        """Calibrate. Interrupted, the same call goes on after the last finished layer.

        Raises InputError and MachineError for the text, the model, the memory and the device.
        """
        for line in self.explain():
            progress.detail(line)
        groups = [[s for s in group if not s.complete] for group in self.groups]
        groups = [group for group in groups if group]
        texts: dict[str, Dataset] = {}
        for number, group in enumerate(groups):
            later = [other[0] for other in groups[number + 1 :]]
            run_together(group, resources, progress, later=later, texts=texts)


def joint_sessions(plans: Sequence[Plan], folder: Path, *, examples: Examples | None = None) -> Joint:
    """Run all checks that need no weights. plans: of one model, some of which need no calibration.
    examples: the data, in place of what the recipes name.

    InputError for data that is not named or does not exist; and if `folder` is not a calibration, or
    one of another model.
    """
    sessions: list[Session] = []
    for plan in plans:
        if plan.needs_calibration:
            sessions.append(prepare_session(plan, folder, examples=examples, others=sessions))
    return Joint(folder, tuple(sessions))
