"""The command line: options of the tool itself, and its commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from quantcli import __version__
from quantcli.cli.calibrate import calibrate
from quantcli.cli.inspect import inspect
from quantcli.cli.output import Output
from quantcli.cli.pack import pack
from quantcli.cli.quantize import quantize
from quantcli.cli.recipes import recipes
from quantcli.cli.recommend import recommend
from quantcli.cli.release import release
from quantcli.cli.terminal.environment import HELP
from quantcli.cli.trust.bom import bom
from quantcli.cli.trust.reproduce import reproduce
from quantcli.cli.trust.sign import sign
from quantcli.cli.verify import verify
from quantcli.core.errors import InputError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize Hugging Face safetensors checkpoints for serving engines.",
    epilog="\b\nEnvironment:\n"
    + "".join(f"  {name:<17} {text}\n" for name, text in HELP.items())
    + "\nExit codes: 0 done, 1 the answer is no, 2 fix your input, 3 fix your machine, "
    "70 our bug, 130 interrupted.",
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --version: print one JSON document.")
    ] = False,
    install_completion: Annotated[
        bool, typer.Option("--install-completion", help="Install completion in your shell.")
    ] = False,
    show_completion: Annotated[
        bool, typer.Option("--show-completion", help="Print the script for that.")
    ] = False,
) -> None:
    """Options of the tool itself."""
    if version:
        document = {"version": __version__}
        if as_json:
            Output(as_json=True).document(document)
        else:
            sys.stdout.write(f"quantcli {__version__}\n")
        raise typer.Exit
    if as_json:
        raise InputError("--json needs a command before it", fix="quantcli COMMAND --json")
    if install_completion or show_completion:
        from quantcli.cli.terminal import completion
    if install_completion:
        file, start = completion.install()
        read_by = f", which {start} reads" if start else ""
        context.obj.message(f"wrote {file}{read_by}: completion works in the next shell that you start")
        raise typer.Exit
    if show_completion:
        context.obj.verbatim(completion.script())
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise InputError("argument COMMAND is missing", fix="see `quantcli --help`")


for _command in (
    recommend, inspect, calibrate, quantize, release, pack, verify, reproduce, sign, bom, recipes,
):  # fmt: skip
    app.command()(_command)
