"""A checkpoint next to what its plan would write, file by file and byte by byte.

Nothing is written: a plan fixes the headers of weight files and the bytes of generated files, and rows
of tensors are computed again and compared at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from quantcli.checkpoint.files import CARD, MANIFEST, SIGNATURE
from quantcli.checkpoint.header import StoredTensor, read_header
from quantcli.core.disk import disk_errors, file_entry, sha256_of
from quantcli.core.errors import InputError
from quantcli.core.events import Progress
from quantcli.core.untrusted.tables import parse_table
from quantcli.planning.block import Job, Surveys, compute, jobs_of, read_calibrated
from quantcli.planning.card.figures import replaced
from quantcli.planning.plan import Item, Shard, Work
from quantcli.verification.again.compare import change_of
from quantcli.verification.again.difference import Difference, StoredParts, merge
from quantcli.verification.spread.pool import Pool


@dataclass(frozen=True)
class Unlike:
    """A difference of a checkpoint from what its plan would write.

    file:   that differs. tensor, index: the first element in it; None if it is not about numbers.
    stored: what the checkpoint has. planned: what this run makes.
    count:  how many elements of the tensor differ, or 1.
    """

    file: str
    stored: str
    planned: str
    tensor: str | None = None
    index: tuple[int, ...] | None = None
    count: int = 1

    def __str__(self) -> str:
        """As a sentence."""
        if self.tensor is None:
            return f"`{self.file}` {self.stored}; this run makes {self.planned}"
        place = "" if self.index is None else f"[{', '.join(map(str, self.index))}]"
        more = f" ({self.count - 1:,} more differ)" if self.count > 1 else ""
        where = f"`{self.tensor}`{place} in `{self.file}`"
        return f"{where} is {self.stored}; this run makes {self.planned}{more}"

    def to_json(self) -> dict[str, Any]:
        """As JSON-able data."""
        index = None if self.index is None else list(self.index)
        named = {"file": self.file, "tensor": self.tensor, "index": index}
        return {**named, "stored": self.stored, "planned": self.planned, "count": self.count}


@dataclass(frozen=True)
class Whole:
    """A checkpoint in a folder, and the plan that would write it.

    manifest:     the checkpoint's own.
    same_version: whether the versions that made it are those here; else the manifest says other ones.
    """

    folder: Path
    plan: Work
    manifest: Mapping[str, Any]
    same_version: bool
    surveys: Surveys = field(default_factory=Surveys)

    def shard(self, shard: Shard, pool: Pool, progress: Progress) -> list[Unlike]:
        """The differences of a weight file, in the order of its data.

        Memory: a row block, and the stored one, for each worker. InputError for a weight of the source
        that cannot be quantized.
        """
        path = self.folder / shard.file
        if not path.is_file():
            return [Unlike(shard.file, "is missing", f"{shard.nbytes:,} bytes")]
        try:
            tensors = {stored.spec.name: stored for stored in read_header(path)[0]}
        except InputError as error:
            return [Unlike(shard.file, f"cannot be read: {error.what}", "a sound file")]
        unlike = list(self._header(shard, path, tensors))
        other = {each.tensor for each in unlike}
        items = [i for i in shard.items if not any(out.spec.name in other for out in i.outputs)]
        differences: dict[str, Difference] = {}
        jobs = [(n, job) for n, item in enumerate(items) for job in jobs_of([item])]
        requests = [(n, job.start, job.stop) for n, job in jobs]
        common = _Common(self, items, tensors)
        for found in pool.each(_compared, common, requests, [job.nbytes for _, job in jobs], progress):
            merge(differences, found)
        values = [
            Unlike(shard.file, d.actual, d.expected, d.name, d.index, d.count)
            for spec in shard.tensors
            if (d := differences.get(spec.name)) is not None
        ]
        return [*unlike, *values]

    def _header(
        self, shard: Shard, path: Path, tensors: Mapping[str, StoredTensor]
    ) -> Iterator[Unlike]:
        """Tensors of other kinds than the plan's; if there are none, whether the header differs."""
        planned = {spec.name: spec for spec in shard.tensors}
        found = False
        for name in sorted(planned.keys() | tensors.keys()):
            stored, spec = (tensors[name].spec if name in tensors else None), planned.get(name)
            if stored != spec:
                found = True
                absent = "not there"
                yield Unlike(shard.file, str(stored or absent), str(spec or absent), name)
        with disk_errors(path), path.open("rb") as file:
            header = file.read(len(shard.header))
        if not found and header != shard.header:
            at = _first(header, shard.header)
            yield Unlike(shard.file, f"has another header, from byte {at}", "that of its plan")

    def files(self) -> Iterator[Unlike]:
        """The differences of the other files: those that are generated, and those that are copied."""
        for name, content in sorted(self.plan.sidecars.items()):
            path = self.folder / name
            if not path.is_file():
                yield Unlike(name, "is missing", f"{len(content):,} bytes")
                continue
            with disk_errors(path):
                stored = path.read_bytes()
            if name == CARD:
                stored, content = without_figures(stored), without_figures(content)
            if stored != content:
                yield Unlike(name, *_texts(name, stored, content))
        for name in sorted(self.plan.copies):
            path = self.folder / name
            if not path.is_file():
                yield Unlike(name, "is missing", "a copy of the model's")
            elif (ours := sha256_of(path)) != (models := sha256_of(self.plan.checkpoint.path / name)):
                yield Unlike(name, f"has the sha256 {ours}", f"a copy of the model's, {models}")

    def listing(self, different: Collection[str]) -> Iterator[Unlike]:
        """The differences of the manifest: of the conversion, of the files and of their hashes.

        different: files that this run makes otherwise. Their hashes are not known here.
        """
        files: Mapping[str, Any] = self.manifest["files"]
        planned = {*(s.file for s in self.plan.shards), *self.plan.sidecars, *self.plan.copies}
        for name in sorted(planned ^ files.keys()):
            here, there = ("lists", "does not list") if name in files else ("does not list", "lists")
            yield Unlike(MANIFEST, f"{here} `{name}`", f"one that {there} it")
        head = self.plan.manifest()
        stored = {key: value for key, value in self.manifest.items() if key not in {"files", "sha256"}}
        if not self.same_version:  # a note says so
            for key in ("tool", "plan"):
                head.pop(key)
                stored.pop(key, None)
            head, stored = _without_tool(head), _without_tool(stored)
        if isinstance(block := stored.get("calibration", {}), dict) and "calibration" in head:
            # an earlier version may not have recorded all of it, which is a note
            kept = {key: value for key, value in head["calibration"].items() if key in block}
            head["calibration"], stored["calibration"] = kept, block
        if (change := change_of(stored, head)) is not None:
            yield Unlike(MANIFEST, *_halves(change))
        for name, (key, listed, now) in self.changed.items():
            if name in planned and name not in different:
                yield Unlike(MANIFEST, f"has {key} {listed:.80} for `{name}`", now)

    @cached_property
    def changed(self) -> dict[str, tuple[str, str, str]]:
        """Files that the manifest lists otherwise: a key of the entry, its value, that of the file."""
        found = {}
        for name, entry in self.manifest["files"].items():
            path = self.folder / name
            if not path.is_file():
                continue
            now = file_entry(path, checksum="sha256" in entry)
            other = next((key for key in now if now[key] != entry.get(key)), None)
            if other is not None:
                found[name] = (other, str(entry.get(other)), str(now[other]))
        return found

    def figures(self) -> bool:
        """Whether the card has figures of a verification, which a conversion does not write."""
        path = self.folder / CARD
        planned = self.plan.sidecars.get(CARD)
        if planned is None or not path.is_file():
            return False
        with disk_errors(path):
            content = path.read_bytes()
        return content != planned and without_figures(content) == without_figures(planned)

    def others(self) -> list[str]:
        """Names of files of the folder that the manifest does not list; a signature is none of them."""
        listed = {*self.manifest["files"], MANIFEST, SIGNATURE}
        with disk_errors(self.folder):
            files = (path for path in self.folder.rglob("*") if path.is_file())
            names = [path.relative_to(self.folder).as_posix() for path in files]
        return sorted(name for name in names if name not in listed)


