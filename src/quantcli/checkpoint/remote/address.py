"""Addresses as users give them: their kind, and how messages show them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from quantcli.core.untrusted.names import printable

_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_AS_PATH = re.compile(r"(?P<scheme>hf|s3|gs|az|https?):/(?P<rest>[^/].*)", re.DOTALL | re.IGNORECASE)
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/.*", re.DOTALL)
_LONGEST = 200
_LONGEST_LABEL = 63  # characters between two dots of a host


def address_of(text: str) -> str | None:
    """`text` as an address, if it is one, with its scheme in lower case.

    A path drops one of the slashes after the colon, and so has `s3:/BUCKET`.
    """
    match = _ADDRESS.fullmatch(text) or _AS_PATH.fullmatch(text)
    return f"{match['scheme'].lower()}://{match['rest'].lstrip('/')}" if match else None


def scheme_of(text: str) -> str | None:
    """The scheme of an address, such as `s3`; None for what names a folder or a model of the Hub."""
    address = address_of(text)
    return address.partition("://")[0] if address else None


def is_server(text: str) -> bool:
    """Whether `text` is an address of HTTP that a request can go to."""
    try:
        parts = urlsplit(text)
        labels = (parts.hostname or "").removesuffix(".").split(".")  # of a name or an IP address
        sound = all(1 <= len(label) <= _LONGEST_LABEL for label in labels)
        usable = parts.scheme in {"http", "https"} and sound and parts.port != 0
    except ValueError:  # a port that is none, a bracket without its other half
        return False
    return usable and text.isascii() and text.isprintable() and " " not in text


def public_form(text: str) -> str:
    """An address for messages that refuse it, on one line: without what may be a key, a password, a
    token or a signature in it."""
    address = address_of(text) or text
    scheme, between, rest = address.partition("://")
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    before, at, behind = rest.rpartition("@")
    if at and (":" in before or "/" not in before):  # not the revision in ORG/NAME@REVISION
        rest = f"...@{behind}"
    line = f"{scheme}{between}{rest}"[:_LONGEST]
    return printable(line)


def without_secrets(argument: str) -> str:
    """An argument of the command line for a log: an address in it as `public_form` gives it."""
    return _IN_TEXT.sub(lambda match: public_form(match[0]), argument)
