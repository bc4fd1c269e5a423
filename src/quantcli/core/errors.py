"""Errors: what is wrong, where, and how to fix it.

    QuantError                 anything this tool refuses or cannot do
    |-- AnswerNo        1      the command ran, and the answer is no
    |-- InputError      2      the recipe, the model or the command line must change
    |-- MachineError    3      the machine must change: disk, permissions, memory, device
    `-- Interrupted   130      Ctrl-C, SIGTERM, SIGHUP or SIGXCPU

Any other exception that reaches the command line is a bug in this tool; the command exits with 70.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any

from quantcli.core.text import UPGRADE

SCHEMA_VERSION = 1  # of the documents that --json prints


class Exit(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    ANSWER_NO = 1
    FIX_INPUT = 2
    FIX_MACHINE = 3
    OUR_BUG = 70
    INTERRUPTED = 130


_NAMES: dict[str, str] = {}  # folders that the user does not know -> the names of what is in them


def name_folder(folder: str, name: str) -> None:
    """Have messages call a folder, and what is in it, by another name."""
    _NAMES[folder] = name


def forget_name(folder: str) -> None:
    """Call a folder by its own name again."""
    _NAMES.pop(folder, None)


def named(text: str) -> str:
    """A text with the names of folders that have one, see `name_folder`."""
    for folder, name in [*_NAMES.items()]:
        text = text.replace(folder, name)
    return text


class QuantError(Exception):
    """One problem as one message.

    what:  the problem; it names the thing that is wrong, in lower case, without a full stop.
    where: the place: `file:line`, a tensor with its index, a path.
    fix:   what the user can do.
    payload: data about it that programs read: JSON-able, by key.
    of_machine: whether another machine may not have the problem.
    """

    exit_code: Exit = Exit.FIX_INPUT
    of_machine = False

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        fix: str | None = None,
        payload: Mapping[str, Any] | None = None,
    ) -> None:
        self.what = named(what)
        super().__init__(self.what)
        self.where = where and named(where)
        self.fix = fix and named(fix)
        self.payload = payload or {}

    def __str__(self) -> str:
        text = self.what
        if self.where:
            text += f"\n  --> {self.where}"
        if self.fix:
            text += f"\n  fix: {self.fix}"
        return text


class AnswerNo(QuantError):
    """The command ran, and the answer is no (exit 1)."""

    exit_code = Exit.ANSWER_NO


class InputError(QuantError):
    """The user's input must change (exit 2)."""


class AccessError(InputError):
    """Credentials are missing, wrong or too old (exit 2)."""

    of_machine = True


class MachineError(QuantError):
    """The machine must change: disk, permissions, a missing package (exit 3)."""

    exit_code = Exit.FIX_MACHINE
    of_machine = True


class Interrupted(QuantError):
    """Ctrl-C, SIGTERM, SIGHUP or SIGXCPU (exit 130)."""

    exit_code = Exit.INTERRUPTED


def other_version(
    noun: str,
    version: Any,
    reads: int,
    where: str,
    fix: str = "make it again with this version of quantcli",
) -> InputError:
    """The error for a file of ours in a form that this version does not read.

    noun: what it is. reads: the version of the form that is read. fix: of one that is not newer.
    """
    newer = type(version) is int and version > reads
    what = f"the {noun} has version {version!r:.40}; this quantcli reads version {reads}"
    return InputError(what, where=where, fix=UPGRADE if newer else fix)


def closest(name: str, candidates: Iterable[str], limit: int = 3) -> str:
    """Up to `limit` candidates that look most like `name`, as "`a`, `b`"; empty if none does."""
    matches = difflib.get_close_matches(name, list(candidates), n=limit, cutoff=0.5)
    return ", ".join(f"`{match}`" for match in matches)


_MOST_CHOICES = 40  # to list in a hint


def one_of(name: str, choices: Iterable[str]) -> str:
    """A hint for a misspelt `name`: the closest choices; if none is close all, or the first of many."""
    names = sorted(choices)
    if near := closest(name, names):
        return f"did you mean {near}?"
    rest = f", and {len(names) - _MOST_CHOICES:,} more" if len(names) > _MOST_CHOICES else ""
    return "known: " + ", ".join(f"`{n}`" for n in names[:_MOST_CHOICES]) + rest
