"""Work for clusters in tests: Ray finds it by this module's name."""

import os
import signal
import time
from pathlib import Path

from quantcli.core.errors import InputError


def multiply(common, request, progress):
    progress.say(f"at {request}")
    progress.advance(10)
    return common * request, os.getpid()


def refuse(common, request, progress):
    """Numbers from 3 on are refused; the later ones at once."""
    if request >= 3:
        time.sleep(0.3 if request == 3 else 0)
        raise InputError(f"{request} is too large", where="here", fix="give less")
    return request


def divide(common, request, progress):
    return 1 / request


def die_once(common, request, progress):
    """The process that gets 2 first dies after it has counted bytes."""
    progress.advance(10)
    mark = Path(common)
    if request == 2 and not mark.exists():
        mark.touch()
        time.sleep(0.5)  # the bytes are on their way
        os.kill(os.getpid(), signal.SIGKILL)
    return request
