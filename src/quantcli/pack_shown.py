"""What `pack` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcli.console import Output, count, human_bytes

if TYPE_CHECKING:
    from quantcli.merging import Merge, Merged


def show_merge(out: Output, job: Merge) -> None:
    """The parts, and what is made of them."""
    rows = []
    shards = job.parts[0].whole["shards"]
    for part in job.parts:
        weights = sum(name in shards for name in part.files)
        nbytes = sum(entry["bytes"] for entry in part.files.values())
        beside = len(part.files) - weights
        rows.append([str(part.part), str(part.path), f"{weights}", f"{beside}", human_bytes(nbytes)])
    columns = ["part", "folder", "shards", "other files", "size"]
    out.table(columns, rows, {*columns[2:]})
    out.line()
    how = "linked, which takes no space" if job.linked else "copied"
    out.line(f"weights      {count(shards, 'shard')}, {how}")
    out.line(f"output       {job.out}, {human_bytes(job.nbytes)}")


def show_merged(out: Output, job: Merge, merged: Merged, seconds: float) -> None:
    """What the source lacks, and the closing line."""
    for note in merged.notes:
        out.word(f"note: {note}")
    reused = f", {count(merged.reused, 'shard')} from an earlier run" if merged.reused else ""
    out.word(
        f"done: {merged.out}, {human_bytes(job.nbytes)}, {seconds:.1f} s{reused}; the parts are still "
        "there"
    )
