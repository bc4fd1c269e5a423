"""A repository of the Hub as the destination: one shard at a time is on this machine, then committed.

The first commit has the journal, and takes away what would make an older model look done. Each shard is
a commit, with a line of the journal. The small files come after the last shard, config.json and the
manifest behind them, and the card last; that commit deletes the journal.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from quantcli.checkpoint.checkpoint import CONFIG
from quantcli.checkpoint.files import CARD, INDEX, JOURNAL, MANIFEST, SIGNATURE, WEIGHTS
from quantcli.checkpoint.hub.upload import Branch, Content, Sent, open_branch, parse, send
from quantcli.checkpoint.manifest import whole_manifest
from quantcli.checkpoint.remote.hub_folder import HubFolder
from quantcli.checkpoint.remote.mounts import read_header_bytes, write_stub
from quantcli.checkpoint.remote.origin import Version
from quantcli.checkpoint.remote.reading import report_to
from quantcli.checkpoint.writer import ShardWriter
from quantcli.convert.destination import Destination, Draft, Entry, Room, ShardSink, Start
from quantcli.convert.folder import attempt_folder, copy_file
from quantcli.convert.journal import check_head, done_shards, parse_journal
from quantcli.core.disk import disk_errors, file_entry, lock, write_file
from quantcli.core.errors import InputError, MachineError
from quantcli.core.events import SILENT, Progress

if TYPE_CHECKING:
    from quantcli.core.extents import Buffers
    from quantcli.core.findings import Finding
    from quantcli.planning.parts import Part
    from quantcli.planning.plan import Shard

_KEPT = {".gitattributes", "LICENSE"}  # of a repository that was there before
_HARMLESS = {*_KEPT, CARD}  # what a repository without a model may have
_LOOKS_DONE = (MANIFEST, SIGNATURE, CONFIG, INDEX, CARD)
_LATE = (CONFIG, SIGNATURE, MANIFEST)
_LOCK = ".lock"


@dataclass(frozen=True)
class HubRepository(Destination):
    """A branch of a repository, as hf://ORG/NAME or hf://ORG/NAME@BRANCH."""

    url: str
    progress: Progress = field(default=SILENT, compare=False, repr=False)

    def __str__(self) -> str:
        return self.url

    @cached_property
    def _branch(self) -> Branch:
        return open_branch(self.url, self.progress)

    @property
    def name(self) -> str:
        """The name of the repository, without its organisation."""
        return parse(self.url)[0].rpartition("/")[2]

    @property
    def address(self) -> str:
        """With its branch, also if that is not named."""
        return "@".join(parse(self.url)) + "/"

    @property
    def served_as(self) -> str:
        """ORG/NAME."""
        return parse(self.url)[0]

    @property
    def serve_flags(self) -> tuple[str, ...]:
        """The branch, if it is not main."""
        branch = parse(self.url)[1]
        return () if branch == "main" else ("--revision", branch)

    @property
    def remark(self) -> str:
        """Whether the repository or the branch will be created."""
        if self._branch.is_new:
            return ", which is created as a private repository"
        return ", a new branch" if self._branch.commit is None else ""

    @property
    def draft_place(self) -> str:
        """The address: a draft is where the checkpoint will be."""
        return self.url

    @property
    def begun(self) -> bool:
        """Whether the branch has a journal."""
        return JOURNAL in self._branch.files

    @property
    def exists(self) -> bool:
        """Whether the branch holds files that are more than a licence and a card."""
        return not self.begun and bool(self._branch.files.keys() - _HARMLESS)

    @property
    def fate(self) -> str:
        """What becomes of those files."""
        return "deleted, and stays in the history"

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, if there is no journal and all files have their sizes."""
        if self.begun or MANIFEST not in self._branch.files:
            return None
        sizes = {name: entry.nbytes for name, entry in self._branch.files.items()}
        return whole_manifest(self._branch.read(MANIFEST), sizes)

    def sibling(self, suffix: str) -> Path:
        """A folder in the current one, named after the repository."""
        return Path(self.name + suffix)

    def part(self, part: Part) -> Destination:
        """InputError: a part is not a model, and a repository is one."""
        raise InputError(
            "a repository takes no parts",
            where=f"--out {self.url}",
            fix="write the parts to folders, and join them with `quantcli pack --merge --out "
            f"{self.url}`",
        )

    def check(self, model: Path, *, force: bool, what: str = "the model") -> None:
        """Ask the Hub whether this user may write there. InputError if not, or if a model is there."""
        if self.exists and not force:
            few = sorted(self._branch.files.keys() - _HARMLESS)[:3]
            raise InputError(
                f"the repository holds other files: {', '.join(f'`{name}`' for name in few)}",
                where=self.url,
                fix="choose another --out, or use --force",
            )

    def room(self, shards: Sequence[int], others: int) -> Room:
        """The largest shard and all small files, in the folder for temporary files."""
        nbytes, place = max(shards, default=0) + others, Path(tempfile.gettempdir())
        with disk_errors(place):
            free = disk_usage(place)[2]
        if free < nbytes:
            raise MachineError(
                f"disk is too full for the largest shard: needs {nbytes:,} bytes, {free:,} are free",
                where=str(place),
                fix="free some space, or set TMPDIR to a folder on another disk",
            )
        return Room(nbytes, free, f" in {place}, for one shard at a time")

    def done(self, head: dict[str, Any] | None) -> int:
        """Number of shards in the journal. InputError for a run without hashes."""
        if head is not None:
            _check_hashed(head, self.url)
        return max(0, len(self.journal(head)) - 1)

    def journal(self, head: dict[str, Any] | None) -> list[dict[str, Any]]:
        """The lines of the journal that an interrupted run left. InputError if its head is another."""
        if head is None or not self.begun:
            return []
        lines, _ = parse_journal(self._branch.read(JOURNAL, self.progress))
        check_head(lines, head, self.url)
        return lines

    def links(self, files: Sequence[Path]) -> bool:
        """False: files are uploaded."""
        return False

    def begin(self, start: Start) -> HubDraft:
        """Commit the journal, after the repository was created if need be."""
        return HubDraft(self, self._branch, start)


def _check_hashed(head: dict[str, Any], url: str) -> None:
    if not head["checksum"]:
        raise InputError(
            "the Hub takes no file without its hash", where=url, fix="leave --no-checksum out"
        )


class HubSink(ShardSink):
    """Writes a shard into a folder of this machine, uploads it and deletes it there.

    scratch: the folder. progress: stays in this process.
    """

    most_shards = 1

    def __init__(self, url: str, scratch: Path, progress: Progress = SILENT) -> None:
        self.url = url
        self.scratch = scratch
        self.progress = progress

    def __reduce__(self) -> Any:
        return HubSink, (self.url, self.scratch)

    def extents(self, shards: Sequence[Shard]) -> int:
        """None."""
        return 0  # one that gets no memory goes to the disk by pieces

    def writer(self, shard: Shard, buffers: Buffers, *, checksum: bool) -> HubWriter:
        """A writer of a shard, which is always hashed."""
        return HubWriter(self, shard, buffers)

    @contextmanager
    def attempt(self, file: str) -> Iterator[HubSink]:
        """A folder for this attempt alone, which may be on another machine."""
        with disk_errors(self.scratch):
            self.scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        own = attempt_folder(self.scratch, file)
        try:
            yield HubSink(self.url, own, self.progress)
        finally:
            shutil.rmtree(own, ignore_errors=True)
            with suppress(OSError):  # others may be at work there
                self.scratch.rmdir()
                self.scratch.parent.rmdir()


class HubWriter(ShardWriter):
    """One shard, which is uploaded when it is whole. A commit that names it is still to be made."""

    def __init__(self, sink: HubSink, shard: Shard, buffers: Buffers) -> None:
        super().__init__(
            sink.scratch,
            shard.file,
            shard.tensors,
            buffers=buffers,
            by_columns=shard.by_columns,
            checksum=True,
            read_soon=True,
        )
        self._sink = sink
        self._name = shard.file

    def finish(self) -> Entry:
        """Upload the shard, and delete it here. Returns its entry of the manifest."""
        entry = super().finish()
        url, progress = self._sink.url, self._sink.progress
        progress.say(f"uploading {self._name}, {decimal(self.nbytes)}")
        send(url, self._name, self.path, entry["sha256"], progress)
        with disk_errors(self.path):
            self.path.unlink()
        return entry

    def abandon(self) -> None:
        """Delete what was written."""
        super().abandon()
        with disk_errors(self._temporary):
            self._temporary.unlink(missing_ok=True)


class HubDraft(Draft):
    """A branch with a journal, and small files on this machine that wait for the last shard."""

    def __init__(self, out: HubRepository, branch: Branch, start: Start) -> None:
        _check_hashed(start.head, out.url)
        self._branch = branch
        self._progress = start.progress
        self._scratch = _Scratch(out.url)
        self.sink = HubSink(out.url, self._scratch.shards, self._progress)
        self._mutex = threading.Lock()
        self._large: dict[str, Sent] = {}  # files that are with the Hub, committed or not
        try:
            lines = out.journal(None if start.fresh else start.head)
            if not lines:
                branch.create(self._progress)
                lines = [start.head]
                self._commit("Begin", {}, lines, _LOOKS_DONE)
            self._lines = lines
        except BaseException:
            self._scratch.close()
            raise
        self._done = done_shards(lines)

    @property
    def done(self) -> int:
        """Number of shards in the journal that was found."""
        return len(self._done)

    @property
    def place(self) -> str:
        """The address."""
        return self._branch.url

    def reuse(self, name: str, nbytes: int, *, checksum: bool) -> Entry | str | None:
        """Compare what the Hub says of a shard with the journal."""
        done, file = self._done.get(name), self._branch.files.get(name)
        if done is None or file is None:
            return None
        if not file.nbytes == done.nbytes == nbytes:
            return "its size has changed"
        if not file.large or file.digest != done.sha256 or done.blake3 is None:
            return "its hash has changed"
        self._large[name] = Sent(nbytes, done.sha256)
        return {"bytes": nbytes, "sha256": done.sha256, "blake3": done.blake3}

    def record(self, name: str, entry: Entry) -> None:
        """Commit a shard that was uploaded, and its line of the journal."""
        if not name.endswith(WEIGHTS):
            return  # a small file waits here
        content = Sent(entry["bytes"], entry["sha256"])
        line = {"shard": name, "nbytes": entry["bytes"]}
        line |= {key: entry[key] for key in ("sha256", "blake3")}
        with self._mutex:
            self._commit(f"Add {name}", {name: content}, [*self._lines, line])
            self._lines.append(line)
            self._large[name] = content

    def _commit(
        self,
        title: str,
        contents: Mapping[str, Content],
        lines: Sequence[dict[str, Any]],
        deleted: Sequence[str] = (),
    ) -> None:
        journal = "".join(json.dumps(line) + "\n" for line in lines).encode()
        self._branch.write(title, {**contents, JOURNAL: journal}, deleted, self._progress)

    def put(self, name: str, content: bytes, *, checksum: bool) -> Entry:
        """Keep a small file here until `publish`."""
        write_file(self._scratch.small / name, content)
        return file_entry(self._scratch.small / name, checksum=checksum)

    def copy(self, source: Path, name: str, *, checksum: bool, link: bool = False) -> Entry:
        """Upload a weight file; keep any other one here until `publish`."""
        if name.endswith(WEIGHTS):
            entry = file_entry(source, checksum=True)
            send(self.place, name, source, entry["sha256"], self._progress)
            return entry if checksum else {"bytes": entry["bytes"]}
        copy_file(source, self._scratch.small / name)
        return file_entry(self._scratch.small / name, checksum=checksum)

    def close_with(self, listing: str, content: bytes, files: Mapping[str, Entry]) -> None:
        """Keep the listing here until `publish`, which commits these files and no others."""
        write_file(self._scratch.small / listing, content)
        self._files = {*files, listing}

    def verified(self) -> tuple[list[Finding], tuple[str, ...]]:
        """Check the small files together with the headers of shards, as the Hub gives them."""
        from huggingface_hub import constants

        from quantcli.verification.structure import verified

        branch = self._branch
        origin = HubFolder(branch.name, str(branch.commit), branch.url, constants.ENDPOINT)
        report_to(origin, self._progress)
        for name, sent in self._large.items():
            header = read_header_bytes(origin, name, Version(sent.nbytes, sent.sha256))
            write_stub(self._scratch.small / name, header, sent.nbytes)
        errors, notes = verified(self._scratch.small)
        here = str(self._scratch.small)
        return errors, tuple(note.replace(here, branch.url) for note in notes)

    def publish(self) -> None:
        """Commit the small files, the manifest and the card, in this order."""
        small = {name: self._scratch.small / name for name in sorted(self._files - self._large.keys())}
        late = {name: small.pop(name) for name in _LATE if name in small}
        card = {name: small.pop(name) for name in (CARD,) if name in small}
        kept = self._files | _KEPT | {JOURNAL}
        others = [name for name in self._branch.files if name not in kept]
        write = self._branch.write
        if small or others:
            write("Add the files without weights", small, others, self._progress)
        write("Add the configuration and the manifest", late, (), self._progress)
        write("Add the card", card, [JOURNAL], self._progress)

    def discard(self) -> None:
        """Delete the shards and the journal."""
        names = [*self._done, *self._large, JOURNAL]
        self._branch.write("Take back an unfinished model", {}, names, self._progress)

    def close(self) -> None:
        """Delete what is on this machine."""
        self._scratch.close()


class _Scratch:
    """A folder of this machine for one run at a time, which is emptied at its beginning and its end.

    Its name depends on the destination, so that what a killed run has left is found and deleted.
    """

    def __init__(self, url: str) -> None:
        name = f"quantcli-{os.getuid()}-{sha256(url.encode()).hexdigest()[:16]}"
        self._folder = Path(tempfile.gettempdir()) / name
        with disk_errors(self._folder):
            with suppress(FileExistsError):
                self._folder.mkdir(mode=0o700)
            status = self._folder.lstat()
            if self._folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
                raise MachineError(
                    "somebody else has made this folder, or can write in it",
                    where=str(self._folder),
                    fix="remove it, or set TMPDIR to a folder of your own",
                )
            self._fd = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            lock(self._fd, self._folder)
            self._empty()
        except BaseException:
            os.close(self._fd)
            raise
        self.shards, self.small = self._folder / "shards", self._folder / "files"
        with disk_errors(self._folder):
            self.shards.mkdir()
            self.small.mkdir()

    def _empty(self) -> None:
        with disk_errors(self._folder):
            for entry in self._folder.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name != _LOCK:
                    entry.unlink()

    def close(self) -> None:
        """Delete the folder."""
        if self._fd >= 0:
            self._empty()
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._fd)
            self._fd = -1
