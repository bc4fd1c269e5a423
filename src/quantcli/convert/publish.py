"""Where the output goes: what must hold before the first byte, and the one rename at the end."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from quantcli.checkpoint.files import JOURNAL, MANIFEST, PART
from quantcli.convert.journal import discard, only_ours
from quantcli.core.disk import disk_errors, sync_folder
from quantcli.core.errors import InputError
from quantcli.core.place import OTHER_OUT, as_our_errors, check_ancestor, expanded, partial_folder

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def replaced_folder(out: Path) -> Path:
    """Where `--force` moves a directory that holds more than a checkpoint of ours."""
    return out.with_name(out.name + ".replaced")


def check_destination(out: Path, model: Path, *, force: bool, what: str = "the model") -> None:
    """InputError or MachineError for an `out` that the run could not or must not write.

    model: the directory that is read; `what` names it in messages.
    """
    with as_our_errors(out, OTHER_OUT):
        _check(out, model, force, what)


def _check(out: Path, model: Path, force: bool, what: str) -> None:
    real = out.resolve()
    if real == model:
        raise InputError(f"output directory is {what} directory", where=str(out), fix=OTHER_OUT)
    if real.is_relative_to(model):
        raise InputError(f"output directory is inside {what} directory", where=str(out), fix=OTHER_OUT)
    home = expanded("~").resolve()
    protected = {model: what, Path.cwd(): "the current directory", home: "your home"}
    for path, word in protected.items():
        if path.is_relative_to(real):
            raise InputError(f"output directory contains {word}", where=str(out), fix=OTHER_OUT)
    if out.name == "..":
        raise InputError("output directory needs a name of its own", where=str(out), fix=OTHER_OUT)
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
    check_ancestor(out.parent, OTHER_OUT)


def publish(partial: Path, out: Path, *, force: bool) -> None:
    """Give the finished directory its name by one rename; an old `out` is exchanged, then deleted."""
    with disk_errors(out):
        if force and out.exists():
            foreign = not only_ours(out)
            _exchange(partial, out)
            if foreign:
                partial.rename(replaced_folder(out))
            sync_folder(out.parent)
            if not foreign:
                discard(partial)
        elif out.exists():  # made by someone else while we worked
            raise InputError("output directory exists", where=str(out), fix="run again with --force")
        else:
            partial.rename(out)
        sync_folder(out.parent)


def is_exchanged(partial: Path, out: Path) -> bool:
    """Whether `partial` is an old `out` that `publish` has exchanged but, interrupted, not renamed.

    It holds a listing of ours and files that are not ours.
    """
    with disk_errors(partial):
        listed = any((partial / name).is_file() for name in (MANIFEST, PART))
        left = listed and out.exists() and not (partial / JOURNAL).exists()
    return left and not only_ours(partial)


def keep_exchanged(partial: Path, out: Path) -> None:
    """Give an old `out` that was exchanged its new name. InputError if that is taken."""
    if not is_exchanged(partial, out):
        return
    with disk_errors(partial):
        kept = replaced_folder(out)
        if os.path.lexists(kept):
            what = "what --force has replaced cannot be kept: its new name is taken"
            raise InputError(what, where=str(kept), fix="move it away")
        partial.rename(kept)
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
