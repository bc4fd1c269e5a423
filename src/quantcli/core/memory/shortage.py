"""Errors for want of memory: known by what libraries raise, and reported with what was needed."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path

from quantcli.core.disk import ABSENT, machine_error
from quantcli.core.errors import MachineError
from quantcli.core.memory.limits import Limit, hard_limits
from quantcli.core.text import size

# what torch, its devices, numpy, llvmlite and the loader of libraries say; torch_npu raises a plain
# RuntimeError: torch_npu at 9e73e708, csrc/core/npu/NPUCachingAllocator.cpp:1377,
# csrc/framework/utils/NpuUtils.cpp:252
_WORDS = re.compile(
    r"allocate memory|out of memory|bad_alloc|unable to allocate|can't start new thread"
    r"|failed to map segment|memory allocation|thread constructor failed",
    re.IGNORECASE,
)
_ASKED = re.compile(r"allocate (?:about )?([\d.,]+ ?(?:bytes|[KMGTPE]i?B))", re.IGNORECASE)
FEWER = "give fewer --workers, or less --max-memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that led to it, is one of memory, of this machine or of a device."""
    return any(_is_shortage(each) for each in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        yield following
        seen.add(id(following))
        following = following.__cause__ or following.__context__


def _is_shortage(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # of torch
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError | ImportError | OSError | SystemError) and bool(
        _WORDS.search(str(error))
    )


def shortage(error: BaseException, what: str, where: str | None = None) -> MachineError:
    """The error of `what`, such as "the row block of a tensor", for which memory does not suffice.

    error: what a library raised. where: the tensor or the layer.
    """
    cause = next(each for each in _chain(error) if _is_shortage(each))
    details = [
        _asked(cause),
        *(f"{size(limit.left)} are left of the {_named(limit)}" for limit in _tight()),
    ]
    text = "; ".join(filter(None, details))
    fixes = [limit.fix for limit in _tight()] or ["free some memory"]
    return MachineError(
        f"memory does not suffice for {what}" + (f": {text}" if text else ""),
        where=where,
        fix=f"{fixes[0]}, or {FEWER}",
    )


def machine_fault(error: BaseException, what: str, path: Path) -> MachineError | None:
    """The error of the machine that made `what` fail within a library; None if it is another one.

    path: what the library reads, for an error of the system that does not say it.
    """
    if is_out_of_memory(error):
        return shortage(error, what)
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno is not None and each.errno not in ABSENT:
            named = each.filename if isinstance(each.filename, str) else None
            return machine_error(each, Path(named) if named else path)
    return None


def _asked(error: BaseException) -> str:
    """What was asked for, in the words of the library."""
    if found := _ASKED.search(str(error)):
        return f"{found[1]} were asked for"
    first = next(iter(str(error).splitlines()), "")
    return first[:200] if first and not isinstance(error, OSError) else ""


def _tight() -> list[Limit]:
    """The limit of which the least is left, if there are limits."""
    return sorted(hard_limits(), key=lambda limit: limit.left)[:1]


def _named(limit: Limit) -> str:
    return f"{limit.name}, {size(limit.total)}"


def check_memory(nbytes: int, what: str) -> None:
    """MachineError if a limit leaves fewer than `nbytes` bytes for `what`.

    A container that takes more than its limit is killed without a word. What is free on the machine is
    not checked: it changes while a command runs.
    """
    for limit in _tight():
        if nbytes > limit.left:
            raise MachineError(
                f"{what} takes about {size(nbytes)} of memory; "
                f"{size(limit.left)} are left of the {_named(limit)}",
                fix=f"{limit.fix}, or {FEWER}",
            )
