"""A release, carried out: one calibration, conversions side by side, and proof of what was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantcli.commands.release.planning import Member, Release, check_free, of_entry, state_of
from quantcli.commands.release.verifying import check_text
from quantcli.core.cluster.connect import connected
from quantcli.core.errors import AnswerNo, QuantError
from quantcli.core.events import SILENT, Progress
from quantcli.core.text import count
from quantcli.verification.options import VerifyOptions

if TYPE_CHECKING:
    from quantcli.calibration.resources import Resources
    from quantcli.convert.execute import Written
    from quantcli.planning.plan import Plan


@dataclass(frozen=True)
class MemberOutcome:
    """What became of a checkpoint of a release.

    member:  with the plan that was carried out.
    written: the finished directory; None if it was there already, or is not there.
    error:   why it is not there.
    report:  of its verification; None if there was none.
    """

    member: Member
    written: Written[Plan] | None = None
    error: QuantError | None = None
    report: dict[str, Any] | None = None

    @property
    def status(self) -> str:
        """One word."""
        if self.error is not None:
            return "missed" if isinstance(self.error, AnswerNo) else "failed"
        return "done" if self.written is None else "written"

    @property
    def nbytes(self) -> int:
        """Bytes of its files; 0 if it is not there."""
        if self.error is not None:
            return 0
        return self.member.job.nbytes if self.written is None else self.written.nbytes

    @property
    def ok(self) -> bool:
        """Whether it is there, and passed its verification if there was one."""
        return self.error is None and (self.report is None or bool(self.report["ok"]))


def run_release(
    release: Release, resources: Resources | None = None, progress: Progress = SILENT
) -> list[MemberOutcome]:
    """Calibrate, convert and verify. Interrupted, the same release continues where it stopped.

    What concerns one checkpoint alone, such as NaN in a weight that another recipe keeps float, is in
    its outcome, and the others are written. Raises QuantError for what stops all of them.
    """
    verify = _verification(release, resources)
    if verify is not None and verify.run and release.missing:
        check_text(verify, release.written, release.checkpoint, progress)
    with connected(release.options.executor, progress):
        members = _with_statistics(release, resources, progress)
        outcomes = _converted(release, members, progress)
        return _verified(release, outcomes, verify, progress)


def _with_statistics(
    release: Release, resources: Resources | None, progress: Progress
) -> list[MemberOutcome]:
    """The members after the calibration, with an error if they cannot be written."""
    from quantcli.calibration.resources import Resources
    from quantcli.commands.quantize import check, with_statistics

    if release.joint is not None:
        sessions = tuple(m.job.session for m in release.missing if m.job.session is not None)
        replace(release.joint, sessions=sessions).run(resources or Resources(), progress)
        progress.keeps(f"the calibration {release.joint.folder}", lasting=True)
    outcomes = []
    for member in release.members:
        if member.missed is not None:
            outcomes.append(MemberOutcome(member, error=of_entry(member.entry, member.missed)))
            continue
        job, session, state = member.job, member.job.session, member.state
        try:
            if state != "done" and session is not None and not session.complete:
                plan = with_statistics(job.plan, session)
                job = replace(job, plan=plan, session=replace(session, complete=True))
                check(job)
                if state == "unsure":
                    state = state_of(plan, job.out, is_known=True)
                    if state == "new":
                        check_free(plan, job.out, force=job.options.force)
                    progress.detail(f"checkpoint `{member.name}` is {state}: {job.out}")
            outcomes.append(MemberOutcome(replace(member, job=job, state=state)))
        except QuantError as error:
            failed = replace(member, job=job)
            outcomes.append(MemberOutcome(failed, error=of_entry(member.entry, error)))
    return outcomes


def _converted(
    release: Release, outcomes: Sequence[MemberOutcome], progress: Progress
) -> list[MemberOutcome]:
    """Convert what is still to be written, side by side."""
    from quantcli.convert.execute import Order, execute_all

    todo = [o for o in outcomes if o.error is None and o.member.state != "done"]
    orders = [Order(o.member.job.plan, o.member.job.out, name=o.member.name) for o in todo]
    results = execute_all(orders, release.options.of_run(), progress) if orders else []
    by_name = dict(zip((o.member.name for o in todo), results, strict=True))
    return [_with_result(outcome, by_name.get(outcome.member.name)) for outcome in outcomes]


def _with_result(outcome: MemberOutcome, result: Written[Plan] | QuantError | None) -> MemberOutcome:
    if isinstance(result, QuantError):
        return replace(outcome, error=of_entry(outcome.member.entry, result))
    return replace(outcome, written=result)


def _verification(release: Release, resources: Resources | None) -> VerifyOptions | None:
    """How the checkpoints are verified; None: they are not."""
    options, executor = release.verify, release.options.executor
    if options is None:
        return None
    if executor is not None and options.depths != ("structure",):
        options = replace(options, executor=str(executor))
    trust = resources is not None and resources.trust_remote_code
    return replace(options, trust_remote_code=trust)


def _verified(
    release: Release,
    outcomes: Sequence[MemberOutcome],
    options: VerifyOptions | None,
    progress: Progress,
) -> list[MemberOutcome]:
    """Verify every checkpoint that is there, as the release asks, and write the page.

    Numbers that follow from a calibration are recomputed if they are compared with the model.
    """
    there = [outcome for outcome in outcomes if outcome.error is None]
    if options is None or not there:
        return list(outcomes)
    from quantcli.commands import verify as commands

    progress.phase(f"verifying {count(there, 'checkpoint')}")
    jobs = [outcome.member.job for outcome in there]
    first, *others = [str(job.out) for job in jobs]
    calibrations = None
    if options.against == release.model:
        calibrations = [None if job.session is None else job.session.folder for job in jobs]
    options = replace(options, checkpoint=first, others=others or None)
    try:
        document = commands.run(options, progress, calibrations)
    except QuantError as error:
        names = ", ".join(outcome.member.name for outcome in there)
        what = f"the verification stopped: {error.what}; written, but not verified: {names}"
        if failed := [outcome.error.what for outcome in outcomes if outcome.error is not None]:
            what += f"; not written: {'; '.join(failed)}"
        raise type(error)(what, where=error.where, fix=error.fix) from None
    reports = iter(document["checkpoints"] if others else [document])
    return [o if o.error is not None else replace(o, report=next(reports)) for o in outcomes]
