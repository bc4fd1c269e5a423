"""The process that runs functions for `bounded`: a copy of itself for each, within limits.

It is small and has one thread, so that it can be copied by fork, and a copy is there in milliseconds.
It imports what functions need before it is copied: that is code of packages, which no limit concerns.
What was not trusted is read by the copy alone, which ends when its parent, or whoever asks, does.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import pickle
import resource
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.core.errors import QuantError
from quantcli.core.untrusted.names import printable
from quantcli.core.untrusted.panics import is_panic

_IDLE = 60.0  # seconds without a request after which this process ends
_PR_SET_PDEATHSIG = 1
_PAGE = os.sysconf("SC_PAGE_SIZE")
_LENGTH = 8  # bytes in front of a message
_LAST_WORDS = 4000  # bytes of what a function printed that are kept
_PLACE = 2000  # bytes of the name of a place
_WORDS = 200  # characters of a message of Rust code
# what allocators of C++ and Rust print before they end the process
_NO_MEMORY = (b"memory allocation of", b"bad_alloc", b"Cannot allocate memory", b"out of memory")
Answer = tuple[dict[str, Any], bytes]  # a table that JSON can hold, and bytes

_place = -1  # in a copy of this process, the file that holds the place which is worked on


@dataclass(frozen=True)
class Limits:
    """What a function may use.

    seconds: of CPU time. wall: seconds until the answer is there. memory: bytes of address space on top
    of what the packages take. answer: bytes of what the function returns.
    """

    seconds: int
    wall: float
    memory: int
    answer: int


@dataclass(frozen=True)
class Request:
    """A function to run, by the name `module:function`, with its arguments. folder: the working one."""

    run: str
    arguments: tuple[Any, ...]
    limits: Limits
    folder: str


def at(place: str) -> None:
    """Note which file is worked on from here on, for the message if a limit is reached."""
    if _place >= 0:
        os.pwrite(_place, place.encode(errors="replace")[:_PLACE].ljust(_PLACE, b"\0"), 0)


def send(connection: socket.socket, message: bytes) -> None:
    """Send a message. OSError if nobody reads it."""
    connection.sendall(len(message).to_bytes(_LENGTH, "little") + message)


def receive(connection: socket.socket) -> bytes:
    """The next message. EOFError if none comes."""
    return _exactly(connection, int.from_bytes(_exactly(connection, _LENGTH), "little"))


def _exactly(connection: socket.socket, length: int) -> bytes:
    message = bytearray(length)
    view = memoryview(message)
    while view:
        if not (count := connection.recv_into(view)):
            raise EOFError
        view = view[count:]
    return bytes(message)


def serve(descriptor: int, warm: str) -> None:
    """Answer requests until nobody can send any, or none has come for a while.

    warm: a function without arguments, `module:function`, that imports what is needed.
    """
    fault = _fault(_named(warm))
    with socket.socket(fileno=descriptor) as connection:
        while select.select([connection], [], [], _IDLE)[0]:
            try:
                request: Request = pickle.loads(receive(connection))
            except (EOFError, OSError):
                return
            try:
                header, blob = (fault, b"") if fault else _answer(connection, request)
            except Exception:
                header, blob = {"outcome": "bug", "text": traceback.format_exc()}, b""
            send(connection, json.dumps(header).encode())
            send(connection, blob)


def _fault(warm: Callable[[], None]) -> dict[str, Any] | None:
    """Why packages cannot be imported."""
    try:
        warm()
    except MemoryError:
        return {"outcome": "machine memory"}
    except Exception:
        return {"outcome": "bug", "text": traceback.format_exc()}
    return None


def _answer(connection: socket.socket, request: Request) -> Answer:
    function = _named(request.run)
    memory, short = _memory(request.limits)
    printed, place = os.memfd_create("printed"), os.memfd_create("place")
    reader, writer = os.pipe()
    try:
        child = _fork()
        if child is None:
            os.close(writer)
            return {"outcome": "no process", "text": "there may be no more processes"}, b""
        if not child:
            connection.close()
            os.close(reader)
            try:
                _prepare(request, memory, printed, place)
                _write(writer, *_outcome(function, request.arguments))
            finally:
                os._exit(0)
        os.close(writer)
        header, blob = _watch(connection, child, (reader, printed, place), request.limits)
    finally:
        for descriptor in (reader, printed, place):
            os.close(descriptor)
    if short and header["outcome"] == "memory":
        return {"outcome": "machine memory"}, b""
    return header, blob


def _fork() -> int | None:
    try:
        return os.fork()
    except OSError:
        return None


def _named(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    named: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return named


def _memory(limits: Limits) -> tuple[int, bool]:
    """The limit of address space in bytes, and whether the machine sets it lower than `limits`."""
    pages = Path("/proc/self/statm").read_bytes().split()[0]
    limit = int(pages) * _PAGE + limits.memory
    ours = resource.getrlimit(resource.RLIMIT_AS)[0]
    return (ours, True) if ours != resource.RLIM_INFINITY and ours < limit else (limit, False)


def _watch(
    connection: socket.socket, child: int, files: tuple[int, int, int], limits: Limits
) -> Answer:
    """What a copy of this process answers, or why it does not."""
    reader, printed, place = files
    deadline = time.monotonic() + limits.wall
    answer, outcome = bytearray(), ""
    while not outcome:
        waited = max(0.0, deadline - time.monotonic())
        readable = select.select([reader, connection.fileno()], [], [], waited)[0]
        if connection.fileno() in readable:  # whoever asked has ended, or does not wait for the answer
            os.kill(child, signal.SIGKILL)
            os._exit(0)
        if not readable:
            outcome = "wall"
        elif piece := os.read(reader, 2**16):
            answer += piece
            outcome = "large" if len(answer) > limits.answer + _LAST_WORDS else ""
        else:
            break
    if outcome:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    where = {"place": os.pread(place, _PLACE, 0).rstrip(b"\0").decode(errors="replace")}
    if not outcome and len(answer) >= _LENGTH:
        end = _LENGTH + int.from_bytes(answer[:_LENGTH], "little")
        return json.loads(answer[_LENGTH:end]) | where, bytes(answer[end:])
    if not outcome:
        size = os.fstat(printed).st_size
        words = os.pread(printed, _LAST_WORDS, max(0, size - _LAST_WORDS))
        outcome = _death(os.WTERMSIG(status), words)
    return {"outcome": outcome, **where}, b""


def _death(number: int, words: bytes) -> str:
    """Why a copy of this process ended by a signal, and what it had printed."""
    if number == signal.SIGXCPU:
        return "time"
    if any(sign in words for sign in _NO_MEMORY):
        return "memory"
    # no limit of ours sends this: the kernel does if the machine, or a container, has no memory
    return "machine memory" if number == signal.SIGKILL else "crash"


def _prepare(request: Request, memory: int, printed: int, place: int) -> None:
    """In a copy of this process: the limits, and files in place of the streams."""
    global _place
    _place = place
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for stream in (1, 2):
        os.dup2(printed, stream)
    with suppress(OSError):  # the folder is gone: no relative path leads anywhere
        os.chdir(request.folder)
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + request.limits.seconds
    for kind, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
    ):
        most = resource.getrlimit(kind)[1]
        within = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(kind, (within, most))


def _outcome(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Answer:
    try:
        value, blob = function(*arguments)
        return {"outcome": "done", "value": value}, blob
    except MemoryError:
        return {"outcome": "memory"}, b""
    except QuantError as error:
        problem = {"what": error.what, "where": error.where, "fix": error.fix}
        return {"outcome": "error", "kind": type(error).__name__, "problem": problem}, b""
    except BaseException as error:
        if is_panic(error):
            return {"outcome": "crash", "text": printable(str(error))[:_WORDS]}, b""
        return {"outcome": "bug", "text": traceback.format_exc()}, b""


def _write(writer: int, header: dict[str, Any], blob: bytes) -> None:
    text = json.dumps(header).encode()
    with open(writer, "wb") as file:
        file.write(len(text).to_bytes(_LENGTH, "little") + text + blob)
