"""The journal of an upload: an object next to those that it lists.

A text, one JSON object a line: first the run, then every shard that is whole. Each run writes a token
of its own into it. A later run replaces the token, and the earlier one stops when it sees that: so two
runs never end a checkpoint together.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from quantcli.checkpoint.files import JOURNAL
from quantcli.checkpoint.manifest import check_files
from quantcli.checkpoint.remote.origin import Version
from quantcli.convert.destination import Entry
from quantcli.convert.journal import HEAD, check_head, check_head_types
from quantcli.convert.objects.bucket import Bucket, CannotCompareError, Identity, LostRaceError
from quantcli.core.errors import InputError, MachineError
from quantcli.core.untrusted.tables import parse_table

_RUN = {"run", "files", *HEAD}
_DONE = {"shard", "entry", "tag"}


@dataclass(frozen=True)
class Uploaded:
    """A whole file: its entry of the manifest, and the ETag that the store gave it."""

    entry: Entry
    tag: str

    @property
    def version(self) -> Version:
        """What the store lists."""
        return Version(self.entry["bytes"], self.tag)


@dataclass(frozen=True)
class Notes:
    """What a journal holds.

    head:  of the run: see `run_head`. files: all names that are, or were, the run's own.
    done:  whole files. identity: what a conditional request names.
    """

    head: dict[str, Any]
    files: frozenset[str]
    done: Mapping[str, Uploaded]
    identity: Identity

    def check(self, head: dict[str, Any], bucket: Bucket) -> None:
        """InputError if it is of a run with another head."""
        check_head([self.head], head, str(bucket))


def read_notes(bucket: Bucket) -> Notes:
    """The journal that is there. InputError if it is damaged."""
    content, identity = bucket.get(JOURNAL)
    try:
        first, *lines = [parse_table(line, JOURNAL) for line in content.splitlines() or [b""]]
        first.only(_RUN)
        check_head_types(first)
        files, done = first.texts("files"), {}
        for line in lines:
            line.only(_DONE)
            name, entry = line.text("shard"), line.table("entry")
            check_files({name: entry})
            done[name] = Uploaded(dict(entry.value), line.text("tag"))
    except InputError as error:
        raise InputError(
            f"journal of an unfinished run makes no sense to this version: {error.what}",
            where=f"{bucket}/{JOURNAL}",
            fix="use the version of quantcli that wrote it, or choose another --out",
        ) from None
    head = {key: first.value[key] for key in HEAD}
    return Notes(head, frozenset(files), done, identity)


class ObjectJournal:
    """The open journal of one run. Threads may share it."""

    def __init__(
        self,
        bucket: Bucket,
        head: dict[str, Any],
        files: Collection[str],
        done: Mapping[str, Uploaded],
        identity: Identity | None,
    ) -> None:
        """Write the journal in place of the one with an `identity`, or as the first one (None).

        files: all names that are the run's own. done: whole files of an earlier run. MachineError if
        another run was faster.
        """
        self.done = dict(done)
        self.files = frozenset(files)
        self.notes: tuple[str, ...] = ()
        self._bucket = bucket
        self._first = {"run": secrets.token_hex(8), "files": sorted(files), **head}
        self._identity = identity
        self._compares = True
        self._lock = threading.Lock()
        self._write()

    def record(self, name: str, uploaded: Uploaded) -> None:
        """Note that a file is whole. MachineError if another run has begun since."""
        with self._lock:
            self.done[name] = uploaded
            self._write()

    def confirm(self) -> None:
        """MachineError if another run has begun since."""
        with self._lock:
            self._write()

    def remove(self) -> None:
        """The checkpoint is complete."""
        self._bucket.delete([JOURNAL])

    def _write(self) -> None:
        lines = [self._first]
        for name, uploaded in self.done.items():
            lines.append({"shard": name, "entry": uploaded.entry, "tag": uploaded.tag})
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        try:
            if self._compares:
                self._identity = self._bucket.replace(JOURNAL, content, self._identity)
                return
        except LostRaceError:
            raise MachineError(
                "another run is writing here",
                where=str(self._bucket),
                fix="let only one of them run; the later one continues what both have written",
            ) from None
        except CannotCompareError:
            self._compares = False
            self.notes = (
                f"{self._bucket.place.scheme}:// of this server has no conditional requests: nothing "
                "would stop a second run at the same place",
            )
        self._bucket.put(JOURNAL, content)
