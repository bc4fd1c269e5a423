"""`quantcli recommend`: its options and its output."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.filesize import decimal

from quantcli.cli import next as following
from quantcli.cli import options
from quantcli.cli.output import Output
from quantcli.core.errors import InputError
from quantcli.core.text import count

_EXAMPLE = "quantcli recommend MODEL --for 2x910B"


@options.on_screen
def recommend(
    output: Output,
    model: Annotated[str | None, typer.Argument(help="Folder, Hub id or address.")] = None,
    serve_on: options.For = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--context",
            metavar="TOKENS",
            help="Tokens of a sequence, such as 32k [default: 8k, or the model's own].",
        ),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", help="Sequences at a time [default: 8].")
    ] = None,
    devices: Annotated[bool, typer.Option("--devices", help="List the known devices instead.")] = False,
) -> None:
    """Rank the shipped recipes for a model on a device.

    Reads headers and config.json only. For each recipe that the device can serve: memory of weights
    and of the cache on each device, whether they fit, the change that it makes to the bundled model,
    and whether it needs a text. Exits with 1 if nothing fits. docs/recommend.md explains the figures.
    """
    from quantcli.cli.progress import watch
    from quantcli.commands import recommend as commands

    if devices:
        if model is not None or serve_on is not None or tokens is not None or concurrency is not None:
            raise InputError(
                "--devices takes neither a model nor an option", fix="quantcli recommend --devices"
            )
        output.result({"devices": commands.devices()}, show_devices)
        following.show(output, following.shell("quantcli", "recommend", "MODEL", "--for", "DEVICE"))
        return
    if model is None:
        raise InputError("argument MODEL is missing", fix=_EXAMPLE)
    if serve_on is None:
        raise InputError("--for is missing: the device to serve on", fix=_EXAMPLE)
    with watch(output) as progress:
        found = commands.recommend(
            model, serve_on, context=tokens, concurrency=concurrency, progress=progress
        )
    no = None if found.best else commands.no_fit(found)
    output.result(found.to_dict(), show_recommendation, no)
    following.show(output, *following.after_recommend(found.recipes, found.best))


def show_devices(out: Output, document: dict[str, Any]) -> None:
    """Print the devices, and what else they are called."""
    rows = [
        [d["name"], f"{d['gb']} GB" if d["gb"] else "-", d["kind"], d["engine"], ", ".join(d["also"])]
        for d in document["devices"]
    ]
    out.table(["device", "memory", "kind", "engine", "also"], rows, {"memory"})


def show_recommendation(out: Output, found: dict[str, Any]) -> None:
    """Print a row for each recipe, the best ones with what to type, and notes."""
    device, recipes = found["device"], found["recipes"]
    several = device["count"] > 1
    names = f"{device['count']} x {device['name']}" if several else device["name"]
    each = " each" if several else ""
    out.line(f"for           {names}, {decimal(device['memory_bytes'])}{each}, {device['engine']}")
    sequences = count(found["concurrency"], "sequence")
    out.line(f"serving       {sequences} of {found['context']:,} tokens")
    out.line(f"unquantized   {_unquantized(found['unquantized'], found['context'])}")
    out.line()
    rows = [_row(row, several=several) for row in recipes]
    columns = ["recipe", "fits", "weights", "cache", "up to", "change", "rank", "text"]
    columns += ["devices"] if several else []
    out.table(columns, rows, {*columns[2:7], "devices"}, {"recipe"})
    if rows:
        out.line()
    for title, name in (("best", found["best"]), ("without text", found["best_without_data"])):
        row = next((row for row in recipes if row["recipe"] == name), None)
        if row is not None and (title == "best" or name != found["best"]):
            out.line(f"{title:<14}{name}: {row['reason']}")
            out.line(f"  {row['command']}", command=True)
    if found["best"] is None:
        out.line("best          none: nothing fits")
        if found["advice"]:
            out.line(f"instead       {found['advice']}")
    for note in found["notes"]:
        out.line(f"note          {note}")
    if found["left_out"]:
        recipes_left = count(found["left_out"], "recipe")
        out.line(f"left out      {recipes_left}: -v and --json say why")
    out.line(
        "order         what fits; then by bits, 8-bit weights and inputs first; then by kernels and "
        "format of the engine; then by change"
    )
    if several:
        out.line("weights       and cache: on each device")
    out.line("up to         tokens of each sequence that fit; text: whether the recipe needs one")
    costs = found["costs"]
    out.line(
        f"change        mean change of a token's log-probability of {costs['model']}; other models "
        "change otherwise"
    )


def _row(row: dict[str, Any], *, several: bool) -> list[str]:
    change = "-" if row["mean_change"] is None else f"{row['mean_change']:.3f}"
    cells = [
        row["recipe"],
        "yes" if row["fits"] else "no",
        decimal(row["weights_bytes"]),
        decimal(row["cache_bytes"]),
        _tokens(row["max_context"]),
        change,
        f"{row['rank'] or '-'}",
        "yes" if row["needs_data"] else "no",
    ]
    return [*cells, f"{row['devices']}"] if several else cells


def _tokens(number: int) -> str:
    """Tokens in thousands of 1024, rounded down; `-` for none."""
    return f"{number // 1024}k" if number >= 1024 else f"{number or '-'}"


def _unquantized(row: dict[str, Any], context: int) -> str:
    sizes = f"{decimal(row['weights_bytes'])} of weights, {decimal(row['cache_bytes'])} of cache"
    if row["fits"]:
        return f"fits: {sizes}"
    longest = f"; up to {_tokens(row['max_context'])} tokens" if row["max_context"] else ""
    return f"does not fit: {sizes}{longest}"
