"""The headers of a model on the Hub, without its weights: a folder that is read like any model's.

Files that are not fetched have their full size there, and no content: they take no space on the disk.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import CONFIG
from quantcli.checkpoint.files import INDEX, STALE, why_left_out
from quantcli.checkpoint.header import MAX_HEADER
from quantcli.checkpoint.hub.download import WORKERS, fetch, patiently
from quantcli.checkpoint.hub.repository import ASK_TIMEOUT, Choice, Repository
from quantcli.core.disk import disk_errors
from quantcli.core.errors import InputError
from quantcli.core.events import Progress
from quantcli.core.text import count

_SMALL = 2**20  # bytes of a file that is fetched whole
_GUESS = 2**16  # bytes that are asked for first: most headers are shorter
_SPAN = re.compile(r"bytes (\d+)-\d+/(\d+)")


def write_headers(repository: Repository, choice: Choice, folder: Path, progress: Progress) -> None:
    """Fill `folder`: small files and descriptions as they are, weights as their headers alone.

    Raises what huggingface_hub raises, and InputError for answers that do not fit together.
    """
    whole = [file for file in choice.others if _is_read(file, repository.sizes[file])]
    fetch(repository, whole, progress)
    progress.say(f"reading the headers of {repository.name}: {count(choice.weights, 'shard')}")
    for file, nbytes in repository.sizes.items():
        place = folder / file
        with disk_errors(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            if file in whole:
                shutil.copyfile(repository.snapshot / file, place)
            elif file not in choice.weights:
                _write(place, b"", nbytes)

    def one(file: str) -> None:
        write_stub(repository, file, folder / file, progress)

    pool = ThreadPoolExecutor(WORKERS, "headers")
    try:
        for _ in pool.map(one, choice.weights):
            pass
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def write_stub(repository: Repository, file: str, place: Path, progress: Progress) -> None:
    """Write the header of a weight file, and a hole for its data. Raises what `write_headers` does."""
    _write(place, *_header(repository, file, progress))


def _is_read(file: str, nbytes: int) -> bool:
    return nbytes <= _SMALL or file in {CONFIG, INDEX} or why_left_out(file) == STALE


def _write(place: Path, content: bytes, nbytes: int) -> None:
    """A file of `nbytes` bytes that begins with `content`."""
    try:
        with disk_errors(place), place.open("wb") as file:
            file.write(content)
            file.truncate(nbytes)
    except OverflowError:
        what = f"the Hub says that the file has {nbytes} bytes"
        raise InputError(what, where=place.name, fix="take a model that you trust") from None


@dataclass
class _Beginning:
    """The first bytes of a file, and what the server says of the whole."""

    content: bytearray = field(default_factory=bytearray)
    etag: str | None = None


def _header(repository: Repository, file: str, progress: Progress) -> tuple[bytes, int]:
    """The length and the JSON of a header, as they are in the file, and the size of the file.

    A header that is too long, or longer than the file, is cut: the reader of headers refuses it.
    """
    read = _Beginning()
    size = repository.sizes[file]

    def up_to(end: int) -> None:
        while len(read.content) < min(end, size):
            patiently(lambda: _ask(repository, file, read, min(end, size)), f"`{file}`", progress)

    up_to(_GUESS)
    if len(read.content) >= 8:
        length = int.from_bytes(read.content[:8], "little")
        if length <= MAX_HEADER:
            up_to(8 + length)
            del read.content[8 + length :]
    return bytes(read.content), size


def _ask(repository: Repository, file: str, read: _Beginning, end: int) -> None:
    """Add bytes up to `end` of a file to what was read; what arrived before an error is kept.

    The connection is closed then: a server that ignores the range sends the whole file.
    """
    from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    first = len(read.content)
    url = hf_hub_url(repository.name, file, revision=repository.commit)
    headers = {
        **build_hf_headers(), "Range": f"bytes={first}-{end - 1}", "Accept-Encoding": "identity",
    }  # fmt: skip
    with get_session().stream("GET", url, headers=headers, timeout=ASK_TIMEOUT) as response:
        hf_raise_for_status(response)
        skipped = 0 if response.status_code == 206 else first
        _check(repository, file, read, response, first)
        for piece in _pieces(response, skipped):
            read.content += piece[: end - len(read.content)]
            if len(read.content) == end:
                return
    if len(read.content) == first:
        raise _differs(repository, file, "an empty answer")


def _check(repository: Repository, file: str, read: _Beginning, response: Any, first: int) -> None:
    """InputError if an answer is not of the same file as the list of files, or the answer before."""
    status, headers = response.status_code, response.headers
    span = _SPAN.fullmatch(headers.get("Content-Range", ""))
    if status == 206 and (span is None or int(span[1]) != first):
        raise _differs(repository, file, f"the range {headers.get('Content-Range')!r:.60}")
    nbytes = span[2] if span else headers.get("Content-Length")
    if nbytes is not None and int(nbytes) != repository.sizes[file]:
        raise _differs(repository, file, f"{nbytes:.20} bytes, not {repository.sizes[file]},")
    etag = headers.get("ETag")
    if read.etag not in {None, etag}:
        raise _differs(repository, file, "another version than before")
    read.etag = etag


def _pieces(response: Any, skipped: int) -> Iterator[bytes]:
    for piece in response.iter_bytes():
        yield piece[skipped:]
        skipped = max(0, skipped - len(piece))


def _differs(repository: Repository, file: str, what: str) -> InputError:
    return InputError(
        f"the server gives {what} for a file of the model",
        where=f"{repository.name}, {file}",
        fix="try again; if it stays so, check HF_ENDPOINT",
    )
