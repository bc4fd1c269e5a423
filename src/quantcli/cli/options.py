"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_type_hints

import typer

from quantcli.cli.terminal.environment import unknown_variables
from quantcli.core.cluster.executor import THREADS, parse_executor
from quantcli.core.errors import InputError

if TYPE_CHECKING:
    from quantcli.calibration.resources import Resources

PLACES = "Folder to write, hf://ORG/NAME, or s3://BUCKET/FOLDER (gs://, az://)"
Recipe = Annotated[
    str, typer.Argument(help="YAML file, or the name of a shipped recipe: see `quantcli recipes`.")
]
Model = Annotated[
    str | None,
    typer.Option(help="Folder, Hub id or address; wins over the recipe's."),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Calibration to use or to make [default: OUT.calibration; here, if OUT is an address].",
    ),
]
Override = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override the recipe: rules.0.scheme=keep."),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT", help="Text to calibrate on: a file, or datasets:ID; wins over the recipe's."
    ),
]
For = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="DEVICE",
        help="Devices to serve on, such as 2x910B, H100, 8xH100:94GB, cpu; "
        "`quantcli recommend --devices` lists them.",
    ),
]
Device = Annotated[str, typer.Option(help="Device for calibration: cpu, cuda or npu.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory that a calibration may take, such as 8GB, next to that of libraries. It must hold "
        "one decoder layer and its workspace; what is left keeps hidden states "
        "[default: 80 % of free memory].",
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow the model's own Python code to run.")
]
Workers = Annotated[int | None, typer.Option(min=1, max=1024, help="Threads [default: one per core].")]
Executor = Annotated[
    str,
    typer.Option(
        "--executor",
        metavar="WHERE",
        help="Where to work: threads, ray, ray:local, or ray:HOST:PORT. `ray` is the cluster of "
        "RAY_ADDRESS, else that of this machine, else a new one; `ray:local` is a new one. --workers "
        "are then the threads of each task.",
    ),
]
PlanOnly = Annotated[
    bool,
    typer.Option("--plan", help="Print the plan and stop; exit code 0: the run would be accepted."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming OUT.partial.")]
Force = Annotated[
    bool, typer.Option("--force", help="Replace OUT once the new checkpoint is complete.")
]
Checksum = Annotated[bool, typer.Option(help="Hash every file for the manifest.")]
Sign = Annotated[
    Path | None,
    typer.Option(
        "--sign",
        metavar="KEY.pem",
        help="Sign the output; certificates may be in the key's file. See `quantcli sign`.",
    ),
]
HashModel = Annotated[
    bool,
    typer.Option(
        "--hash-model",
        help="Also record the hashes of MODEL's weight files, which are read once more for it.",
    ),
]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE.html", help="Also write one page with charts."),
]


def resources_of(
    device: str, workers: int | None, max_memory: str | None, executor: str = THREADS, *, trust: bool
) -> Resources:
    """The resources for calibration: --device, --workers, --max-memory, --executor and
    --trust-remote-code."""
    from quantcli.calibration.resources import Resources, check_device
    from quantcli.core.threads import default_workers
    from quantcli.recipe.fields import parse_size

    try:
        limit = None if max_memory is None else parse_size(max_memory)
    except ValueError as error:
        what, where = f"`--max-memory`: {error}", f"--max-memory {max_memory}"
        raise InputError(what, where=where, fix="such as --max-memory 8GB") from None
    check_device(device)
    place = parse_executor(executor)
    return Resources(device, workers or default_workers(), limit, trust, place, workers)


Command: TypeAlias = Callable[..., None]


def on_screen(command: Command) -> Command:
    """Give a command the options of what it prints; it takes the `Output` that follows them, as
    `output`."""

    @functools.wraps(command)
    def parsed(
        context: typer.Context, *, quiet: bool, verbose: bool, log_file: Path | None, **values: Any
    ) -> None:
        context.obj.set_up(quiet=quiet, verbose=verbose, log_file=log_file)
        for text in unknown_variables():
            context.obj.warn(text)
        values.pop("as_json")  # the process looks for it itself, as errors come before options are read
        command(output=context.obj, **values)

    parameters = inspect.signature(command, eval_str=True).parameters.values()
    own = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in parameters if p.name != "output"]
    shared = inspect.signature(_screen, eval_str=True).parameters.values()
    parsed.__signature__ = Signature([*own, *shared])  # type: ignore[attr-defined]
    return parsed


def _screen(
    *,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print what is decided, and why.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no messages but errors.")] = False,
    log_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Append every message to a file, with the time; also those that are not printed.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    context: typer.Context,
) -> None:
    """The options that every command has."""


def fields_of(options: type[Any], **shared: Any) -> Callable[[Command], Command]:
    """Give a command the fields of a dataclass as its options; it takes them as its first parameter.

    Metadata of a field are arguments of typer.Option, or of typer.Argument if it has no default.
    shared: annotations for fields without metadata, from above.
    """
    types = get_type_hints(options)

    def parameter(field: Any) -> Parameter:
        name, default = field.name, field.default
        if default is MISSING:
            default = typer.Argument(**field.metadata)
        elif name not in shared:
            flag = [f"--{name.replace('_', '-')}"]  # without it, a bool would be --full/--no-full
            default = typer.Option(default, *flag, **field.metadata)
        annotation = shared.get(name, types[name])
        return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def parsed(**values: Any) -> None:
            chosen = options(**{field.name: values.pop(field.name) for field in fields(options)})
            command(chosen, **values)

        _, *others = inspect.signature(command, eval_str=True).parameters.values()
        own = [other.replace(kind=Parameter.KEYWORD_ONLY) for other in others]
        parsed.__signature__ = Signature([*map(parameter, fields(options)), *own])  # type: ignore[attr-defined]
        return parsed

    return decorate
