"""Calibration data as documents: a text file, JSON lines, or a data set of the Hub; 64 MiB at most."""

from __future__ import annotations

import codecs
import errno
import hashlib
import importlib
import importlib.util
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from quantcli.checkpoint.files import PICKLES
from quantcli.core.disk import ABSENT
from quantcli.core.environment import environment
from quantcli.core.errors import InputError, MachineError, QuantError
from quantcli.core.place import expanded
from quantcli.core.text import pip_install

HUB = "datasets:"
_BARS = "HF_DATASETS_DISABLE_PROGRESS_BARS"
MAX_BYTES = 2**26  # of text that is read; larger data is read in part, evenly
PIECE = 2**20  # bytes that are read at once if only a part is read
_GOLDEN = 11400714819323198485  # 2**64 in the golden section
_NAMES = "datasets:ID, datasets:ID:CONFIG or datasets:ID:CONFIG:SPLIT"
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_NO_TEXT = (*PICKLES, ".safetensors", ".gguf", ".parquet", ".arrow", ".npy", ".npz", ".gz", ".zip")
_KEYS = ("text", "inputs_pretokenized", "messages")  # the first that a record has counts
_GIVE_TEXT = "give plain UTF-8 text, or JSON lines (.jsonl) with `text` or `messages` in each"
_RECORD = 'each line is one record, such as {"text": "..."} or {"messages": [...]}'
_CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of a UTF-8 character after its first


@dataclass(frozen=True)
class Document:
    """One text or one chat, and its place."""

    content: str | list[dict[str, Any]]  # text, or messages with at least a `role`
    where: str  # file:line, file, or data set and row


def check_data(data: str, where: str) -> None:
    """Refuse data that cannot be read, as far as its beginning tells. `where` names it."""
    if not data.startswith(HUB):
        with _opened(data, where) as (file, path):
            _refuse_binary(file.read(PIECE), 0, str(path))
    elif not data.split(":")[1]:
        raise InputError(f"`{data}` names no data set", where=where, fix=f"write {_NAMES}")
    elif importlib.util.find_spec("datasets") is None:
        fix = pip_install("datasets")
        raise MachineError(f"`{data}` needs the package `datasets`", where=where, fix=fix)


def data_digest(data: str, where: str) -> str:
    """sha256 (hex) of a file's bytes and of how they are read, or of a data set's name."""
    if data.startswith(HUB):
        return hashlib.sha256(data.encode()).hexdigest()
    with _opened(data, where) as (file, path):
        digest = hashlib.file_digest(file, "sha256")
    digest.update(b"JSON lines" if _is_json_lines(path) else b"text")
    return digest.hexdigest()


