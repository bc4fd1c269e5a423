"""A conversion whose parts are written by nodes to disks of their own, to be joined later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import restamped
from quantcli.convert.destination import Destination, Entry
from quantcli.convert.execute import RunOptions, W, Written, execute
from quantcli.convert.folder import LocalFolder
from quantcli.convert.part_folder import read_part
from quantcli.convert.spread.run import sums_floats
from quantcli.convert.spread.task import Within
from quantcli.core.cluster.cluster import Node
from quantcli.core.cluster.connect import connect
from quantcli.core.cluster.sources import check_sources, identities
from quantcli.core.events import Progress
from quantcli.core.text import count
from quantcli.planning.files import source_files
from quantcli.planning.parts import Part
from quantcli.planning.plan import Work


@dataclass(frozen=True)
class _Common:
    """What all nodes get. parts: of each node, by its id. out: the whole checkpoint's folder."""

    plan: Work
    out: Path
    options: RunOptions
    parts: Mapping[str, Part]
    sources: Mapping[Path, tuple[int, str]]


@dataclass(frozen=True)
class _Placed:
    """A part that a node has written. files: their entries. reused: shards of an earlier run."""

    folder: Path
    files: dict[str, Entry]
    reused: int
    notes: tuple[str, ...]


def write_parts(plan: W, out: Destination, options: RunOptions, progress: Progress) -> Written[W]:
    """Write as many parts as the cluster has nodes, each on the node's own disk.

    They go to OUT.part-1-of-3 and so on, and a note says where each is. The same call again goes on:
    nodes keep their parts, in the order of their addresses.
    """
    assert options.executor is not None
    assert out.folder is not None  # no other place takes parts
    with connect(options.executor, progress) as cluster:
        if sums_floats(plan.shards):
            cluster.check_alike()
        nodes = cluster.nodes
        parts = {node.id: Part(number, len(nodes)) for number, node in enumerate(nodes, start=1)}
        sources = identities(source_files(plan, plan.shards))
        progress.begin(sum(item.source.nbytes for item in plan.items), len(nodes), "part")
        common = _Common(plan, out.folder.absolute(), options, parts, sources)
        placed = cluster.everywhere(_write_part, common=common, progress=progress, whole=True)
    files: dict[str, Entry] = {}
    notes: list[str] = []
    for node, part in placed.items():
        files |= part.files
        of = parts[node.id]
        notes += [f"{of} is in {part.folder} on node {node.address}", *part.notes]
        progress.shard(str(part.folder), sum(entry["bytes"] for entry in part.files.values()), False)
    if missing := len(nodes) - len(placed):
        notes.append(
            f"{count(missing, 'node')} went before its part was written: run the command again"
        )
    reused = sum(part.reused for part in placed.values())
    return Written(out, files, reused, plan, tuple(dict.fromkeys(notes)))


def _write_part(common: _Common, node: Node, progress: Progress) -> _Placed:
    """Write the part of a node, which has the source in a folder, or reads it elsewhere."""
    check_sources(common.sources)
    part, options = common.parts[node.id], common.options
    out = LocalFolder(part.folder(common.out))
    plan = replace(common.plan, checkpoint=restamped(common.plan.checkpoint))
    if out.exists and not options.force and (files := _finished(out.path, part, plan)) is not None:
        return _Placed(out.path, files, len(part.shards(plan)), ())
    out.check(plan.checkpoint.path, force=options.force)
    shards = [shard.nbytes for shard in part.shards(plan)]
    out.room(shards, part.nbytes(plan) - sum(shards))
    own = replace(options, executor=None, workers=max(options.workers, node.cpus))
    written = execute(plan, out, own, progress=Within(progress), part=part)
    return _Placed(out.path, written.files, written.shards_reused, written.notes)


def _finished(folder: Path, part: Part, plan: Work) -> dict[str, Any] | None:
    """The files of a part that an earlier run of this plan finished; None if it is another's."""
    found = read_part(folder)
    same = found.part == part and found.whole["manifest"]["plan"] == plan.digest
    return found.files if same else None