@dataclass(frozen=True)
class _Common:
    """What all requests of a shard share."""

    whole: Whole
    items: Sequence[Item]
    tensors: Mapping[str, StoredTensor]


def _compared(
    common: _Common, request: tuple[int, int, int], progress: Progress
) -> dict[str, Difference]:
    """The differences in some rows of an item. request: the index of the item, and its rows."""
    index, start, stop = request
    item, whole = common.items[index], common.whole
    differences: dict[str, Difference] = {}
    calibrated = read_calibrated(item, whole.surveys)
    with ExitStack() as stack:
        stored = StoredParts(common.tensors, stack)
        for rows in compute(Job(item, start, stop), whole.plan.target, calibrated):
            blocks = (stored.block(output, first, expected) for output, first, expected in rows.written)
            found = (block.difference() for block in blocks)
            merge(differences, {each.name: each for each in found if each})
            progress.advance(rows.nbytes)
    return differences


def without_figures(card: bytes) -> bytes:
    """A card without the figures that `verify --card` wrote; as it is, if it has no place for them."""
    try:
        blank = replaced(card.decode(), "")
    except UnicodeDecodeError:
        return card
    return card if blank is None else blank.encode()


def _texts(name: str, stored: bytes, planned: bytes) -> tuple[str, str]:
    """What two contents of a generated file differ in: a key of JSON, else a line."""
    if name.endswith(".json"):
        try:
            tables = [parse_table(content, name).value for content in (stored, planned)]
            change = change_of(tables[0], tables[1])
        except InputError:
            change = None
        if change is not None:
            return _halves(change)
    lines = (content.decode(errors="replace").splitlines() for content in (stored, planned))
    for number, (line, other) in enumerate(zip_longest(*lines), 1):
        if line is None:
            return f"has no line {number}", f"{other!r:.120}"
        if line != other:
            return (
                f"has {line!r:.120} in line {number}",
                f"{other!r:.120}" if other is not None else "no such line",
            )
    at = _first(stored, planned)
    return f"has another byte {at}", f"{len(planned):,} bytes"


def _halves(change: str) -> tuple[str, str]:
    """A change of a JSON document as what is stored and what is planned."""
    stored, _, planned = change.partition("; the recipe makes ")
    return f"has another value: {stored}", planned


def _without_tool(head: Mapping[str, Any]) -> dict[str, Any]:
    """The head of a manifest without the versions that calibrated."""
    block = head.get("calibration")
    if not isinstance(block, dict):
        return dict(head)
    return {**head, "calibration": {key: block[key] for key in block if key != "tool"}}


def _first(one: bytes, other: bytes) -> int:
    """The first byte in which two contents differ."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
