"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantcli.core.errors import InputError

if TYPE_CHECKING:
    from quantcli.calibration.session import Resources

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no words and no progress on stderr.")]
Device = Annotated[str, typer.Option(help="Where calibration computes: cpu, cuda or npu.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory of a calibration beside the imports, such as 8GB: one decoder layer, the work on "
        "it, and as many hidden states as fit [default: 80 % of what is free].",
    ),
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that came with the model, where it is run."),
]
Model = Annotated[str | None, typer.Option(help="Directory or Hub id; wins over the recipe's.")]
Workers = Annotated[int | None, typer.Option(min=1, max=1024, help="Threads [default: one per core].")]
PlanOnly = Annotated[bool, typer.Option("--plan", help="Show the plan and stop; 0 if it would run.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming OUT.partial.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT, once its successor is whole.")]
Checksum = Annotated[bool, typer.Option(help="Hash every file for the manifest.")]
Report = Annotated[
    Path | None, typer.Option(metavar="FILE.html", help="Write one page with charts, too.")
]


def resources_of(device: str, workers: int | None, max_memory: str | None, *, trust: bool) -> Resources:
    """What --device, --workers, --max-memory and --trust-remote-code ask for."""
    from quantcli.calibration.replay.devices import check_device
    from quantcli.calibration.session import Resources
    from quantcli.core.threads import default_workers
    from quantcli.recipe.fields import parse_size

    try:
        limit = None if max_memory is None else parse_size(max_memory)
    except ValueError as error:
        where = f"--max-memory {max_memory}"
        raise InputError(str(error), where=where, fix="such as --max-memory 8GB") from None
    check_device(device)
    return Resources(device, workers or default_workers(), limit, trust)
