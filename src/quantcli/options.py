"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
