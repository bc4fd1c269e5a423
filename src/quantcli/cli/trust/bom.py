"""`quantcli bom`: its options and its output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantcli.cli import options
from quantcli.cli.output import WARNING, Output


@options.on_screen
def bom(
    output: Output,
    checkpoint: Annotated[
        str, typer.Argument(help="Checkpoint that quantcli wrote: folder, Hub id or address.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="File to write [default: standard output]."),
    ] = None,
) -> None:
    """Write the bill of materials of a checkpoint.

    It names the base model and its licence, the recipe, the text of the calibration, every file with
    its hashes, and quantcli's version, in CycloneDX 1.6. No weights are read: hashes are those of the
    manifest.
    """
    from quantcli.cli.progress import watch
    from quantcli.commands.trust.bom import make_bom

    with watch(output) as progress:
        result = make_bom(checkpoint, out, progress)
    for note in result.notes:
        output.message(f"note: {note}", WARNING)
    if out is not None:
        output.message(f"written: {out}")
    output.result(result.to_dict(), lambda out_, _: None if out else out_.verbatim(result.text))
