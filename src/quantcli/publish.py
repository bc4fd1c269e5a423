"""Where the output goes: what must hold before the first byte, and the one rename at the end."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantcli.checkpoint import read_json_file
from quantcli.errors import InputError, MachineError, QuantError
from quantcli.folder import PART
from quantcli.journal import MANIFEST, discard
from quantcli.writer import disk_errors, machine_error, sync_folder

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_OTHER = "choose another --out"
_ANOTHER = "choose another folder: --out of `calibrate`, --calibration of `quantize`"


def partial_folder(out: Path) -> Path:
    """Where a run writes before it is complete."""
    return out.with_name(out.name + ".partial")


def replaced_folder(out: Path) -> Path:
    """Where `--force` moves a directory that holds more than a checkpoint of ours."""
    return out.with_name(out.name + ".replaced")


def only_ours(folder: Path) -> bool:
    """Whether a directory holds nothing but what its manifest lists, so that it may be deleted."""
    listing = folder / (PART if (folder / PART).is_file() else MANIFEST)
    try:
        table = read_json_file(listing)
        files = {folder / name for name in table["files"]} | {listing}
    except (QuantError, KeyError, TypeError):
        return not any(folder.iterdir())
    return all(path in files or path.is_dir() for path in folder.rglob("*"))


def check_destination(out: Path, model: Path, *, force: bool, what: str = "the model") -> None:
    """InputError or MachineError for an `out` that the run could not or must not write.

    model: the directory that is read; `what` it is, in words.
    """
    with _in_words(out, _OTHER):
        _check(out, model, force, what)


def check_calibration(folder: Path, model: Path, out: Path | None) -> None:
    """InputError where a calibration in `folder` would be in the way of the model, or of `out`."""
    with _in_words(folder, _ANOTHER):
        real = folder.resolve()
        taken = {model: "the model directory"}
        if out is not None:
            taken[out.resolve()] = "the output directory"
            taken[partial_folder(out).resolve()] = "what a run leaves until it is done"
        for path, what in taken.items():
            if real.is_relative_to(path) or path.is_relative_to(real):
                what = f"calibration folder and {what} would be one in the other"
                raise InputError(what, where=str(folder), fix=_ANOTHER)


def check_writable(folder: Path) -> None:
    """InputError or MachineError where nothing can be written to `folder`, which need not exist."""
    with _in_words(folder, _ANOTHER):
        _check_writable(folder if folder.is_dir() else folder.parent, _ANOTHER)
        check_space(folder, 0)


@contextmanager
def _in_words(path: Path, fix: str) -> Iterator[None]:
    """What the system says of a path, as one of our errors."""
    try:
        yield
    except RuntimeError:  # how pathlib reports a loop
        raise InputError("symbolic links run in a circle", where=str(path), fix=fix) from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError("file name is too long", where=str(path), fix=fix) from None
        raise machine_error(error, path) from None


def _check(out: Path, model: Path, force: bool, what: str) -> None:
    real = out.resolve()
    if real == model:
        raise InputError(f"output directory is {what} directory", where=str(out), fix=_OTHER)
    if real.is_relative_to(model):
        raise InputError(f"output directory is inside {what} directory", where=str(out), fix=_OTHER)
    home = Path(os.path.expanduser("~")).resolve()  # noqa: PTH111 - Path's raises without a home
    protected = {model: what, Path.cwd(): "the current directory", home: "your home"}
    for path, word in protected.items():
        if path.is_relative_to(real):
            raise InputError(f"output directory contains {word}", where=str(out), fix=_OTHER)
    if out.name == "..":
        raise InputError("output directory needs a name of its own", where=str(out), fix=_OTHER)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError("output exists and is not a directory", where=str(out), fix="remove it")
    if out.exists() and not force:
        raise InputError(
            "output directory exists", where=str(out), fix="choose another --out, or use --force"
        )
    if out.exists() and not only_ours(out) and os.path.lexists(replaced_folder(out)):
        raise InputError(
            "what --force would replace cannot be kept: its new name is taken",
            where=str(replaced_folder(out)),
            fix="move it away",
        )
    partial_folder(out).exists()  # its name may be too long
    _check_writable(out.parent, _OTHER)


def _check_writable(folder: Path, fix: str) -> None:
    ancestor = _existing_ancestor(folder)
    if not ancestor.is_dir():
        raise InputError("not a directory", where=str(ancestor), fix=fix)
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise MachineError("no permission to write here", where=str(ancestor), fix=fix)


def check_space(out: Path, nbytes: int) -> int:
    """Free bytes where `out` goes. MachineError where less than `nbytes` are."""
    partial = partial_folder(out)
    ancestor = _existing_ancestor(partial)
    with disk_errors(ancestor):
        total, _, free = shutil.disk_usage(ancestor)
        reusable = sum(f.lstat().st_size for f in partial.glob("*")) if partial.is_dir() else 0
    if total == 0:  # /proc, /sys
        raise MachineError("this file system stores no files", where=str(ancestor), fix=_OTHER)
    if free + reusable < nbytes:
        raise MachineError(
            f"disk is too full: needs {nbytes:,} bytes, {free:,} are free",
            where=str(ancestor),
            fix="free some space, or choose another --out",
        )
    return free


def _existing_ancestor(path: Path) -> Path:
    path = path.absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path


def publish(partial: Path, out: Path, *, force: bool) -> None:
    """Give the finished directory its name by one rename; an old `out` is exchanged, then deleted."""
    with disk_errors(out):
        if force and out.exists():
            foreign = not only_ours(out)
            _exchange(partial, out)
            sync_folder(out.parent)
            if foreign:
                partial.rename(replaced_folder(out))
            else:
                discard(partial)
        elif out.exists():  # made by someone else while we worked
            raise InputError("output directory exists", where=str(out), fix="run again with --force")
        else:
            partial.rename(out)
        sync_folder(out.parent)


def _exchange(partial: Path, out: Path) -> None:
    """Swap two directories atomically (Linux renameat2); elsewhere by renames."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    arguments = (_AT_FDCWD, os.fsencode(partial), _AT_FDCWD, os.fsencode(out), _RENAME_EXCHANGE)
    if rename is not None and rename(*arguments) == 0:
        return
    aside = out.with_name(out.name + ".aside")
    out.rename(aside)
    try:
        partial.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    aside.rename(partial)
