"""Untrusted names of tensors, files and folders: what a screen shows of them, and which of them a file
may have."""

from __future__ import annotations

MAX_NAME = 512  # bytes of a tensor's name, in UTF-8
MAX_PART = 255  # bytes of the name of a file or folder, in UTF-8: what Linux takes
MAX_PATH = 4095  # bytes of a path, in UTF-8


def printable(text: str) -> str:
    """A text as one line of visible characters: all others are escaped.

    Those are control characters, line ends, marks that reorder text, characters without width, and
    halves of characters. A byte that is not UTF-8 is `\\xff`; Python holds it as half a character.
    """
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return repr(character)[1:-1]


def visible_json(text: str) -> str:
    """JSON text whose strings have escapes in place of invisible characters: it says the same, and a
    terminal shows all of it."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else _json_escape(c) for c in text)


def _json_escape(character: str) -> str:
    code = ord(character)
    if code < 0x10000:
        return f"\\u{code:04x}"
    high, low = divmod(code - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"


def utf8_fault(text: str) -> str | None:
    """Why a text cannot stand in a file of UTF-8; None if it can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"`{printable(text)[-200:]}` is not UTF-8"
    return None


def tensor_name_fault(name: str) -> str | None:
    """What is wrong with the name of a tensor, as it came with a model; None for a good name."""
    if not name:
        return "a tensor has an empty name"
    if not name.isprintable():  # NUL, newlines, escape codes, bidirectional overrides
        return f"tensor name `{printable(name):.200}` has control characters"
    if len(name.encode()) > MAX_NAME:
        return f"tensor name starting {name[:40]!r} is over {MAX_NAME} bytes"
    return None


def file_name_fault(name: str, *, folders: bool = True) -> str | None:
    """Why a file that a list names cannot be one inside the folder of the list; None if it can.

    folders: whether it may be in a folder of the folder.
    """
    words = f"file name `{printable(name):.200}`"
    if not name.isprintable():
        return f"{words} has control characters"
    parts = name.split("/")
    outside = any(part in {"", ".", ".."} for part in parts)
    if outside or (not folders and ("/" in name or "\\" in name)):
        return f"{words} is not one inside the folder"
    if len(name.encode()) > MAX_PATH or any(len(part.encode()) > MAX_PART for part in parts):
        return f"file name `{name:.40}` is longer than a disk takes"
    return None
