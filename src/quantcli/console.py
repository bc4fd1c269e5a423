"""What prints, with progress.py beside it: data to stdout, words and progress to stderr."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Set, Sized
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from quantcli import __version__
from quantcli.checkpoint.files import STALE
from quantcli.core.errors import Exit, QuantError, human_bytes

if TYPE_CHECKING:
    from quantcli.commands.job import Job
    from quantcli.convert.execute import Written
    from quantcli.planning.plan import Plan

_WIDE = 200  # columns where the output is no terminal: nothing is to be cut in a log


def count(things: int | Sized, word: str) -> str:
    """1 shard, 2 shards."""
    number = things if isinstance(things, int) else len(things)
    return f"{number} {word}" + ("" if number == 1 else "s")


class Output:
    """Where a command's results and words go."""

    def __init__(self, *, as_json: bool, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self._data = make_console(sys.stdout)
        self._words = make_console(sys.stderr)

    def document(self, value: Any) -> None:
        """The one JSON document of a `--json` run."""
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def line(self, text: str = "") -> None:
        """A line of data."""
        self._show(_literal(text))

    def _show(self, text: Text) -> None:
        """Print data; a reader that has gone (`| head`) stops the printing, never the work."""
        try:
            self._data.print(text, soft_wrap=True)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def word(self, text: str) -> None:
        """A line of words, for people."""
        if not self.quiet:
            self._words.print(_literal(text), soft_wrap=True)

    def table(self, columns: list[str], rows: list[list[str]], right: Set[str] = frozenset()) -> None:
        """A table of data, two spaces between columns; those in `right` are aligned to the right."""
        if not rows:
            return
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        for number, row in enumerate([columns, *rows]):
            cells = [
                cell.rjust(width) if name in right else cell.ljust(width)
                for name, cell, width in zip(columns, row, widths, strict=True)
            ]
            line = _literal("  ".join(cells).rstrip())
            line.stylize("bold" if number == 0 else "")
            self._show(line)

    def error(self, error: QuantError) -> None:
        """One problem: what, where, how to fix it."""
        if self.as_json:
            self.document(
                {
                    "ok": False,
                    "error": {"what": error.what, "where": error.where, "fix": error.fix},
                    "exit_code": int(error.exit_code),
                }
            )
        text = Text("error: ", style="bold red")
        text.append_text(_literal(error.what))
        self._words.print(text, soft_wrap=True)
        if error.where:
            self._words.print(_literal(f"  --> {error.where}"), soft_wrap=True)
        if error.fix:
            self._words.print(_literal(f"  fix: {error.fix}"), soft_wrap=True)

    def bug(self, error: BaseException) -> None:
        """Something that we did not foresee: the whole traceback, and where to send it."""
        if self.as_json:
            self.document({"ok": False, "error": {"what": repr(error)}, "exit_code": int(Exit.OUR_BUG)})
        traceback.print_exception(error, file=sys.stderr)
        sys.stderr.write(f"\nthis is a bug in quantcli {__version__}: please report the lines above\n")


def make_console(stream: Any) -> Console:
    """A rich console that takes text literally; wide where the stream is no terminal."""
    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDE
    return _Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with 1, which says that the answer is no


def _literal(text: str) -> Text:
    """Names come from strangers: no escape code of theirs reaches the terminal."""
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


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


def show_plan(out: Output, job: Job) -> None:
    """The plan: what each rule does, what stays float and why, what it costs."""
    plan = job.plan
    rows = []
    for rule in plan.rules:
        sizes = human_bytes(rule.nbytes_before), human_bytes(rule.nbytes_after)
        rows.append([f"rules.{rule.number - 1}: {rule.scheme}", rule.label, f"{rule.modules}", *sizes])
    for kept in plan.kept:
        sizes = human_bytes(kept.nbytes_before), human_bytes(kept.nbytes)
        rows.append([f"stays: {kept.reason}", "", f"{kept.tensors}", *sizes])
    columns = ["weights", "engine's name", "count", "before", "after"]
    out.table(columns, rows, {"count", "before", "after"})
    out.line()
    for kept in plan.kept:
        out.line(f"{kept.reason}: {', '.join(kept.names)}")
    out.line()
    before, after = plan.checkpoint.nbytes, plan.weight_nbytes
    out.line(
        f"weights      {human_bytes(before)} -> {human_bytes(after)} in {count(plan.shards, 'shard')}; "
        f"{plan.quantized_params_pct:.1f} % of {plan.params:,} parameters quantized"
    )
    for loads_on in dict.fromkeys(f"{r.label}: {r.loads_on}" for r in plan.rules if r.modules):
        out.line(f"loads on     {loads_on}")
    out.line(f"serving in   {'bfloat16' if plan.serving_dtype == 'BF16' else 'float16'}")
    if job.part is not None:
        files = ", ".join(shard.file for shard in job.shards) or "none"
        beside = f", and {count(plan.sidecars.keys() | plan.copies.keys(), 'file')} beside the weights"
        out.line(f"{job.part!s:<13}{files}{beside if job.part.carries else ''}")
    out.line(f"disk         needs {human_bytes(job.nbytes)}, {human_bytes(job.disk_free)} free")
    out.line(f"memory       about {human_bytes(job.memory)} with {count(job.workers, 'worker')}")
    out.line(f"output       {job.out}")
    if job.session is not None:
        out.line(f"calibration  {_calibration_words(job)}")
    if job.out.exists():
        out.line(f"replaces     {job.out}{job.replaced}")
    if job.shards_done:
        out.line(f"resumes      {count(job.shards_done, 'shard')} done by an interrupted run")
    for note in plan.notes:
        out.line(f"note         {note}")


def _calibration_words(job: Job) -> str:
    session = job.session
    assert session is not None
    asked = [f"{what} of {count(n, 'module')}" for what, n in session.plan.asked.items() if n]
    if session.plan.recipe.file.smooth is not None and not (asked and session.complete):
        asked.append("smoothing")
    what = " and ".join(asked)
    if session.complete:
        smoothed = f"; {count(job.plan.smoothed, 'group')} smoothed" if job.plan.smoothed else ""
        return f"{session.folder}, {what}{smoothed}"
    done = f", goes on after {count(session.layers_done, 'layer')}" if session.layers_done else ""
    source = session.source
    memory = human_bytes(job.memory + session.memory_nbytes(job.workers))
    return (
        f"runs first: {what} from {source.samples} samples of {source.length} tokens of "
        f"{source.data}, kept in {session.folder}{done}; about {memory} of "
        f"memory, and up to {human_bytes(session.states_nbytes)} of hidden states on disk"
    )


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


def show_written(out: Output, job: Job, written: Written[Plan], seconds: float) -> None:
    """What only calibration could tell, and the closing line."""
    for note in (*written.plan.notes, *written.notes):
        if note not in job.plan.notes:
            out.word(f"note: {note}")
    if job.part is not None:
        out.word(
            f"done: {written.out}, {human_bytes(written.nbytes)}, {job.part}, {seconds:.1f} s; all "
            "parts make the checkpoint with `quantcli pack --merge`"
        )
        return
    before = job.plan.checkpoint.nbytes
    ratio = job.plan.weight_nbytes / before if before else 1.0
    kept = written.shards_reused
    reused = f", {count(kept, 'shard')} from an earlier run" if kept else ""
    out.word(
        f"done: {written.out}, {human_bytes(written.nbytes)}, weights {100 * ratio:.1f} % of "
        f"the source, {seconds:.1f} s{reused}"
    )
