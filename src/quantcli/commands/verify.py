"""`verify` as a function: its outcome as data, and written to files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import scan_checkpoint
from quantcli.checkpoint.files import PART
from quantcli.core.disk import check_file, write_file
from quantcli.core.errors import InputError
from quantcli.core.events import SILENT, Progress
from quantcli.verification.options import VerifyOptions


def verify(checkpoint: str | Path, *, progress: Progress = SILENT, **options: Any) -> dict[str, Any]:
    """Verify a checkpoint, a folder or a Hub id; the report as JSON-able data, see docs/verify.md.

    options: the other fields of VerifyOptions, such as full=True or against="MODEL". InputError for
    options that do not go together, and for a folder or id without a checkpoint.
    """
    return run(VerifyOptions(checkpoint, **options), progress)


def run(options: VerifyOptions, progress: Progress = SILENT) -> dict[str, Any]:
    """`verify` with its options as one object; the files that they name are written in any case."""
    from quantcli.checkpoint.hub import find_model

    given = options
    folder = _with_weights(find_model(str(options.checkpoint), progress))
    if options.card:
        from quantcli.verification.report.card import check_card

        if folder != Path(options.checkpoint).expanduser():
            what, fix = "--card writes into a folder, and this is a Hub id", "give a folder"
            raise InputError(what, where=str(options.checkpoint), fix=fix)
        check_card(folder)
    if options.recipe is not None:
        from quantcli.recipe.written import read_recipe

        read_recipe(options.recipe)  # again in a moment, with its schemes
    if options.against is not None:
        options = replace(options, against=str(_with_weights(find_model(options.against, progress))))
    for option, file in (("--junit", options.junit), ("--report", options.page)):
        if file is not None:
            check_file(option, file)
            if file.resolve().is_relative_to(folder.resolve()):
                what = "would become part of the checkpoint that is verified"
                raise InputError(what, where=f"{option} {file}", fix="give a file outside of it")
    progress.say(f"verifying {options.checkpoint}: {', '.join(options.depths)}")

    from quantcli.verification.depths import verify as verify_depths

    report = verify_depths(replace(options, checkpoint=folder), progress).to_json()
    report["card_written"] = None
    if options.card:
        from quantcli.verification.report.card import figures, write_card

        if report["ok"]:
            write_card(folder, figures(report, given))
        report["card_written"] = report["ok"]
    if options.junit is not None:
        from quantcli.verification.report.junit import junit

        write_file(options.junit.resolve(), junit(report))
    if options.page is not None:
        from quantcli.verification.report.page import page

        write_file(options.page.resolve(), page(report).encode())
    return report


def _with_weights(folder: Path) -> Path:
    """The folder of a checkpoint. InputError for one without weights, or with a part of them."""
    if (folder / PART).is_file() or not any(folder.glob("*.safetensors")):
        scan_checkpoint(folder)
    return folder
