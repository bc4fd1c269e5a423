"""What prints, with progress.py beside it: data to stdout, words and progress to stderr."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Set
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from quantcli import __version__
from quantcli.errors import Exit, QuantError

if TYPE_CHECKING:
    from quantcli.commands import Job
    from quantcli.execute import Written

_WIDE = 200  # columns where the output is no terminal: nothing is to be cut in a log


def human_bytes(nbytes: float) -> str:
    """1234567 -> 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


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
        self._data.print(Text(text), soft_wrap=True)

    def word(self, text: str) -> None:
        """A line of words, for people."""
        if not self.quiet:
            self._words.print(Text(text), soft_wrap=True)

    def table(self, columns: list[str], rows: list[list[str]], right: Set[str] = frozenset()) -> None:
        """A table of data; columns in `right` are aligned to the right."""
        table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
        for column in columns:
            table.add_column(column, justify="right" if column in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._data.print(table)

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
        text.append(error.what, style="default")
        self._words.print(text, soft_wrap=True)
        if error.where:
            self._words.print(Text(f"  --> {error.where}"), soft_wrap=True)
        if error.fix:
            self._words.print(Text(f"  fix: {error.fix}"), soft_wrap=True)

    def bug(self, error: BaseException) -> None:
        """Something that we did not foresee: the whole traceback, and where to send it."""
        if self.as_json:
            self.document({"ok": False, "error": {"what": repr(error)}, "exit_code": int(Exit.OUR_BUG)})
        traceback.print_exception(error, file=sys.stderr)
        sys.stderr.write(f"\nthis is a bug in quantcli {__version__}: please report the lines above\n")


def make_console(stream: Any) -> Console:
    """A rich console that takes text literally; wide where the stream is no terminal."""
    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDE
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


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
    out.line(f"parameters    {account['parameters']:,} in {account['tensors']:,} tensors")
    nbytes, shards = human_bytes(account["bytes"]), len(account["shards"])
    out.line(f"weights       {nbytes} in {shards} shards: {dtypes}")
    out.line(f"tied          {account['tied_embeddings']}")
    found = account["quantization"]
    quantized = f"{found['format']}, {found['modules']} modules" if found else "none, a float model"
    out.line(f"quantization  {quantized}")
    for name, why in account["left_out"].items():
        out.line(f"left out      {name}: {why}")
    for note in account["notes"]:
        out.line(f"note          {note}")
    for problem in account["problems"]:
        where = f" ({problem['where']})" if problem["where"] else ""
        out.line(f"suspicious    {problem['what']}{where}")


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
    """The plan as a table."""
    plan = job.plan
    rows = [
        [
            f"{line.number}",
            line.scheme,
            line.label,
            f"{line.modules}",
            human_bytes(line.nbytes_before),
            human_bytes(line.nbytes_after),
            "",
        ]
        for line in plan.rules
    ]
    for kept in plan.kept:
        size = human_bytes(kept.nbytes)
        names = ", ".join(kept.names[:3]) + (", ..." if len(kept.names) > 3 else "")
        rows.append(["", "stays", "", f"{kept.tensors}", size, size, f"{kept.reason}: {names}"])
    numbers = {"rule", "tensors", "before", "after"}
    out.table(["rule", "scheme", "engine's name", "tensors", "before", "after", "why"], rows, numbers)
    out.line()
    before, after = plan.checkpoint.nbytes, plan.weight_nbytes
    out.line(
        f"weights      {human_bytes(before)} -> {human_bytes(after)} in {len(plan.shards)} shards; "
        f"{plan.quantized_params_pct:.1f} % of {plan.params:,} parameters quantized"
    )
    for loads_on in dict.fromkeys(f"{line.label}: {line.loads_on}" for line in plan.rules):
        out.line(f"loads on     {loads_on}")
    out.line(f"serving in   {'bfloat16' if plan.serving_dtype == 'BF16' else 'float16'}")
    out.line(f"disk         needs {human_bytes(plan.nbytes)}, {human_bytes(job.disk_free)} free")
    out.line(f"memory       about {human_bytes(job.memory)} with {job.workers} workers")
    out.line(f"output       {job.out}")
    for note in plan.notes:
        out.line(f"note         {note}")


def show_written(out: Output, job: Job, written: Written, seconds: float) -> None:
    """The closing line."""
    before = job.plan.checkpoint.nbytes
    ratio = job.plan.weight_nbytes / before if before else 1.0
    reused = f", {written.shards_reused} shards from an earlier run" if written.shards_reused else ""
    out.word(
        f"done: {written.out}, {human_bytes(written.nbytes)}, weights {100 * ratio:.1f} % of "
        f"the source, {seconds:.1f} s{reused}"
    )
