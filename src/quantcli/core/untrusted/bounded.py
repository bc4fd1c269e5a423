"""Runs a function on what was not trusted in another process, which has limits on time and memory.

Tokenizers, templates and configurations that came with a model are read by large libraries. Some
content keeps them busy for ever, takes all memory, or ends the process. So they run in a process of
their own (`server`), and whatever happens there is an error with a message here.

That process is started when it is first needed, by the interpreter of this one. It does not run the
program's main module, it ends with this process, and by itself if it has nothing to do.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.core.errors import AccessError, InputError, MachineError, QuantError
from quantcli.core.text import size
from quantcli.core.untrusted.server import Answer, Limits, Request, receive, send

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from quantcli.core.untrusted.server import serve; serve(int(sys.argv[1]), sys.argv[3])"
)
# One thread, so that copies of the process are safe; and one line for what Rust code has to say.
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RUST_BACKTRACE": "0",
}
_KINDS: tuple[type[QuantError], ...] = (InputError, AccessError, MachineError)


@dataclass(frozen=True)
class Subject:
    """What a function reads, for messages.

    name: such as "the model's tokenizer". where: its path; the function may name a file by `server.at`.
    work: what takes time, such as "reading this text with the model's tokenizer".
    """

    name: str
    work: str
    where: str


def run_bounded(
    function: Callable[..., Answer],
    arguments: tuple[Any, ...],
    warm: Callable[[], None],
    limits: Limits,
    subject: Subject,
) -> Answer:
    """What `function(*arguments)` returns in another process: a table for JSON, and bytes.

    function and warm are found by their names in their modules; arguments are pickled. warm imports the
    packages that the function needs, outside of the limits. Raises the function's QuantErrors,
    InputError if a limit is reached or the library crashes, and MachineError if the machine is short of
    memory or processes.
    """
    try:
        folder = str(Path.cwd())
    except OSError:  # it is gone
        folder = "/"
    request = Request(_name(function), arguments, limits, folder)
    header, blob = _server(warm).ask(pickle.dumps(request))
    if header["outcome"] == "done":
        return header["value"], blob
    raise _error(header, limits, subject)


def start(warm: Callable[[], None]) -> None:
    """Start the process that functions with this `warm` run in, before it is needed."""
    _server(warm).start()


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{function.__qualname__}"


class _Server:
    """The other process. It answers one request at a time."""

    def __init__(self, warm: str) -> None:
        self._warm = warm
        self._lock = threading.Lock()
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    def start(self) -> None:
        """Start the process, if it does not run."""
        with self._lock:
            self._connection()

    def ask(self, request: bytes) -> Answer:
        """The answer to a request, of a new process if the other one has nothing to do and ends."""
        with self._lock:
            for last in (False, True):
                try:
                    connection = self._connection()
                    send(connection, request)
                    header = json.loads(receive(connection))
                    return header, receive(connection)
                except (EOFError, ConnectionError):
                    if (code := self.end(patience=1.0)) or last:
                        break
                except BaseException:  # an interrupt: nobody waits for the answer
                    self.end()
                    raise
        return {"outcome": "ended", "text": f"it ended with {code}"}, b""

    def end(self, patience: float = 0.0) -> int:
        """The exit code of the process, which is killed if it does not end in so many seconds."""
        if self._running is None:
            return 0
        (process, connection), self._running = self._running, None
        connection.close()
        try:
            return process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _connection(self) -> socket.socket:
        if self._running is None:
            ours, others = socket.socketpair()
            path = json.dumps([str(Path(entry).absolute()) for entry in sys.path])
            start = [sys.executable, "-I", "-c", _START, str(others.fileno()), path, self._warm]
            with others:
                process = subprocess.Popen(
                    start,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[others.fileno()],
                    env=os.environ | _ENVIRONMENT,
                    start_new_session=True,  # Ctrl-C reaches this process alone
                )
            self._running = process, ours
        return self._running[1]


_servers: dict[str, _Server] = {}


def _server(warm: Callable[[], None]) -> _Server:
    name = _name(warm)
    return _servers.setdefault(name, _Server(name))


def end_all() -> None:
    """End the processes. The next request starts a new one."""
    for server in _servers.values():
        server.end()


atexit.register(end_all)
os.register_at_fork(after_in_child=_servers.clear)  # a copy of this process starts its own


def _error(header: dict[str, Any], limits: Limits, subject: Subject) -> Exception:
    """The error of an outcome other than an answer."""
    outcome, where = header["outcome"], header.get("place") or subject.where
    if outcome == "error":
        kind = next(kind for kind in _KINDS if kind.__name__ == header["kind"])
        return kind(**header["problem"])
    if outcome == "bug":
        return RuntimeError(header["text"])
    fix = f"fetch {subject.name} again from its author; if that does not help, do not use it"
    if outcome in {"time", "wall"}:
        spent = f"{limits.seconds} s of CPU time" if outcome == "time" else f"{limits.wall:.0f} s"
        what = f"{subject.work} takes more than {spent}, far more than its size explains"
        return InputError(what, where=where, fix=fix)
    if outcome == "memory":
        what = (
            f"{subject.work} takes more than {size(limits.memory)} of memory, far more than its size "
        )
        return InputError(what + "explains", where=where, fix=fix)
    if outcome == "large":
        what = f"{subject.work} gives more than {size(limits.answer)}, far more than its size explains"
        return InputError(what, where=where, fix=fix)
    if outcome == "crash":
        words = f": {header['text']}" if header.get("text") else ""
        what = f"{subject.work} crashes the library that does it{words}"
        return InputError(what, where=where, fix=fix)
    if outcome == "machine memory":
        what = f"memory ran out: {subject.work} may take up to {size(limits.memory)}"
        fix = "end what else uses memory, or raise the limit (ulimit -v, or that of the container)"
        return MachineError(what, where=where, fix=fix)
    what = f"the process for {subject.work} cannot run: {header['text']}"
    fix = "raise the limit of processes (ulimit -u) or free memory, and run the same command again"
    return MachineError(what, where=where, fix=fix)
