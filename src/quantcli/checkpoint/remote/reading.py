"""Ranges of files that are elsewhere, with patience: what was cut off goes on where it stopped."""

from __future__ import annotations

from time import sleep

from quantcli.checkpoint.remote.origin import (
    LONGEST_WAIT,
    WAITS,
    Listing,
    Origin,
    PassingError,
    Version,
)
from quantcli.core.errors import MachineError
from quantcli.core.events import SILENT, Progress

_MOST_CUTS = 100  # of a range, and one more for each _CUT_BYTES of it
_CUT_BYTES = 2**16
_AGAIN = "check the network; then run the same command again"
_listeners: dict[Origin, Progress] = {}


def report_to(origin: Origin, progress: Progress) -> None:
    """Who hears of requests to an origin that are repeated, in this process."""
    _listeners[origin] = progress


def listed(origin: Origin, progress: Progress) -> Listing:
    """The files of an origin. MachineError if patience does not help."""
    waits = iter(WAITS)
    while True:
        try:
            return origin.list(progress)
        except PassingError as passing:
            _wait(origin.address, origin.address, passing, next(waits, None), progress)


def read_range(origin: Origin, name: str, version: Version, first: int, block: memoryview) -> None:
    """Fill `block` with the bytes of a file from `first` on.

    A body that is cut off goes on at the byte where it stopped. A request without an answer is repeated
    with longer and longer waits, and so is one that was cut very often. Raises MachineError if that
    does not help, and InputError.
    """
    progress = _listeners.get(origin, SILENT)
    waits = iter(WAITS)
    done, cuts_left = 0, _MOST_CUTS + len(block) // _CUT_BYTES
    while done < len(block):
        try:
            origin.ask(name, version, first + done, block[done:])
            break
        except PassingError as passing:
            done += passing.nbytes
            if passing.nbytes and cuts_left:
                cuts_left -= 1
                waits = iter(WAITS)
                progress.detail(f"`{name}`: {passing.reason}; going on at byte {first + done:,}")
            else:
                _wait(origin.where(name), f"`{name}`", passing, next(waits, None), progress)


def _wait(
    where: str, what: str, passing: PassingError, pause: float | None, progress: Progress
) -> None:
    if pause is None:
        raise MachineError(f"cannot be read: {passing.reason}", where=where, fix=_AGAIN)
    seconds = max(pause, min(passing.wait, LONGEST_WAIT))
    progress.say(f"{what}: {passing.reason}; trying again in {seconds:g} s")
    sleep(seconds)
