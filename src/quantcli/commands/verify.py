"""`verify` as a function: its outcome as data, and written to files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.core.disk import check_file, write_file
from quantcli.core.errors import InputError
from quantcli.verification.options import VerifyOptions

if TYPE_CHECKING:
    from quantcli.core.events import Progress


def verify(
    checkpoint: str | Path, *, progress: Progress | None = None, **options: Any
) -> dict[str, Any]:
    """Verify a checkpoint, a folder or a Hub id; the report as JSON-able data, see docs/verify.md.

    options: the other fields of VerifyOptions, such as full=True or against="MODEL". InputError for
    options that do not go together, and for a folder or id without a checkpoint.
    """
    return run(VerifyOptions(checkpoint, **options), progress)


def run(options: VerifyOptions, progress: Progress | None = None) -> dict[str, Any]:
    """`verify` with its options as one object; the files that they name are written in any case."""
    from quantcli.checkpoint.hub import find_model
    from quantcli.core.events import SILENT
    from quantcli.verification.depths import verify as verify_depths

    folder = find_model(str(options.checkpoint))
    for option, file in (("--junit", options.junit), ("--report", options.page)):
        if file is not None:
            check_file(option, file)
            if file.resolve().is_relative_to(folder.resolve()):
                what = "would become part of the checkpoint that is verified"
                raise InputError(what, where=f"{option} {file}", fix="give a file outside of it")
    if options.page is not None:
        from quantcli.verification.report.page import require_plotly

        require_plotly()
    report = verify_depths(replace(options, checkpoint=folder), progress or SILENT).to_json()
    if options.junit is not None:
        from quantcli.verification.report.junit import junit

        write_file(options.junit.resolve(), junit(report))
    if options.page is not None:
        from quantcli.verification.report.page import page

        write_file(options.page.resolve(), page(report).encode())
    return report
