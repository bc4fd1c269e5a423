"""`quantcli inspect`: its options, and what it prints."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from quantcli.checkpoint.files import STALE
from quantcli.cli.options import Json, Report
from quantcli.cli.output import Output
from quantcli.core.errors import Exit, InputError
from quantcli.core.text import count, human_bytes


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
    from quantcli.cli import progress
    from quantcli.commands import inspect as commands

    out = Output(as_json=as_json)
    if support:
        if model is not None or tensors is not None or outliers or report:
            raise InputError(
                "--support takes no model and no other option but --json",
                fix="quantcli inspect --support",
            )
        cells = commands.support()
        out.document(cells) if as_json else show_support(out, cells)
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
            account = commands.outliers(model, watcher, report)
        out.document(account) if as_json else show_outliers(out, account)
        return
    account = commands.inspect(model, tensors)
    out.document(account) if as_json else show_inspection(out, account)
    if account["problems"]:
        raise typer.Exit(Exit.ANSWER_NO)


def show_inspection(out: Output, account: dict[str, Any]) -> None:
    """Folded tensors, then what there is to say about the whole."""
    if "matches" in account:
        rows = [
            [m["name"], m["dtype"], str(m["shape"]), human_bytes(m["bytes"]), m["shard"]]
            for m in account["matches"]
        ]
        out.table(["tensor", "dtype", "shape", "size", "shard"], rows, {"size"})
        return
    rows = [
        [
            group["name"],
            f"{group['count']} x {group['dtype']} {group['shape']}",
            human_bytes(group["bytes"]),
        ]
        for group in account["groups"]
    ]
    out.table(["module", "tensors", "size"], rows, {"size"})
    out.line()
    kind = account["model_type"] or "unknown"
    classes = ", ".join(account["architectures"] or []) or "no architecture named"
    dtypes = ", ".join(f"{d} {human_bytes(t['bytes'])}" for d, t in account["dtypes"].items())
    out.line(f"model         {kind} ({classes})")
    # packed codes, scales and zero points are elements of tensors, and no parameters
    word = "parameters" if account["quantization"] is None else "elements"
    out.line(f"{word:<14}{account['parameters']:,} in {account['tensors']:,} tensors")
    shards = count(account["shards"], "shard")
    out.line(f"weights       {human_bytes(account['bytes'])} in {shards}: {dtypes}")
    out.line(f"tied          {account['tied_embeddings']}")
    found = account["quantization"]
    quantized = f"{found['format']}, {found['modules']} modules" if found else "none, a float model"
    out.line(f"quantization  {quantized}")
    for name, why in account["left_out"].items():
        if not (found and why == STALE):  # beside quantized weights these files are in their place
            out.line(f"left out      {name}: {why}")
    for note in account["notes"]:
        out.line(f"note          {note}")
    for problem in account["problems"]:
        where = f" ({problem['where']})" if problem["where"] else ""
        fix = f"; {problem['fix']}" if problem["fix"] else ""
        out.line(f"suspicious    {problem['what']}{where}{fix}")


def show_support(out: Output, cells: list[dict[str, Any]]) -> None:
    """Schemes x targets."""
    rows = [
        [cell["scheme"], cell["target"], cell["label"], cell["loads_on"]]
        if cell["supported"]
        else [cell["scheme"], cell["target"], "-", cell["why"]]
        for cell in cells
    ]
    out.table(["scheme", "target", "engine's name", "loads on"], rows)


_ROWS = 20

_NAMED = 5


def show_outliers(out: Output, account: dict[str, Any]) -> None:
    """The worst modules of `outliers.inspect_outliers`, what the numbers are, a rule for a recipe."""
    modules, ranked_by = account["modules"], account["ranked_by"]
    operands = sorted(account["operands"], key=lambda operand: operand != ranked_by)
    columns = ["module", "shape", *operands, "amax/rms", "kurtosis", "channel", "of the median"]
    rows = [_row(module, operands) for module in modules[:_ROWS]]
    out.table(columns, rows, {*columns[2:]})
    out.line()
    if len(modules) > _ROWS:
        out.line(f"more          {count(len(modules) - _ROWS, 'module')}; --json lists all")
    out.line(
        f"order         worst first by the SQNR of weights in {ranked_by}; 6 dB less is an error of "
        "twice the size"
    )
    for operand in operands:
        out.line(f"schemes       {operand}: {', '.join(account['operands'][operand])}")
    out.line("channel       the input channel (column) with the largest rms, over the median of all")
    out.line("inputs        not seen here: outlier channels of activations do not show in weights")
    for others in account["left_out"]:
        number = count(others["tensors"], "tensor")
        out.line(f"left out      {number}, {others['why']}: {', '.join(others['names'])}")
    for module in modules:
        if bad := module["not_finite"]:
            place = f"`{module['module']}`{bad['index']}"
            out.line(f"damaged       {place} is {bad['value']}: fetch the model again")
    _show_advice(out, account["advice"])


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
    out.line(f"advice        keep {kept} float, with what must have their scheme; before other rules:")
    for line in advice["yaml"].splitlines():
        out.line(line)
