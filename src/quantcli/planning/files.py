"""The files that a plan reads: each machine that works on it must have the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from quantcli.checkpoint.remote.file import RemoteFile
from quantcli.planning.plan import Copy, Quantize, Shard, Work


def source_files(plan: Work, shards: Sequence[Shard]) -> list[Path]:
    """The files in folders that these shards are made of; one that is elsewhere is checked when it is
    read."""
    weights = (plan.checkpoint.path / name for name in plan.checkpoint.shards)
    files = {*weights, *_calibrated(shards)}
    return sorted(file for file in files if not isinstance(file, RemoteFile))


def _calibrated(shards: Sequence[Shard]) -> Iterator[Path]:
    """Files of a calibration."""
    for shard in shards:
        for item in shard.items:
            edits = [] if not isinstance(item, Copy | Quantize) else [item.edit]
            if isinstance(item, Quantize):
                yield from (stored.file for stored in item.stats.values())
                edits.append(item.bias_edit)
            for edit in filter(None, edits):
                parts = (edit.rows, edit.columns, edit.value)
                yield from (stored.file for stored in parts if stored is not None)
