"""Places of output: folders that can be written and that do not overlap with other folders."""

from __future__ import annotations

import errno
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from quantcli.core.disk import disk_errors, machine_error
from quantcli.core.errors import InputError, MachineError

OTHER_OUT = "choose another --out"

_ANOTHER = "choose another folder: --out of `calibrate`, --calibration of `quantize` and `release`"


def expanded(path: str | Path) -> Path:
    """A path with `~` or `~user` replaced by that home folder; unchanged if there is none."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's raises RuntimeError without a home


def partial_folder(out: Path) -> Path:
    """Where a run writes before it is complete."""
    return out.with_name(out.name + ".partial")


def check_calibration(folder: Path, model: Path, out: Path | None) -> None:
    """InputError if a calibration in `folder` would overlap with the model or with `out`."""
    with as_our_errors(folder, _ANOTHER):
        real = folder.resolve()
        others = {model: "the model directory"}
        if out is not None:
            others[out.resolve()] = "the output directory"
            others[partial_folder(out).resolve()] = "the folder of an unfinished run"
        for path, name in others.items():
            if real.is_relative_to(path) or path.is_relative_to(real):
                what = f"the calibration folder and {name} must not contain each other"
                raise InputError(what, where=str(folder), fix=_ANOTHER)


def check_writable(folder: Path) -> None:
    """InputError or MachineError if `folder`, which need not exist, cannot be written."""
    with as_our_errors(folder, _ANOTHER):
        check_ancestor(folder if folder.is_dir() else folder.parent, _ANOTHER)
        check_space(folder, 0)


@contextmanager
def as_our_errors(path: Path, fix: str) -> Iterator[None]:
    """Raise a system error about a path in the block as an InputError or MachineError."""
    try:
        yield
    except RuntimeError:  # how pathlib reports a loop
        what = "symbolic links of the path form a circle"
        raise InputError(what, where=str(path), fix=fix) from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError("file name is too long", where=str(path), fix=fix) from None
        raise machine_error(error, path) from None


def check_ancestor(folder: Path, fix: str) -> None:
    """InputError or MachineError if `folder`, which need not exist, cannot be created or written to."""
    ancestor = existing_ancestor(folder)
    if not ancestor.is_dir():
        raise InputError(f"`{ancestor.name}` is not a directory", where=str(ancestor), fix=fix)
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise MachineError("no permission to write here", where=str(ancestor), fix=fix)


def check_space(out: Path, nbytes: int) -> int:
    """The free bytes of the file system of `out`. MachineError if they are fewer than `nbytes`."""
    return check_spaces([(out, nbytes)])


def check_spaces(needs: Sequence[tuple[Path, int]]) -> int:
    """The free bytes of the fullest file system that outputs go to; 0 without outputs.

    needs: outputs, and the bytes of each. MachineError if those on one file system need more than
    that has.
    """
    disks: dict[int, list[tuple[Path, int]]] = defaultdict(list)
    for out, nbytes in needs:
        ancestor = existing_ancestor(partial_folder(out))
        with disk_errors(ancestor):
            disks[ancestor.stat().st_dev].append((out, nbytes))
    return min((_check_disk(outs) for outs in disks.values()), default=0)


def _check_disk(needs: Sequence[tuple[Path, int]]) -> int:
    """The free bytes of the file system that all these outputs are on."""
    partials = [partial_folder(out) for out, _ in needs]
    ancestor = existing_ancestor(partials[0])
    with disk_errors(ancestor):
        total, _, free = shutil.disk_usage(ancestor)
        reusable = sum(f.lstat().st_size for p in partials if p.is_dir() for f in p.glob("*"))
    if total == 0:  # /proc, /sys
        raise MachineError("this file system stores no files", where=str(ancestor), fix=OTHER_OUT)
    nbytes = sum(nbytes for _, nbytes in needs)
    if free + reusable < nbytes:
        several = f" for {len(needs)} outputs" if len(needs) > 1 else ""
        raise MachineError(
            f"disk is too full: needs {nbytes:,} bytes{several}, {free:,} are free",
            where=str(ancestor),
            fix="free some space, or choose another --out",
        )
    return free


def existing_ancestor(path: Path) -> Path:
    """The path, or the folder above it that exists."""
    path = path.absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path
