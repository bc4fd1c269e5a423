"""The command line: the tool's own options and its commands."""

from __future__ import annotations

from typing import Annotated

import typer

from quantcli import __version__
from quantcli.cli.calibrate import calibrate
from quantcli.cli.inspect import inspect
from quantcli.cli.pack import pack
from quantcli.cli.quantize import quantize
from quantcli.cli.verify import verify

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Quantize Hugging Face safetensors checkpoints for serving engines.",
    epilog="Exit codes: 0 done, 1 the answer is no, 2 fix your input, 3 fix your machine, "
    "70 our bug, 130 interrupted.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantcli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the tool itself."""


for _command in (inspect, calibrate, quantize, pack, verify):
    app.command()(_command)
