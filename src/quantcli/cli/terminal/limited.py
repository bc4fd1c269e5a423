"""A command under a limit of memory (`ulimit -v`, `ulimit -d`) runs in a child process.

Some libraries end the process if they get no memory, torch and OpenBLAS while they are imported among
them: they abort, or exit with a code of their own. The parent needs no memory, and says what happened.
"""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from quantcli.core.errors import Exit, MachineError
from quantcli.core.memory.limits import Limit, process_limits
from quantcli.core.text import size

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_OWN_WORK = 400 * 2**20  # bytes next to torch's libraries: Python, other libraries, a small conversion
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)

_ends: list[int] = []  # the pipe of this child to its parent


def run_limited() -> MachineError | None:
    """Go on in a child process if this one has a limit of memory; else do nothing.

    Returns in the child, and without a limit, None. The parent ends with the child's exit code. If the
    child has ended without `ends`, what its parent gets is the error.
    """
    limits = [*process_limits()]
    if not limits:
        return None
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _die_with_parent()
        _ends.append(writer)
        return None
    os.close(writer)
    status = _wait(child)
    code = os.waitstatus_to_exitcode(status)
    os.set_blocking(reader, False)  # a process that the child has left behind may have the other end
    try:
        has_ended = bool(os.read(reader, 1))
    except BlockingIOError:
        has_ended = False
    if has_ended or code in (Exit.INTERRUPTED, -signal.SIGKILL):
        _end_as(code)
    return _error(code, limits)


def is_child() -> bool:
    """Whether this process is such a child, whose parent reports an end without `ends`."""
    return bool(_ends)


def ends() -> None:
    """Tell the parent that this process ends of its own will, and has said why."""
    for writer in _ends:
        try:  # noqa: SIM105 - contextlib is an import
            os.write(writer, b"\0")
        except OSError:
            pass  # the parent is gone


def _wait(child: int) -> int:
    """The status of the child when it has ended. Signals to this process alone are handed on."""
    signals = [n for n in _FORWARDED if signal.getsignal(n) is not signal.SIG_IGN]
    waited = {signal.SIGCHLD, *signals}
    signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        found = signal.sigwaitinfo(waited)
        if (
            found.si_signo != signal.SIGCHLD and found.si_code <= 0
        ):  # else a terminal has sent it to both
            os.kill(child, found.si_signo)


def _end_as(code: int) -> NoReturn:
    if code < 0:  # a signal that none of us has caught
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _die_with_parent() -> None:
    import ctypes

    parent = os.getppid()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _error(code: int, limits: list[Limit]) -> MachineError:
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    limit = min(limits, key=lambda each: each.total)
    torch = _torch_nbytes()
    needed = f"; torch alone maps {size(torch)}" if torch else ""
    return MachineError(
        f"a library has ended the process ({name}), most likely for want of memory: "
        f"the {limit.name} is {size(limit.total)}{needed}",
        fix=f"{limit.fix}: {size(torch + _OWN_WORK)} is the least; or give fewer --workers",
    )


def _torch_nbytes() -> int:
    """Bytes of the libraries that come with torch: all of them are mapped when it is imported."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        return 0
    return sum(file.stat().st_size for file in Path(found.origin).parent.glob("lib/*.so*"))