def file_digest(data: str, where: str) -> str | None:
    """sha256 (hex) of a file's bytes, as `sha256sum` prints it; None for a data set."""
    if data.startswith(HUB):
        return None
    with _opened(data, where) as (file, _):
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_rows(documents: Iterable[Document]) -> str:
    """sha256 (hex) of the rows of a data set, as they were read."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document.content).encode() + b"\n")
    return digest.hexdigest()


def read_documents(data: str, where: str, say: Callable[[str], None]) -> list[Document]:
    """Everything in `data`, in its order; of what is over 64 MiB, an even choice.

    A text file is one document, or several chunks if it is read in part. `say` receives a note on
    that, and on data that may come over the network. Raises InputError with file:line or the byte.
    """
    if data.startswith(HUB):
        return _fetch(data, where, say)
    with _opened(data, where) as (file, path):
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            _say_partial(data, say)
        return list((_lines if _is_json_lines(path) else _texts)(file, size, path))


@contextmanager
def _opened(data: str, where: str) -> Iterator[tuple[BufferedReader, Path]]:
    """The data file, which is regular and not empty; errors of the system as one sentence."""
    named = f"text `{data[:200]}`"
    try:
        path, status = _stat(data)
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{named} is a directory", where=where, fix="name a file in it")
        if not stat.S_ISREG(status.st_mode) or path.suffix.lower() in _NO_TEXT:
            raise InputError(f"{named} is not a text file", where=where, fix=_GIVE_TEXT)
        if not status.st_size:
            raise InputError(f"{named} is empty", where=where, fix=_GIVE_TEXT)
        with path.open("rb") as file:
            yield file, path
    except OSError as error:
        if error.errno in ABSENT:
            fix = "check the path: one in a recipe starts where that is, one on the command line here"
            raise InputError(f"{named} does not exist", where=where, fix=fix) from None
        what, fix = f"cannot read {named}: {error.strerror}", "check the file and its permissions"
        raise MachineError(what, where=where, fix=fix) from None


def _stat(data: str) -> tuple[Path, os.stat_result]:
    try:
        path = expanded(data)
        return path, path.stat()
    except ValueError:  # a character that no name can have
        raise FileNotFoundError(errno.ENOENT, "no such file") from None


def _is_json_lines(path: Path) -> bool:
    return path.suffix.lower() in _JSON_LINES


def _refuse_binary(raw: bytes, begin: int, where: str) -> None:
    if (at := raw.find(b"\0")) >= 0:
        what = f"the text is binary, not text (NUL at byte {begin + at})"
        raise InputError(what, where=where, fix=_GIVE_TEXT)


def _texts(file: BufferedReader, size: int, path: Path) -> Iterator[Document]:
    """The file as one document, or evenly spaced chunks of it."""
    chunk, count = (size, 1) if size <= MAX_BYTES else (PIECE, MAX_BYTES // PIECE)
    for number in range(count):
        begin = number * (size - chunk) // max(1, count - 1)
        file.seek(begin)
        raw = file.read(chunk)
        _refuse_binary(raw, begin, str(path))
        if begin:  # which may be within a character, of at most three more bytes
            skip = len(raw[:3]) - len(raw[:3].lstrip(_CONTINUATION))
            begin, raw = begin + skip, raw[skip:]
        text = _decode(raw, begin, str(path), final=begin + len(raw) >= size)
        yield Document(text, str(path))


def _decode(raw: bytes, begin: int, where: str, *, final: bool = True) -> str:
    try:
        text, _ = codecs.utf_8_decode(raw, "strict", final)
    except UnicodeDecodeError as error:
        what = f"the text is not UTF-8 (byte {begin + error.start})"
        raise InputError(what, where=where, fix=_GIVE_TEXT) from None
    return text if begin else text.removeprefix("\ufeff")


def _lines(file: BufferedReader, size: int, path: Path) -> Iterator[Document]:
    """A record from each line that is not blank; of a larger file, from evenly spaced lines."""
    begin = end = kept = number = 0
    while line := file.readline(MAX_BYTES + 1):
        begin, end, number = end, end + len(line), number + 1
        where = f"{path}:{number}"
        _refuse_binary(line, begin, where)
        if len(line) > MAX_BYTES:
            raise InputError("line is over 64 MiB", where=where, fix=_RECORD)
        if line.isspace() or kept * size > begin * MAX_BYTES:
            continue
        kept += len(line)
        try:
            record = json.loads(_decode(line.rstrip(), begin, where))
        except (ValueError, RecursionError) as error:
            reason = sentence(error)
            if isinstance(error, json.JSONDecodeError):  # whose message counts lines from this one
                reason = f"{error.msg} (column {error.colno})"
            what = f"not valid JSON: {reason}"
            raise InputError(what, where=where, fix=_RECORD) from None
        yield _document(record, where)


def _document(record: Any, where: str) -> Document:
    if not isinstance(record, dict):
        raise InputError("record is not a JSON object", where=where, fix=_RECORD)
    key = next((key for key in _KEYS if record.get(key) is not None), None)
    if key is None:
        keys = ", ".join(f"`{key}`" for key in _KEYS)
        has = ", ".join(ascii(key)[:40] for key in list(record)[:5]) or "nothing"
        raise InputError(f"record has none of {keys}; it has {has}", where=where, fix=_RECORD)
    content = record[key]
    if key != "messages" and not isinstance(content, str):
        raise InputError(f"`{key}` is not text", where=where, fix=_RECORD)
    if key == "messages" and not (
        isinstance(content, list) and content and all(map(_content, content))
    ):
        fix = 'such as {"messages": [{"role": "user", "content": "..."}]}'
        raise InputError("`messages` is not a list of messages with a `role`", where=where, fix=fix)
    return Document(content, where)


def _content(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)


def _fetch(data: str, where: str, say: Callable[[str], None]) -> list[Document]:
    """Rows of datasets:ID[:CONFIG][:SPLIT]; a split may hold colons, such as train[:10%]."""
    _, name, config, split = (*data.split(":", 3), "", "")[:4]
    bars = os.environ.get(_BARS, "0" if os.isatty(2) else "1")
    say(f"fetching `{name}` through the datasets package")
    try:
        with environment({_BARS: bars}):
            datasets = importlib.import_module("datasets")
            table = datasets.load_dataset(name, config or None, split=split or "train")
            return _rows(table, data, say)
    except QuantError:
        raise
    except (ValueError, LookupError, FileNotFoundError) as error:
        what = f"`{data}` cannot be loaded: {sentence(error)}"
        raise InputError(what, where=where, fix=f"check the name: {_NAMES}") from None
    except Exception as error:  # the errors of the package and its HTTP client are not documented
        what = f"`{data}` cannot be fetched: {sentence(error)}"
        fix = "check the network and the disk, or give a file"
        raise MachineError(what, where=where, fix=fix) from None


def _rows(table: Any, data: str, say: Callable[[str], None]) -> list[Document]:
    count, size = len(table), 0
    documents: dict[int, Document] = {}
    visit = 0
    while len(documents) < count:
        if size > MAX_BYTES:
            _say_partial(data, say)
            break
        # Steps of a golden section are spread evenly wherever they end, and reach every row.
        row = (visit * _GOLDEN % 2**64) * count >> 64
        visit += 1
        if row not in documents:
            documents[row] = document = _document(table[row], f"{data}, row {row}")
            size += len(str(document.content))
    return [documents[row] for row in sorted(documents)]


def _say_partial(data: str, say: Callable[[str], None]) -> None:
    say(f"`{data}` is over {MAX_BYTES >> 20} MiB: reading evenly spaced parts of it")


def sentence(error: Exception) -> str:
    """The message of an error, on one line of at most 300 characters: whole sentences if possible."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, KeyError):  # which says no more than the key
        text = f"{type(error).__name__} {text}".strip()
    whole = text[:300].rpartition(". ")[0] if len(text) > 300 else text
    return whole or text[:300]
