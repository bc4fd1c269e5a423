"""The files that a plan reads: each machine that works on it must have the same; and their hashes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.remote.file import RemoteFile
from quantcli.core.disk import blake3_of
from quantcli.core.events import Progress
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


def weight_hashes(
    checkpoint: Checkpoint, workers: int, progress: Progress
) -> dict[str, dict[str, Any]]:
    """{"bytes": n, "blake3": hex} of each weight file, by its name. A thread reads a file, once."""

    def entry(name: str) -> tuple[str, dict[str, Any]]:
        file = checkpoint.path / name
        nbytes, digest = file.stat().st_size, blake3_of(file)
        progress.shard(name, nbytes, reused=False)
        progress.advance(nbytes)
        return name, {"bytes": nbytes, "blake3": digest}

    progress.say("hashing the weight files of the model")
    total = sum((checkpoint.path / name).stat().st_size for name in checkpoint.shards)
    progress.begin(total, len(checkpoint.shards), "file")
    pool = ThreadPoolExecutor(workers, "quantcli")
    try:
        return dict(sorted(pool.map(entry, checkpoint.shards)))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def other_weights(
    recorded: object, checkpoint: Checkpoint, workers: int, progress: Progress
) -> str | None:
    """The first weight file of a model that is not as a manifest recorded it; None if all are.

    recorded: `files` of the manifest's `source`; without it nothing is read.
    """
    if recorded is None:
        return None
    found = weight_hashes(checkpoint, workers, progress)
    listed = recorded if isinstance(recorded, dict) else {}
    names = sorted({*map(str, listed), *found})
    return next((name for name in names if listed.get(name) != found.get(name)), None)
