"""`quantcli calibrate`: its options and its output."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from quantcli.cli import next as following
from quantcli.cli import options
from quantcli.cli.output import OK, Output
from quantcli.core.cluster.executor import THREADS
from quantcli.core.text import count

_LAYERS = 8  # in the table of experts
_EXPERTS = 8  # numbers in a cell of it


@options.on_screen
def calibrate(
    output: Output,
    recipe: options.Recipe,
    model: options.Model = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write [default: MODEL-RECIPE.calibration here].")
    ] = None,
    set_: options.Override = None,
    data: options.Data = None,
    device: options.Device = "cpu",
    max_memory: options.MaxMemory = None,
    workers: options.Workers = None,
    executor: options.Executor = THREADS,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over instead of resuming after the last layer.")
    ] = False,
    trust_remote_code: options.Trust = False,
) -> None:
    """Run a text through the model, for recipes that need one.

    It runs one layer at a time and keeps statistics of each. `quantize` calibrates by itself if the
    recipe needs it; its --calibration takes a calibration of this command. The same command again
    resumes after the last finished layer.
    """
    from quantcli.cli.progress import watch
    from quantcli.commands import calibrate as commands
    from quantcli.commands.job import JobOptions, with_text

    resources = options.resources_of(device, workers, max_memory, executor, trust=trust_remote_code)
    overrides = with_text(tuple(set_ or ()), data)
    with watch(output) as planning:
        session = commands.plan_calibration(
            recipe,
            model=model,
            out=out,
            overrides=overrides,
            options=JobOptions(fresh=fresh, trust_remote_code=trust_remote_code),
            progress=planning,
        )
    began = time.monotonic()
    with watch(output) as progress:
        report = commands.calibrate(session, resources, progress, fresh=fresh)
    output.result(report, show_calibration)
    reused = " (it was there already)" if session.complete else ""
    output.message(f"done: {session.folder}, {time.monotonic() - began:.1f} s{reused}", OK)
    following.show(output, *following.after_calibrate(recipe, model, overrides, session.root))


def show_calibration(out: Output, report: dict[str, Any]) -> None:
    """Print the result of a calibration: similar modules in one line each, then remarks."""
    from quantcli.recipe.methods import recipe_methods

    similar: dict[str, list[dict[str, Any]]] = {}
    for name, module in report["modules"].items():
        parts = ("*" if part.isdigit() else part for part in name.split("."))
        similar.setdefault(".".join(parts), []).append(module)
    rows = []
    for name, modules in sorted(similar.items()):
        tokens = _span([module["tokens"] for module in modules], "{:,}")
        scales = [module["input_scale"] for module in modules if "input_scale" in module]
        lows = [module["input_min"] for module in modules if "input_min" in module]
        highs = [module["input_max"] for module in modules if "input_max" in module]
        inputs = f"{min(lows):.4g} to {max(highs):.4g}" if lows else "-"
        rows.append([name, f"{len(modules)}", tokens, inputs, _span(scales, "{:.4g}")])
    out.table(["modules", "count", "tokens", "inputs", "input scale"], rows, {"count", "tokens"})
    show_experts(out, report["experts"])
    out.line()
    out.line(f"samples      {report['samples']} of up to {report['length']} tokens")
    for edited in {method.edited_as: None for method in recipe_methods().values()}:
        if edited and report[edited]:
            out.line(f"{edited:<13}{count(report[edited], 'group')} of channels")
    for title, key in (("not reached", "no_tokens"), ("filled in", "uncalibrated")):
        names = report[key]
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            out.line(f"{title:<13}{count(names, 'module')}: {', '.join(names[:5])}{more}")
    taken = list(report["taken_from"].items())
    for name, donor in taken[:5]:
        out.line(f"{'':<13}{name} takes the statistics of {donor}")
    if len(taken) > 5:
        out.line(f"{'':<13}and {len(taken) - 5} more, see --json")


def show_experts(out: Output, experts: Mapping[str, Any]) -> None:
    """Print how many tokens the router gave to experts, the most uneven layers first."""
    if not experts:
        return

    def least(layer: dict[str, Any]) -> float:
        smallest: int = min(layer["tokens"].values())
        return smallest / layer["mean"] if layer["mean"] else 0.0

    worst = sorted(experts.items(), key=lambda item: (least(item[1]), item[0]))
    rows = []
    for name, layer in worst[:_LAYERS]:
        few = [_numbers(layer[key]) for key in ("below_5_pct", "below_10_pct")]
        smallest = f"{min(layer['tokens'].values()):,}"
        rows.append([name, f"{len(layer['tokens'])}", f"{layer['mean']:,.1f}", smallest, *few])
    out.line()
    columns = ["tokens by the router", "experts", "mean", "least", "below 5 %", "below 10 %"]
    out.table(columns, rows, {"experts", "mean", "least"})
    if len(worst) > _LAYERS:
        out.line(
            f"and {count(len(worst) - _LAYERS, 'layer')} more, less uneven; --json has all numbers"
        )


def _numbers(experts: list[int]) -> str:
    """The numbers of some experts, in short."""
    few = ", ".join(map(str, experts[:_EXPERTS]))
    return (few + (f" and {len(experts) - _EXPERTS} more" if len(experts) > _EXPERTS else "")) or "-"


def _span(values: list[Any], form: str) -> str:
    if not values:
        return "-"
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"
