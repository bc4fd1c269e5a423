"""`quantcli calibrate`: its options, and what it prints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from quantcli.cli.options import Device, Json, MaxMemory, Model, Quiet, Trust, Workers, resources_of
from quantcli.cli.output import Output
from quantcli.core.text import count


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
    from quantcli.cli import progress
    from quantcli.commands import calibrate as commands

    output = Output(as_json=as_json, quiet=quiet)
    session = commands.prepare_calibration(
        recipe, model=model, out=out, overrides=tuple(set_ or ()), fresh=fresh
    )
    resources = resources_of(device, workers, max_memory, trust=trust_remote_code)
    started = time.monotonic()
    with progress.watch(output) as watcher:
        found = commands.calibrate(session, resources, watcher, fresh=fresh)
    output.document({"ok": True, **found}) if as_json else show_calibration(output, found)
    reused = " (it was there already)" if session.complete else ""
    output.word(f"done: {session.folder}, {time.monotonic() - started:.1f} s{reused}")


def show_calibration(out: Output, found: dict[str, Any]) -> None:
    """What a calibration found: alike modules in one line each, then what deserves a word."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for name, module in found["modules"].items():
        parts = ("*" if part.isdigit() else part for part in name.split("."))
        alike.setdefault(".".join(parts), []).append(module)
    rows = []
    for name, modules in sorted(alike.items()):
        tokens = _span([module["tokens"] for module in modules], "{:,}")
        scales = [module["input_scale"] for module in modules if "input_scale" in module]
        lows = [module["input_min"] for module in modules if "input_min" in module]
        highs = [module["input_max"] for module in modules if "input_max" in module]
        seen = f"{min(lows):.4g} to {max(highs):.4g}" if lows else "-"
        rows.append([name, f"{len(modules)}", tokens, seen, _span(scales, "{:.4g}")])
    out.table(["modules", "count", "tokens", "inputs", "input scale"], rows, {"count", "tokens"})
    out.line()
    out.line(f"samples      {found['samples']} of up to {found['length']} tokens")
    if found["smoothed"]:
        out.line(f"smoothed     {count(found['smoothed'], 'group')} of channels")
    for words, key in (("not reached", "no_tokens"), ("filled in", "uncalibrated")):
        names = found[key]
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            out.line(f"{words:<13}{count(names, 'module')}: {', '.join(names[:5])}{more}")


def _span(values: list[Any], form: str) -> str:
    if not values:
        return "-"
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"
