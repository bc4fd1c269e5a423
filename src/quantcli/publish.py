"""Where the output goes: what must hold before the first byte, and the one rename at the end."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

from quantcli.errors import InputError, MachineError
from quantcli.writer import disk_errors, sync_folder

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def partial_folder(out: Path) -> Path:
    """Where a run writes before it is complete."""
    return out.with_name(out.name + ".partial")


def check_destination(out: Path, model: Path, *, force: bool) -> None:
    """InputError or MachineError for an `out` that the run could not or must not write."""
    real = out.resolve()
    if real == model or real.is_relative_to(model):
        raise InputError(
            "output directory is inside the model directory", where=str(out), fix="choose another --out"
        )
    protected = {model: "the model", Path.cwd(): "the current directory", Path.home(): "your home"}
    for path, what in protected.items():
        if path.is_relative_to(real):
            raise InputError(
                f"output directory contains {what}", where=str(out), fix="choose another --out"
            )
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError("output exists and is not a directory", where=str(out), fix="remove it")
    if out.exists() and not force:
        raise InputError(
            "output directory exists", where=str(out), fix="choose another --out, or use --force"
        )
    ancestor = _existing_ancestor(out)
    if not ancestor.is_dir():
        raise InputError("not a directory", where=str(ancestor), fix="choose another --out")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise MachineError(
            "no permission to write here", where=str(ancestor), fix="choose another --out"
        )


def check_space(out: Path, nbytes: int) -> int:
    """Free bytes where `out` goes. MachineError where less than `nbytes` are."""
    ancestor = _existing_ancestor(partial_folder(out))
    with disk_errors(ancestor):
        free = shutil.disk_usage(ancestor).free
    partial = partial_folder(out)
    reusable = sum(f.stat().st_size for f in partial.glob("*")) if partial.is_dir() else 0
    if free + reusable < nbytes:
        raise MachineError(
            f"disk is too full: needs {nbytes} bytes, {free} are free",
            where=str(ancestor),
            fix="free some space, or choose another --out",
        )
    return free


def _existing_ancestor(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def publish(partial: Path, out: Path, *, force: bool) -> None:
    """Give the finished directory its name by one rename; an old `out` is exchanged, then deleted."""
    with disk_errors(out):
        if force and out.exists():
            _exchange(partial, out)
            shutil.rmtree(partial)
        elif out.exists():  # made by someone else while we worked
            raise InputError(
                "output directory exists", where=str(out), fix="run again with --force"
            )
        else:
            partial.rename(out)
        sync_folder(out.parent)


def _exchange(partial: Path, out: Path) -> None:
    """Swap two directories atomically (Linux renameat2); elsewhere by two renames."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    arguments = (_AT_FDCWD, os.fsencode(partial), _AT_FDCWD, os.fsencode(out), _RENAME_EXCHANGE)
    if rename is not None and rename(*arguments) == 0:
        return
    aside = out.with_name(out.name + ".replaced")
    out.rename(aside)
    partial.rename(out)
    aside.rename(partial)
