"""Answers to requests for ranges by HTTP, checked against what is known of the file."""

from __future__ import annotations

import http.client
import re
from email.message import Message

from quantcli.checkpoint.remote.origin import Origin, PassingError, Version
from quantcli.checkpoint.remote.web import asked_wait, content_length, is_passing, read_body
from quantcli.core.errors import InputError

_SPAN = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")
PLAIN = {"Accept-Encoding": "identity", "User-Agent": "quantcli"}


def range_header(first: int, nbytes: int) -> dict[str, str]:
    """The header that asks for `nbytes` bytes from `first` on."""
    return {"Range": f"bytes={first}-{first + nbytes - 1}"}


def tag_of(headers: Message) -> str:
    """What a server says that changes with the content of a file: its ETag, or a time; or nothing."""
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def is_strong(tag: str) -> bool:
    """Whether a tag is an ETag that promises the same bytes."""
    return tag.startswith('"')


def read_answer(
    response: http.client.HTTPResponse,
    origin: Origin,
    name: str,
    version: Version,
    first: int,
    block: memoryview,
) -> None:
    """Fill `block` from the answer to a request for it; see `Origin.ask`. Its tag is not checked."""
    status = response.status
    if is_passing(status):
        raise PassingError(f"the server answers {status}", 0, asked_wait(response.headers))
    if status in {412, 416}:
        raise origin.changed(name)
    if status == 200 and (first or len(block) < version.nbytes):
        raise InputError(
            "the server does not support range requests",
            where=origin.where(name),
            fix="take another server, or download the model and give the folder",
        )
    if status not in {200, 206}:
        raise refused(origin, name, status)
    span = _SPAN.fullmatch(response.headers.get("Content-Range", ""))
    if status == 206:
        last = first + len(block) - 1
        if span is None or (int(span[1]), int(span[2])) != (first, last):
            raise PassingError("the server answers with another range than was asked for")
        total = None if span[3] == "*" else int(span[3])
    else:
        total = content_length(response.headers)
    if total not in {None, version.nbytes}:
        raise origin.changed(name)
    read_body(response, block)


def refused(origin: Origin, name: str, status: int) -> InputError:
    """The error for an answer that no patience changes."""
    where = origin.where(name) if name else origin.address
    if status in {401, 403}:
        what = f"the server refuses access: it answers {status}"
        return InputError(what, where=where, fix="give an address that may be read without a password")
    if status in {404, 410}:
        return InputError("no such file on the server", where=where, fix="check the address")
    return InputError(f"the server answers {status}", where=where, fix="check the address")
