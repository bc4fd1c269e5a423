"""What `pack` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcli.console import Output, count
from quantcli.core.errors import human_bytes

if TYPE_CHECKING:
    from quantcli.commands.pack import PackJob
    from quantcli.convert.execute import Written
    from quantcli.convert.merge import Merge, Merged
    from quantcli.planning.repack import Repacking


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


def show_pack(out: Output, job: PackJob) -> None:
    """The plan: what each kind of module becomes, what it costs."""
    plan = job.plan
    rows = [
        [
            line.before,
            line.label,
            f"{line.modules}",
            human_bytes(line.nbytes_before),
            human_bytes(line.nbytes_after),
        ]
        for line in plan.lines
    ]
    columns = [plan.origin.name, plan.target.name, "modules", "before", "after"]
    out.table(columns, rows, {"modules", "before", "after"})
    out.line()
    before, after = human_bytes(plan.checkpoint.nbytes), human_bytes(plan.weight_nbytes)
    out.line(f"weights      {before} -> {after} in {count(plan.shards, 'shard')}; no number is rounded")
    out.line(f"copied       {count(plan.floats, 'tensor')}, byte for byte")
    for loads_on in dict.fromkeys(f"{line.label}: {line.loads_on}" for line in plan.lines):
        out.line(f"loads on     {loads_on}")
    out.line(f"disk         needs {human_bytes(plan.nbytes)}, {human_bytes(job.disk_free)} free")
    out.line(f"memory       about {human_bytes(job.memory)} with {count(job.workers, 'worker')}")
    out.line(f"output       {job.out}")
    if job.shards_done:
        out.line(f"resumes      {count(job.shards_done, 'shard')} done by an interrupted run")
    for note in plan.notes:
        out.line(f"note         {note}")


def show_packed(out: Output, job: PackJob, written: Written[Repacking], seconds: float) -> None:
    """What the source lacks, and the closing line."""
    for note in written.notes:
        out.word(f"note: {note}")
    kept = written.shards_reused
    reused = f", {count(kept, 'shard')} from an earlier run" if kept else ""
    modules = count(sum(line.modules for line in job.plan.lines), "module")
    out.word(
        f"done: {written.out}, {human_bytes(written.nbytes)}, {seconds:.1f} s{reused}; {modules} "
        "unpacked again to the same codes and scales"
    )
