"""Functions that tests run in another process within limits: what content that was not trusted does."""

import os
import signal
import time
from pathlib import Path

from quantcli.core.errors import AccessError
from quantcli.core.untrusted.server import at


def warm():
    """Nothing is imported."""


def double(numbers, blob):
    return {"doubled": [2 * number for number in numbers], "folder": str(Path.cwd())}, blob * 2


def refuse():
    raise AccessError("no", where="here", fix="ask")


def fail():
    raise KeyError("a bug of ours")


def spin(place):
    at(place)
    while True:
        pass


def sleep():
    time.sleep(1000)


def take(nbytes):
    return {"length": len(bytearray(nbytes))}, b""


def tell(nbytes):
    return {}, bytes(nbytes)


def end_by(number):
    os.kill(os.getpid(), number)


def say_memory_and_abort():
    os.write(2, b"memory allocation of 3000000000 bytes failed\n")
    os.abort()


def panic():
    raise type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})("over\x1b[2J")


def interrupt(pid):
    os.kill(pid, signal.SIGUSR1)
    time.sleep(1000)


def write_and_sleep(path):
    Path(path).write_text(f"{os.getpid()} {os.getppid()}\n")
    time.sleep(1000)
