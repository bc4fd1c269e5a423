"""The command line: options, then commands, then console. Nothing else happens here."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantcli import __version__
from quantcli.cli_pack import pack
from quantcli.core.errors import Exit, InputError
from quantcli.options import (
    Checksum,
    Device,
    Force,
    Fresh,
    Json,
    MaxMemory,
    Model,
    PlanOnly,
    Quiet,
    Report,
    Trust,
    Workers,
)

if TYPE_CHECKING:
    from quantcli.calibration.session import Resources

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


@app.command()
def inspect(
    model: Annotated[str | None, typer.Argument(help="Directory or Hub id.")] = None,
    tensors: Annotated[
        str | None, typer.Option(metavar="GLOB", help="List the tensors that match.")
    ] = None,
    outliers: Annotated[
        bool,
        typer.Option("--outliers", help="Read the weights: which are hard to quantize, worst first."),
    ] = False,
    report: Report = None,
    support: Annotated[bool, typer.Option("--support", help="Show schemes x targets instead.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds.

    Reads headers only: layers, dtypes, sizes, parameters, quantization. Exits 1 when something is
    suspicious: a missing shard, an index that disagrees. `--outliers` reads the weights too,
    decoded where the checkpoint is quantized, and says which a recipe had better keep float.
    """
    from quantcli import console, outlier_table, progress
    from quantcli.commands import quantize as commands
    from quantcli.commands import verify as verifying

    out = console.Output(as_json=as_json)
    if support:
        if model is not None or tensors is not None or outliers or report:
            raise InputError(
                "--support takes no model and no other option but --json",
                fix="quantcli inspect --support",
            )
        cells = commands.support()
        out.document(cells) if as_json else console.show_support(out, cells)
        return
    if model is None:
        raise InputError("no model to inspect", fix="quantcli inspect MODEL")
    if report is not None and not outliers:
        raise InputError("--report needs --outliers", where=f"--report {report}", fix="add --outliers")
    if outliers:
        if tensors is not None:
            raise InputError(
                "--outliers takes no --tensors", fix=f"quantcli inspect --outliers {model}"
            )
        with progress.watch(out) as watcher:
            account = verifying.outliers(model, watcher, report)
        out.document(account) if as_json else outlier_table.show_outliers(out, account)
        return
    account = commands.inspect(model, tensors)
    out.document(account) if as_json else console.show_inspection(out, account)
    if account["problems"]:
        raise typer.Exit(Exit.ANSWER_NO)


@app.command()
def quantize(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option(help="Output directory [default: MODEL-RECIPE here].")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override the recipe: rules.0.scheme=keep."),
    ] = None,
    plan: PlanOnly = False,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Write the I-th of N parts to OUT.part-I-of-N, for `quantcli pack --merge`.",
        ),
    ] = None,
    workers: Workers = None,
    fresh: Fresh = False,
    force: Force = False,
    checksum: Checksum = True,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Calibration to use or to make [default: OUT.calibration]."),
    ] = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint as a recipe says. The same command again resumes an interrupted run.

    Several machines: run it with --part 1/N to N/N, each where it likes, and put the parts together
    with `quantcli pack --merge`. Parts of a recipe that calibrates need one --calibration.
    """
    from quantcli import console, progress
    from quantcli.commands import job as jobs
    from quantcli.commands import quantize as commands

    output = console.Output(as_json=as_json, quiet=quiet)
    job = commands.prepare(
        recipe,
        model=model,
        out=out,
        overrides=tuple(set_ or ()),
        workers=workers,
        checksum=checksum,
        fresh=fresh,
        force=force,
        calibration=calibration,
        part=part,
    )
    resources = _resources(device, workers, max_memory, trust=trust_remote_code)
    if not as_json and (plan or not quiet):
        console.show_plan(output, job)
    commands.check(job)
    if as_json and plan:
        output.document({"ok": True, "plan": jobs.account(job)})
    if plan:
        return
    started = time.monotonic()
    with progress.watch(output) as watcher:
        written = commands.quantize(job, watcher, resources)
    console.show_written(output, job, written, time.monotonic() - started)
    job = replace(job, plan=written.plan)
    if as_json:
        result: dict[str, Any] = {"ok": True, "out": str(written.out), "bytes": written.nbytes}
        result |= {"shards_reused": written.shards_reused, "files": written.files}
        output.document({**result, "plan": jobs.account(job)})


app.command()(pack)


@app.command()
def calibrate(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write [default: MODEL-RECIPE.calibration here].")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override the recipe: calibration.samples=64."),
    ] = None,
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    workers: Workers = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over instead of going on after the last layer.")
    ] = False,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run samples through the model, one layer at a time, and keep what static schemes need.

    `quantize` does this by itself when a recipe needs it; `--calibration DIR` uses the result. The
    same command again goes on after the last finished layer.
    """
    from quantcli import console, progress
    from quantcli.commands import quantize as commands

    output = console.Output(as_json=as_json, quiet=quiet)
    session = commands.prepare_calibration(
        recipe, model=model, out=out, overrides=tuple(set_ or ()), fresh=fresh
    )
    resources = _resources(device, workers, max_memory, trust=trust_remote_code)
    started = time.monotonic()
    with progress.watch(output) as watcher:
        found = commands.calibrate(session, resources, watcher, fresh=fresh)
    output.document({"ok": True, **found}) if as_json else console.show_calibration(output, found)
    reused = " (it was there already)" if session.complete else ""
    output.word(f"done: {session.folder}, {time.monotonic() - started:.1f} s{reused}")


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="Quantized checkpoint, whoever wrote it.")],
    full: Annotated[bool, typer.Option("--full", help="Read every byte: hashes, NaN, ranges.")] = False,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Compare with the float model, or another quantized one."),
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Run both on --data, as the engine computes; needs --against.")
    ] = False,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Text for --run.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of text for --run.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each window.")] = 256,
    tp: Annotated[
        str, typer.Option(metavar="SIZES", help="Tensor parallel sizes to serve with, as in 1,2,4,8.")
    ] = "1",
    min_sqnr: Annotated[float | None, typer.Option(help="dB that each weight must reach.")] = None,
    max_ppl_ratio: Annotated[float | None, typer.Option(help="Perplexity over MODEL's.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Mean KL divergence, nats a token.")] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the outcome as JUnit XML, too.")
    ] = None,
    report: Report = None,
    workers: Workers = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Prove that a quantized checkpoint is whole, loadable and faithful; exit 1 where it is not.

    Without options only headers are read. --full, --against and --run go deeper, on top of that.
    """
    from quantcli import console, progress
    from quantcli.commands import verify as verifying
    from quantcli.verify import shown

    output = console.Output(as_json=as_json, quiet=quiet)
    with progress.watch(output) as watcher:
        found = verifying.verify(
            checkpoint,
            full=full,
            against=against,
            run=run,
            data=data,
            samples=samples,
            length=length,
            tp=tp,
            min_sqnr=min_sqnr,
            max_ppl_ratio=max_ppl_ratio,
            max_kl=max_kl,
            junit=junit,
            page=report,
            workers=workers,
            trust_remote_code=trust_remote_code,
            progress=watcher,
        )
    output.document(found) if as_json else shown.show_verification(output, found)
    if not found["ok"]:
        raise typer.Exit(Exit.ANSWER_NO)


def _resources(device: str, workers: int | None, max_memory: str | None, *, trust: bool) -> Resources:
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
