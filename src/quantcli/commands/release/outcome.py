"""A release as data: what would be written, and what was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantcli.commands.release.planning import Member, Release
from quantcli.commands.release.running import MemberOutcome
from quantcli.commands.results import Planned, Result, Row, Verification
from quantcli.commands.steps import planned_of
from quantcli.core.errors import AnswerNo, QuantError


@dataclass(frozen=True, kw_only=True)
class PlannedCheckpoint(Result):
    """A checkpoint of a release that would be written.

    name:   of the checkpoint.
    recipe: as the release names it.
    state:  new; done: it is there; unsure: it is there, and the calibration will tell.
    error:  "what", "where" and "fix" if the plan misses a limit of `expect`; it is not written then.
    plan:   what would be written.
    """

    name: str
    recipe: str
    state: str
    error: Row | None
    plan: Planned


@dataclass(frozen=True, kw_only=True)
class PlannedRelease(Result):
    """What `release` would write; `plan` of its document.

    model:         as the user named it.
    calibration:   the folder of the calibration; None if no checkpoint needs data.
    disk_needed:   bytes of all checkpoints that are still to be written.
    memory_needed: bytes, next to those of torch.
    checkpoints:   each of them.
    notes:         remarks on the release.
    """

    model: str
    calibration: Path | None
    disk_needed: int
    memory_needed: int
    checkpoints: list[PlannedCheckpoint]
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class ReleasedCheckpoint(Result):
    """What became of a checkpoint of a release.

    name:         of the checkpoint.
    recipe:       as the release names it.
    status:       written; done: it was there already; missed: a limit of `expect`; failed.
    out:          the checkpoint.
    bytes:        of all its files; 0 if it is not there.
    shards_reused: weight files of an interrupted run.
    notes:        remarks on its conversion.
    error:        "what", "where" and "fix" of what went wrong; None if it is there.
    plan:         what was to be written.
    verification: its outcome; None if it was not verified.
    """

    name: str
    recipe: str
    status: str
    out: Path | str
    bytes: int
    shards_reused: int
    notes: list[str]
    error: Row | None
    plan: Planned
    verification: Verification | None


@dataclass(frozen=True, kw_only=True)
class Released(Result):
    """What `release` has done.

    ok:          whether every checkpoint is there, and passed its verification.
    model:       as the user named it.
    calibration: the folder of the calibration; None if no checkpoint needed data.
    checkpoints: each of them.
    """

    ok: bool
    model: str
    calibration: Path | None
    checkpoints: list[ReleasedCheckpoint]


def planned(release: Release) -> PlannedRelease:
    """A release that was planned."""
    return PlannedRelease(
        model=release.model,
        calibration=_folder(release),
        disk_needed=sum(m.job.room.needed for m in release.missing if m.job.room is not None),
        memory_needed=release.memory,
        checkpoints=[_planned(member) for member in release.members],
        notes=list(release.notes),
    )


def _planned(member: Member) -> PlannedCheckpoint:
    return PlannedCheckpoint(
        name=member.name,
        recipe=member.entry.recipe,
        state=member.state,
        error=_row(member.missed),
        plan=planned_of(member.job),
    )


def released(release: Release, outcomes: Sequence[MemberOutcome]) -> Released:
    """A release that was carried out."""
    return Released(
        ok=all(outcome.ok for outcome in outcomes),
        model=release.model,
        calibration=_folder(release),
        checkpoints=[_released(outcome) for outcome in outcomes],
    )


def _released(outcome: MemberOutcome) -> ReleasedCheckpoint:
    member, written = outcome.member, outcome.written
    planned_notes = member.job.plan.notes
    return ReleasedCheckpoint(
        name=member.name,
        recipe=member.entry.recipe,
        status=outcome.status,
        out=member.job.out.value,
        bytes=outcome.nbytes,
        shards_reused=written.shards_reused if written else 0,
        notes=[note for note in (written.notes if written else ()) if note not in planned_notes],
        error=_row(outcome.error),
        plan=planned_of(member.job),
        verification=None if outcome.report is None else Verification(**outcome.report),
    )


def _folder(release: Release) -> Path | None:
    return None if release.joint is None else release.joint.folder


def _row(error: QuantError | None) -> Row | None:
    return None if error is None else {"what": error.what, "where": error.where, "fix": error.fix}


def failure(outcomes: Sequence[MemberOutcome]) -> QuantError | None:
    """What stands for all that went wrong; None if nothing did.

    An error of the machine or of the input comes before a limit that was missed, since the same command
    can go on after it.
    """
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    failed = [error for error in errors if not isinstance(error, AnswerNo)]
    there = [outcome.member.name for outcome in outcomes if outcome.error is None]
    done = f"done: {', '.join(there)}" if there else "no checkpoint is done"
    if failed:
        kind, count = type(failed[0]), len(failed)
        what = failed[0].what + (f"; and {count - 1} more failed" if count > 1 else "")
        fix = f"{failed[0].fix}; " if failed[0].fix else ""
        fix += "then the same command makes what is missing"
        return kind(f"{what}; {done}", where=failed[0].where, fix=fix)
    if errors:
        what = errors[0].what + (f"; and {len(errors) - 1} more" if len(errors) > 1 else "")
        return AnswerNo(f"{what}; {done}", where=errors[0].where, fix=errors[0].fix)
    unsound = [outcome.member for outcome in outcomes if not outcome.ok]
    if unsound:
        names = ", ".join(member.name for member in unsound)
        places = ", ".join(str(member.job.out) for member in unsound)
        what = f"verification failed: {names}"
        return AnswerNo(what, where=places, fix="`findings` of each has its errors, with their fixes")
    return None
