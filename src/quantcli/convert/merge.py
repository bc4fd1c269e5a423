"""Parts of a conversion, written on several machines, become the checkpoint that one run writes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.files import MANIFEST, SIGNATURE
from quantcli.convert.destination import Destination, Draft, Entry, Start
from quantcli.convert.part_folder import AGAIN, PartFolder, check_set, read_part
from quantcli.core.errors import InputError
from quantcli.core.events import SILENT, Progress
from quantcli.core.text import count
from quantcli.core.threads import default_workers

if TYPE_CHECKING:
    from quantcli.checkpoint.signature.keys import Signer
    from quantcli.convert.execute import Written


@dataclass(frozen=True)
class Merge:
    """Parts that make a whole, and the place of the result."""

    parts: list[PartFolder]
    out: Destination
    workers: int
    fresh: bool
    force: bool
    signer: Signer | None  # who signs the result; None: nobody
    linked: bool  # whether weight files become further names of the parts' files, and take no space

    @property
    def files(self) -> dict[str, Entry]:
        """Every file of the checkpoint as the manifest will list it."""
        return {name: entry for part in self.parts for name, entry in part.files.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(entry["bytes"] for entry in self.files.values())

    @property
    def head(self) -> dict[str, Any]:
        """The head of the journal: a later run continues with these files only if it has the same."""
        whole = self.parts[0].whole
        of: dict[str, Any] = {"parts": whole["of"]}
        return {"plan": whole["manifest"]["plan"], "checksum": whole["checksum"], "source": of}


def plan_merge(
    folders: Sequence[Path],
    out: Destination,
    *,
    workers: int | None = None,
    fresh: bool = False,
    force: bool = False,
    signer: Signer | None = None,
) -> Merge:
    """Check what headers and sizes show: one plan, each part once, sizes of files.

    InputError for parts that make no whole, and for parts without hashes that are to be signed.
    """
    parts = check_set([read_part(folder) for folder in folders])
    if signer is not None and not parts[0].whole["checksum"]:
        what = "parts were written with --no-checksum: there are no hashes to sign"
        raise InputError(what, where=str(folders[0]), fix="leave --sign out, then `quantcli sign`")
    for part in parts:
        for name, entry in part.files.items():
            path = part.path / name
            if not path.is_file():
                raise InputError(f"{part.part} has lost `{name}`", where=str(part.path), fix=AGAIN)
            if path.stat().st_size != entry["bytes"]:
                raise InputError(
                    f"file has {path.stat().st_size} bytes; {entry['bytes']} were written",
                    where=str(path),
                    fix=AGAIN,
                )
        out.check(part.path.resolve(), force=force, what=f"the {part.part}")
    linked = out.links([part.path / name for part in parts for name in part.files])
    merge = Merge(parts, out, workers or default_workers(), fresh, force, signer, linked)
    out.done(None if fresh else merge.head)
    shards = merge.parts[0].whole["shards"]
    copied = {n: entry for n, entry in merge.files.items() if not linked or n not in shards}
    out.room([entry["bytes"] for entry in copied.values()], 0)
    return merge


def merge(job: Merge, progress: Progress = SILENT) -> Written[None]:
    """Put the parts together at `job.out`, which appears whole or not at all. The parts stay.

    Every file is read, and hashes are compared if the parts have them. InputError for a damaged file.
    """
    from quantcli.convert.execute import Written, close_signed, listing

    whole = job.parts[0].whole
    with job.out.begin(
        Start(job.head, [*job.files, MANIFEST, SIGNATURE], job.fresh, job.force, progress)
    ) as draft:
        run = _Gather(job, draft, progress)
        work = [(part, name) for part in job.parts for name in part.files]
        progress.begin(job.nbytes, len(whole["shards"]))
        pool = ThreadPoolExecutor(job.workers, "quantcli")
        try:
            reused = sum(pool.map(run.gather, *zip(*work, strict=True)))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        content = listing(whole["manifest"], job.files)
        files = close_signed(draft, job.out.name, content, job.files, job.signer)
        ours, faults = draft.verified()
        notes = (*faults, *draft.notes)
        if ours:
            raise InputError(
                f"the parts make no sound checkpoint: {ours[0].what}",
                where=ours[0].where or draft.place,
                fix="run the parts again",
            )
        for part in job.parts:
            job.out.check(part.path.resolve(), force=job.force, what=f"the {part.part}")
        draft.publish()
    return Written(job.out, dict(sorted(files.items())), reused, None, notes)


class _Gather:
    """The files of one merge; threads share it."""

    def __init__(self, job: Merge, draft: Draft, progress: Progress) -> None:
        self.job = job
        self.draft = draft
        self.progress = progress
        self.shards = job.parts[0].whole["shards"]
        self._done = 0
        self._lock = threading.Lock()

    def gather(self, part: PartFolder, name: str) -> bool:
        """Link or copy one file of a part, and compare its hash. True for a weight file that an earlier
        run had put there."""
        entry = part.files[name]
        reused = self.draft.reuse(name, entry["bytes"], checksum=part.checksum) == entry
        if not reused:
            # small files are copied: a later edit of config.json must not change the part as well
            link = self.job.linked and name in self.shards
            source = part.path / name
            if self.draft.copy(source, name, checksum=part.checksum, link=link) != entry:
                raise InputError(
                    f"{part.part} is damaged: this is not what was written",
                    where=str(source),
                    fix=AGAIN,
                )
            self.draft.record(name, entry)
        self.progress.advance(entry["bytes"])
        if name not in self.shards:
            return False
        with self._lock:
            self._done += 1
            self.progress.keeps(f"{self._done} of {count(self.shards, 'shard')} in {self.draft.place}")
        self.progress.shard(name, entry["bytes"], reused=reused)
        return reused


def to_json(job: Merge) -> dict[str, Any]:
    """A merge as JSON-able data."""
    return {
        "parts": [
            {
                "folder": str(part.path),
                "part": part.part.number,
                "of": part.part.of,
                "files": sorted(part.files),
                "bytes": sum(entry["bytes"] for entry in part.files.values()),
            }
            for part in job.parts
        ],
        "digest": job.parts[0].whole["manifest"]["plan"],
        "out": str(job.out),
        "bytes": job.nbytes,
        "linked": job.linked,
        "workers": job.workers,
    }
