"""`verify` as a function: its outcome as data, and written to files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.checkpoint import scan_checkpoint
from quantcli.checkpoint.files import PART
from quantcli.core.disk import check_file, write_file
from quantcli.core.errors import InputError, named
from quantcli.core.events import SILENT, Progress
from quantcli.core.place import expanded
from quantcli.verification.options import VerifyOptions

if TYPE_CHECKING:  # pydantic is slow to load
    from quantcli.core.cluster.cluster import Cluster
    from quantcli.verification.outcome import Report
    from quantcli.verification.report.baseline import Baseline


def run(
    options: VerifyOptions,
    progress: Progress = SILENT,
    calibrations: Sequence[Path | None] | None = None,
) -> dict[str, Any]:
    """The report on a checkpoint, see docs/verify.md; of several {"ok", "checkpoints": reports}.

    calibrations: of each checkpoint, None for one without; by default that of the options for all.

    The files that the options name are written in any case. InputError for options that do not go
    together, and for a folder or id without a checkpoint.
    """
    from quantcli.checkpoint.hub import find_model

    if options.identity is not None:
        from quantcli.checkpoint.signature.keys import load_identity

        load_identity(options.identity, options.signer)  # again in a moment, after models are fetched
    folders = [find_model(str(each), progress) for each in options.checkpoints]
    if options.identity is None:  # else a file that is missing is what the signature may tell
        folders = [*map(_with_weights, folders)]
    if len({folder.resolve() for folder in folders}) < len(folders):
        what = "names a checkpoint twice"
        raise InputError(what, where=" ".join(map(str, options.checkpoints)), fix="give each once")
    if options.card:
        _check_cards(options, folders)
    if options.recipe is not None:
        from quantcli.recipe.written import read_recipe

        read_recipe(options.recipe)  # again in a moment, with its schemes
    given = options
    if options.against is not None:
        options = replace(options, against=str(_with_weights(find_model(options.against, progress))))
    for option, file in (("--junit", options.junit), ("--report", options.page)):
        if file is not None:
            check_file(option, file)
            if any(file.resolve().is_relative_to(folder.resolve()) for folder in folders):
                what = "would become part of the checkpoint that is verified"
                raise InputError(what, where=f"{option} {file}", fix="give a file outside of it")
    earlier = _earlier(options.baseline, folders, not_worse=options.not_worse)
    reports: list[dict[str, Any]] = []
    calibrations = calibrations or [options.calibration] * len(folders)
    alike = any(own is not None for own in calibrations)
    with _cluster(options, progress, alike=alike) as cluster:
        for folder, name, own in zip(folders, options.checkpoints, calibrations, strict=True):
            progress.say(f"verifying {name}: {', '.join(options.depths)}")
            one = replace(options, checkpoint=folder, others=None, calibration=own, not_worse=False)
            found = _verify(one, earlier, progress, cluster)
            _compare(found, reports[0] if reports else None, not_worse=options.not_worse)
            report = found.to_json()
            report["card_written"] = _write_card(folder, report, given) if options.card else None
            reports.append(report)
    _write(options, reports)
    if len(reports) == 1:
        return reports[0]
    return {"ok": all(report["ok"] for report in reports), "checkpoints": reports}


def _check_cards(options: VerifyOptions, folders: list[Path]) -> None:
    """InputError if --card cannot write into a checkpoint."""
    from quantcli.verification.report.card import check_card

    for folder, name in zip(folders, options.checkpoints, strict=True):
        if folder != expanded(name):
            what, fix = "--card writes into a folder on this machine", "give a folder"
            raise InputError(what, where=str(name), fix=fix)
        check_card(folder)


def _write_card(folder: Path, report: dict[str, Any], options: VerifyOptions) -> bool:
    """Write the figures into the card of a checkpoint that passed. Whether it did."""
    from quantcli.verification.report.card import figures, write_card

    if report["ok"]:
        write_card(folder, figures(report, options))
    return bool(report["ok"])


def _earlier(file: Path | None, folders: list[Path], *, not_worse: bool) -> Baseline | None:
    """The earlier reports to compare with. InputError if one of the folders has none there, or if
    `not_worse` and it holds no windows."""
    if file is None:
        return None
    from quantcli.verification.report.baseline import read_baseline

    baseline = read_baseline(file)
    for folder in folders:
        report = baseline.of(named(str(folder)))
        if not_worse and (report.run is None or not report.run.windows):
            what = "--not-worse compares runs on text, and the earlier report has no windows of a run"
            fix = "give what `verify --run --json` printed, or leave out --not-worse"
            raise InputError(what, where=f"--baseline {file}", fix=fix)
    return baseline


@contextmanager
def _cluster(options: VerifyOptions, progress: Progress, *, alike: bool) -> Iterator[Cluster | None]:
    """The cluster for all checkpoints; None if threads of this process do what is asked for.

    alike: whether the nodes must compute the same numbers from text.
    """
    if options.cluster is None:
        yield None
        return
    if options.depths == ("structure",):
        progress.say(f"headers are read here: --executor {options.executor} has no effect")
        yield None
        return
    if options.run:
        progress.say("--run computes on this machine alone; the nodes do what comes before it")
    from quantcli.core.cluster.connect import connect

    with connect(options.cluster, progress) as cluster:
        if alike:
            cluster.check_alike()
        yield cluster


def _verify(
    options: VerifyOptions, baseline: Baseline | None, progress: Progress, cluster: Cluster | None
) -> Report:
    from quantcli.verification.depths import verify

    report = verify(options, progress, cluster)
    if baseline is not None:
        from quantcli.verification.report.baseline import compare

        report.baseline = compare(report.to_json(), baseline, named(str(options.checkpoint)))
    return report


def _compare(report: Report, first: dict[str, Any] | None, *, not_worse: bool) -> None:
    """Compare a run with that of the first checkpoint. first: its report; None: this is the first.

    not_worse: a worse run is an error, also one that is worse than the baseline.
    """
    if report.run is None:
        return
    from quantcli.verification.on_text.paired import CHECK, check_not_worse, compare_runs

    change = report.baseline
    others = [] if change is None else [(change["checkpoint"], change["paired"])]
    if first is not None and first["run"] is not None:
        compared = compare_runs(first["run"], report.to_json()["run"])
        report.compared = compared and {"checkpoint": first["checkpoint"], **compared}
        others.append((first["checkpoint"], compared))
    for other, comparison in others if not_worse else ():
        report.add(check_not_worse(comparison, other))
        report.count(CHECK, 1)


def _write(options: VerifyOptions, reports: list[dict[str, Any]]) -> None:
    """Write the files that the options name."""
    if options.junit is not None:
        from quantcli.verification.report.junit import junit, junit_of_several

        several = len(reports) > 1
        content = junit_of_several(reports) if several else junit(reports[0])
        write_file(options.junit.resolve(), content)
    if options.page is not None:
        from quantcli.verification.report.dashboard import dashboard
        from quantcli.verification.report.page import page

        text = dashboard(reports) if len(reports) > 1 else page(reports[0])
        write_file(options.page.resolve(), text.encode())


def _with_weights(folder: Path) -> Path:
    """The folder of a checkpoint. InputError for one without weights, or with a part of them."""
    if (folder / PART).is_file() or not any(folder.glob("*.safetensors")):
        scan_checkpoint(folder)
    return folder
