"""`quantcli inspect`: its options and its output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from quantcli.checkpoint.files import STALE
from quantcli.cli import next as following
from quantcli.cli import options
from quantcli.cli.output import FAILED, WARNING, Output
from quantcli.core.errors import AnswerNo, InputError
from quantcli.core.text import count


@options.on_screen
def inspect(
    output: Output,
    model: Annotated[str | None, typer.Argument(help="Folder, Hub id or address.")] = None,
    tensors: Annotated[
        str | None, typer.Option(metavar="GLOB", help="List the tensors that match.")
    ] = None,
    outliers: Annotated[
        bool,
        typer.Option(
            "--outliers", help="Read the weights and rank them by how hard they are to quantize."
        ),
    ] = False,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Measure what each group of modules costs the model under each scheme.",
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text for --sensitivity; without it, weights alone count."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="For --sensitivity: a budget's modules and schemes."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="SIDE", help="For --sensitivity: quantize weights or inputs alone."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where --sensitivity keeps its numbers, to continue if it is interrupted.",
        ),
    ] = None,
    page: options.Report = None,
    support: Annotated[
        bool, typer.Option("--support", help="Show which schemes and targets go together instead.")
    ] = False,
    serve_on: options.For = None,
) -> None:
    """Show the contents of a checkpoint.

    Reads headers only: layers, dtypes, sizes, parameters, quantization. Exits with 1 if something is
    suspicious: a missing shard, an index that disagrees. `--outliers` reads the weights as well,
    decoded if the checkpoint is quantized, and recommends which of them a recipe should keep float.
    `--support --for DEVICE` leaves out what a device's engine has no kernels for. `--sensitivity` runs
    text through the model.
    """
    from quantcli.cli.progress import watch
    from quantcli.commands import inspect as commands

    for option, value in {"data": data, "recipe": recipe, "only": only, "folder": folder}.items():
        if value is not None and not sensitivity:
            where = f"--{option} {value}"
            raise InputError(f"--{option} needs --sensitivity", where=where, fix="add --sensitivity")
    if support:
        if model is not None or tensors is not None or outliers or page or sensitivity:
            raise InputError(
                "--support takes neither a model nor an option other than --for and --json",
                fix="quantcli inspect --support",
            )
        with watch(output) as progress:
            cells = commands.support(progress, serve_on)
        output.result({"support": cells}, show_support)
        following.show(output, following.shell("quantcli", "recipes"))
        return
    if serve_on is not None:
        raise InputError(
            "--for needs --support",
            where=f"--for {serve_on}",
            fix="quantcli recommend MODEL --for DEVICE",
        )
    if model is None:
        raise InputError("argument MODEL is missing", fix="quantcli inspect MODEL")
    if page is not None and not (outliers or sensitivity):
        fix = "add --outliers or --sensitivity"
        raise InputError("--report needs --outliers", where=f"--report {page}", fix=fix)
    if sensitivity:
        if tensors is not None or outliers:
            fix = f"quantcli inspect --sensitivity {model}"
            raise InputError("--sensitivity does not take --tensors or --outliers", fix=fix)
        from quantcli.commands.budget import sensitivity as measuring

        chosen = measuring.SensitivityOptions(data, recipe, only, folder, page)
        with watch(output) as progress:
            report = measuring.sensitivity(model, chosen, progress=progress)
        output.result(report, show_sensitivity)
        following.show(output, *following.after_sensitivity(model))
        return
    if outliers:
        if tensors is not None:
            fix = f"quantcli inspect --outliers {model}"
            raise InputError("--outliers does not take --tensors", fix=fix)
        with watch(output) as progress:
            ranking = commands.outliers(model, progress, page)
        output.result(ranking, show_outliers)
        following.show(output, *following.after_outliers(model))
        return
    with watch(output) as progress:
        contents = commands.inspect(model, tensors, progress)
    output.result(contents, show_inspection, _suspicion(model, contents["problems"]))
    following.show(output, *following.after_inspect(model, contents))


def _suspicion(model: str, problems: list[dict[str, Any]]) -> AnswerNo | None:
    if not problems:
        return None
    what = f"the checkpoint is suspicious: {problems[0]['what']}"
    more = f", and {count(len(problems) - 1, 'more problem')}" if len(problems) > 1 else ""
    return AnswerNo(what + more, where=model, fix=problems[0]["fix"])


def show_inspection(out: Output, contents: dict[str, Any]) -> None:
    """Print the tensors, similar ones in one line, and then facts of the whole checkpoint."""
    if "matches" in contents:
        rows = [
            [m["name"], m["dtype"], str(m["shape"]), decimal(m["bytes"]), m["shard"]]
            for m in contents["matches"]
        ]
        out.table(["tensor", "dtype", "shape", "size", "shard"], rows, {"size"})
        return
    rows = [
        [g["name"], f"{g['count']} x {g['dtype']} {g['shape']}", decimal(g["bytes"]), g["role"] or ""]
        for g in contents["groups"]
    ]
    out.table(["module", "tensors", "size", "role"], rows, {"size"})
    out.line()
    kind = contents["model_type"] or "unknown"
    classes = ", ".join(contents["architectures"] or []) or "no architecture named"
    dtypes = ", ".join(f"{d} {decimal(t['bytes'])}" for d, t in contents["dtypes"].items())
    out.line(f"model         {kind} ({classes})")
    if contents["draft"]:
        out.line(f"draft         {contents['draft']}: it reads the hidden states of another model")
    # packed codes, scales and zero points are elements of tensors, but not parameters
    unit = "parameters" if contents["quantization"] is None else "elements"
    out.line(f"{unit:<14}{contents['parameters']:,} in {contents['tensors']:,} tensors")
    shards = count(contents["shards"], "shard")
    out.line(f"weights       {decimal(contents['bytes'])} in {shards}: {dtypes}")
    out.line(f"tied          {contents['tied_embeddings']}")
    quantization = contents["quantization"]
    text = (
        f"{quantization['format']}, {count(quantization['modules'], 'module')}" if quantization else ""
    )
    out.line(f"quantization  {text or 'none, a float model'}")
    if cache := contents["kv_cache"]:
        scales = count(cache["tensors"], "tensor")
        out.line(f"kv cache      {scales} with scales of keys and values, such as {cache['example']}")
    for name, why in contents["left_out"].items():
        if not (quantization and why == STALE):  # these files belong to quantized weights
            out.line(f"left out      {name}: {why}")
    for note in contents["notes"]:
        out.line(f"note          {note}", WARNING)
    for problem in contents["problems"]:
        where = f" ({problem['where']})" if problem["where"] else ""
        fix = f"; {problem['fix']}" if problem["fix"] else ""
        out.line(f"suspicious    {problem['what']}{where}{fix}", FAILED)


def show_support(out: Output, report: dict[str, list[dict[str, Any]]]) -> None:
    """Print which schemes each target can store, and where they load."""
    rows = []
    for cell in report["support"]:
        options = (f", {option}: {value}" for option, value in cell["options"].items())
        how = [cell["label"], _where(cell)] if cell["supported"] else ["-", cell["why"]]
        rows.append([cell["scheme"] + "".join(options), cell["target"], *how])
    columns = ["scheme", "target", "engine's name", "loads on"]
    out.table(columns, rows, whole={"target", "engine's name"})


def _where(cell: dict[str, Any]) -> str:
    """Where a pair loads; if it was asked for a device, what its kernels do there."""
    from quantcli.commands.choosing.devices import NATIVE

    if "kernels" not in cell:
        return str(cell["loads_on"])
    linears, experts = cell["kernels"], cell["expert_kernels"]
    what = "linears and experts" if linears == experts else "linears" if linears else "experts"
    how = linears or experts
    return what if how == NATIVE else f"{what}; {how}"


_ROWS = 20  # modules in the table of outliers
_NAMED = 5  # modules that the advice names


def show_outliers(out: Output, ranking: dict[str, Any]) -> None:
    """Print the worst modules of `planning.outliers`, a legend, and a rule for a recipe."""
    modules, ranked_by = ranking["modules"], ranking["ranked_by"]
    operands = sorted(ranking["operands"], key=lambda operand: operand != ranked_by)
    columns = ["module", "shape", *operands, "amax/rms", "kurtosis", "channel", "of the median"]
    rows = [_row(module, operands) for module in modules[:_ROWS]]
    out.table(columns, rows, {*columns[2:]})
    out.line()
    if len(modules) > _ROWS:
        out.line(f"more          {count(len(modules) - _ROWS, 'module')}; --json lists all")
    out.line(
        f"order         by the SQNR of weights in {ranked_by}, worst first; 6 dB less: twice the error"
    )
    for operand in operands:
        out.line(f"schemes       {operand}: {', '.join(ranking['operands'][operand])}")
    out.line(
        "channel       input channel (column) with the largest rms, and its ratio to the median rms"
    )
    out.line(
        "inputs        not measured: their outlier channels cost int8 more, and do not show in weights"
        "; given a text, recipes such as w8a8_dynamic_smooth move them into the weights"
    )
    for others in ranking["left_out"]:
        number = count(others["tensors"], "tensor")
        out.line(f"left out      {number}, {others['why']}: {', '.join(others['names'])}")
    for module in modules:
        if bad := module["not_finite"]:
            place = f"`{module['module']}`{bad['index']}"
            out.line(f"damaged       {place} is {bad['value']}: fetch the model again", FAILED)
    verdict = ranking["verdict"]
    out.line(f"verdict       {verdict['what']}")
    _show_advice(out, ranking["advice"])


def show_sensitivity(out: Output, report: dict[str, Any]) -> None:
    """Print the most sensitive groups of modules, and what each scheme costs for all."""
    names = [scheme["name"] for scheme in report["schemes"]][:-1]
    rows = [
        [unit["unit"], f"{unit['weights']:,}", *(f"{unit['errors'][name]:.2e}" for name in names)]
        for unit in report["units"][:_ROWS]
    ]
    columns = ["group", "weights", *names]
    out.table(columns, rows, {*columns[1:]})
    out.line()
    if len(report["units"]) > _ROWS:
        out.line(f"more          {count(len(report['units']) - _ROWS, 'group')}; --json lists all")
    side = "weights and inputs" if report["only"] is None else f"{report['only']} alone"
    if report["on_text"]:
        out.line(f"error         KL that a group alone makes, nats per token; {side} quantized")
    else:
        out.line("error         of weights alone: squared error over the sum of squares; no text given")
    for scheme in report["schemes"][:-1]:
        bits = "not for all" if scheme["bits"] is None else f"{scheme['bits']:.3f} bits"
        out.line(f"for all       {scheme['name']}: {bits}, error {scheme['error']:.3e}")


def _row(module: dict[str, Any], operands: list[str]) -> list[str]:
    bad = module["not_finite"]
    decibels = [module["sqnr_db"][operand] for operand in operands]
    return [
        module["module"],
        str(module["shape"]),
        *(bad["value"] if bad else "exact" if db == 200 else f"{db:.1f} dB" for db in decibels),
        _number(module["amax_over_rms"], ".1f"),
        _number(module["kurtosis"], ".2f"),
        _number(module["channel"], "d"),
        _number(module["channel_ratio"], ".2f"),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _show_advice(out: Output, advice: dict[str, Any] | None) -> None:
    if advice is None:
        out.line("advice        none: no module is far below the median of its kind")
        return
    far = advice["far_below"]
    for entry in far[:_NAMED]:
        out.line(
            f"far below     {entry['module']}: {entry['sqnr_db']:.1f} dB; the median of "
            f"{entry['kind']} is {entry['median_db']:.1f} dB"
        )
    if len(far) > _NAMED:
        out.line(f"far below     {count(len(far) - _NAMED, 'more module')}")
    kept = count(advice["modules"], "module")
    out.line(
        f"advice        keep {kept} float, with modules that need the same scheme; put this rule first:"
    )
    out.verbatim(advice["yaml"])
