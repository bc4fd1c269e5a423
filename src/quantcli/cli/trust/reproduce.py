"""`quantcli reproduce`: its options and its output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantcli.cli import options
from quantcli.cli.output import FAILED, OK, WARNING, Output
from quantcli.core.cluster.executor import THREADS
from quantcli.core.errors import AnswerNo
from quantcli.core.text import count
from quantcli.core.text import size as size_text

_SHOWN = 10  # differences


@options.on_screen
def reproduce(
    output: Output,
    checkpoint: Annotated[str, typer.Argument(metavar="OUT", help="Folder, Hub id or address.")],
    model: Annotated[str, typer.Option(help="Folder, Hub id or address that OUT was made of.")],
    data: options.Data = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Calibration to use, in place of running the text; or to make."
        ),
    ] = None,
    device: options.Device = "cpu",
    max_memory: options.MaxMemory = None,
    workers: options.Workers = None,
    executor: options.Executor = THREADS,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over instead of resuming OUT.reproduction.")
    ] = False,
    trust_remote_code: options.Trust = False,
) -> None:
    """Make a checkpoint again by its own recipe, and compare every byte.

    Exits with 1 at a difference, and names the first one; with 2 if model, tokenizer or text are not
    those that OUT records. No second copy is written. The same command again resumes.
    """
    from quantcli.cli.progress import watch
    from quantcli.commands.trust import reproduce as commands

    resources = options.resources_of(device, workers, max_memory, executor, trust=trust_remote_code)
    wish = commands.Wish(checkpoint, model, data, None, calibration, fresh)
    with watch(output) as progress:
        report = commands.run(wish, resources, progress)
    output.result(report, show_reproduction, _failure(report))


def show_reproduction(out: Output, report: dict[str, Any]) -> None:
    """Print the outcome: differences, notes, and last the verdict."""
    from quantcli.verification.again.whole import Unlike

    for row in report["differences"][:_SHOWN]:
        index = None if row["index"] is None else tuple(row["index"])
        out.line(f"DIFFERENT    {Unlike(**{**row, 'index': index})}", FAILED)
    if (more := len(report["differences"]) - _SHOWN) > 0:
        out.line(f"DIFFERENT    and {more} more, with --json")
    out.line(f"made by      {report['made_by']}")
    for note in report["notes"]:
        out.line(f"note         {note}", WARNING)
    compared = f"{count(report['files'], 'file')}, {count(report['tensors'], 'tensor')}"
    if report["ok"]:
        out.line(f"identical: {report['checkpoint']}: {compared}, {size_text(report['bytes'])}", OK)
    else:
        differ = count(report["differences"], "difference")
        out.line(f"DIFFERENT: {report['checkpoint']}: {differ} in {compared}", FAILED)


def _failure(report: dict[str, Any]) -> AnswerNo | None:
    """The answer no, with the first difference; None without any."""
    if report["ok"]:
        return None
    return AnswerNo(
        f"the checkpoint is not what its recipe makes: {report['summary']}",
        where=report["checkpoint"],
        fix="`differences` has each; use the versions that `made_by` names, or copy OUT again",
    )
