"""Text for people."""

from __future__ import annotations

from collections.abc import Sized

_REPOSITORY = "git+https://github.com/quantcli/quantcli"
UPGRADE = f"pip install --upgrade 'quantcli @ {_REPOSITORY}'"
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def count(things: int | Sized, noun: str) -> str:
    """A number with its noun: `1 shard`, `2 shards`."""
    number = things if isinstance(things, int) else len(things)
    return f"{number} {noun}" + ("" if number == 1 else "s")


def pip_install(extra: str) -> str:
    """The command that adds the packages of an extra."""
    return f"pip install 'quantcli[{extra}] @ {_REPOSITORY}'"


def size(nbytes: float) -> str:
    """Bytes: `5.0 GB`."""
    return " ".join(_in_unit(nbytes, _unit(nbytes)))


def of_bytes(done: float, total: float) -> str:
    """Bytes of a total, in its unit: `1.2 of 35.0 GB`."""
    number, unit = _in_unit(total, power := _unit(total))
    return f"{_in_unit(done, power)[0]} of {number} {unit}"


def _unit(nbytes: float) -> int:
    power = 0
    while nbytes >= 1000 and power < len(_UNITS) - 1:
        nbytes, power = nbytes / 1000, power + 1
    return power


def _in_unit(nbytes: float, power: int) -> tuple[str, str]:
    return f"{nbytes / 1000**power:.{min(power, 1)}f}", _UNITS[power]


def short_number(number: float) -> str:
    """A number in three digits or so: `870`, `1.2k`, `35k`, `1.2M`."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            scaled = number / factor
            return f"{scaled:.{1 if scaled < 10 else 0}f}{letter}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds as `0:42`, or `1:05:42` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
