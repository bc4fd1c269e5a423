"""The one way to match names with a regular expression that a person or a file gives.

Engines match with Python's `re`, which may take years for one name, and cannot be stopped. So an
expression means what it means to `re`, and `re` matches it as long as it can try only so many ways.
Other expressions, and long names, go to the package `regex`, which has a time limit. If both would
read a text differently, `regex` gets another spelling of it. One difference is left: to `regex`, `\\w`
takes accents that are characters of their own, and `\\s` does not take U+001C to U+001F.

A limit of time never changes a result: it is an error. Globs need none, since a star in them is
never tried again.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property, lru_cache
from typing import Any

from quantcli.core.errors import InputError
from quantcli.core.untrusted.names import printable

SECONDS = 0.5  # of `regex` for one name; for all names, beyond what matching takes anyway
_USUAL = 50e-6  # seconds for one name
_LONGEST = 4000  # characters of an expression
_MOST = 2**17  # characters of all expressions of a list
_MOST_WAYS = 2_000_000  # to match one name, for `re`: 10 ms
_LONGEST_NAME = 4096  # characters of a name that `re` may match at all
_DEEPEST = 50  # groups within each other
_MOST_REPEATED = 10_000  # characters of an expression whose counted repetitions are written out

_COSTLY = "is too costly to match names with"
_AS_IN_PYTHON = "write it as for Python's `re`; a glob, such as *_proj, has no `re:`"
SIMPLER = "repeat no group in which something repeats or is a choice; or write a glob, such as *_proj"

_TOKEN = re.compile(
    r"(?P<escape>\\(?:N\{[^}]*\}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-9]{1,3}|.))"
    r"|(?P<set>\[\^?\]?(?:[^\]\\]|\\.)*\])"
    r"|(?P<open>\((?:\?(?:P<[^>]*>|P=[^)]*|<?[=!]|[>:#]|\([^)]*\)|[a-zA-Z-]+:?))?)"
    r"|(?P<close>\))"
    r"|(?P<bar>\|)"
    r"|(?P<repeat>(?:[*+?]|\{(?!\})(?P<least>[0-9]*)(?P<comma>,?)(?P<most>[0-9]*)\})[?+]?)"
    r"|(?P<one>.)",
    re.DOTALL,
)
_IN_SET = re.compile(r"(\\.)|\[", re.DOTALL)
# `re` takes milliseconds to read a range up to one of these characters, and a list may have thousands
_WIDE_RANGE = re.compile(r"-(?:[^\x00-\xff]|\\[uUN])")


class Budget:
    """What all expressions of one list or file may cost together."""

    def __init__(self) -> None:
        self.clock: Callable[[], float] = time.perf_counter
        self._seconds = SECONDS
        self._characters = _MOST

    def takes(self, expression: str) -> bool:
        """Whether there is room for one expression more."""
        self._characters -= len(expression)
        return self._characters >= 0

    def charge(self, seconds: float) -> bool:
        """Take the time of one match that was slower than usual. Whether some is left."""
        self._seconds -= seconds
        if self._seconds > 0:
            return True
        if self.clock is time.thread_time:
            return False
        # perhaps other processes had the CPU: from here on this thread's own time counts
        self.clock, self._seconds = time.thread_time, SECONDS
        return True


class _Refused(Exception):
    """An expression that is not taken: the reason as text, and what to do."""

    def __init__(self, reason: str, fix: str = SIMPLER) -> None:
        super().__init__(reason)
        self.fix = fix


class Expression:
    """A regular expression as `re` reads it, matched with a limit of time.

    text: the expression. where: its place. pattern: how its author wrote it, if not as `text`. budget:
    that of its list; its own if None. Raises InputError for a text that is not an expression, and for
    one that takes too much to compile.
    """

    def __init__(
        self, text: str, where: str | None = None, *, pattern: str = "", budget: Budget | None = None
    ) -> None:
        self.text, self._where, self._pattern = text, where, printable(pattern or text)
        self._budget = budget or Budget()
        try:
            if len(text) > _LONGEST or not self._budget.takes(text):
                raise _Refused("is too long to match names with")
            self._reading = _Tokens(text).reading()
            self._quick = _compiled(re, text)
        except _Refused as reason:
            raise self._refused(reason) from None
        self._needed = self._reading.needed
        self._short = self._reading.longest_name(anywhere=False)

    @cached_property
    def _limited(self) -> Any:
        """The expression of `regex`, whose import takes longer than most commands need."""
        import regex

        try:
            return _compiled(regex, self._reading.for_regex)
        except _Refused as reason:
            raise self._refused(reason) from None

    @property
    def groups(self) -> int:
        """The number of its capture groups."""
        return int(self._quick.groups)

    def match(self, name: str) -> Any:
        """The match at the begin of a name; None if there is none. InputError if it takes too long."""
        return self._found(name, "match", self._short)

    def fullmatch(self, name: str) -> Any:
        """The match of a whole name; otherwise as `match`."""
        return self._found(name, "fullmatch", self._short)

    def search(self, name: str) -> Any:
        """The first match anywhere in a name; otherwise as `match`."""
        return self._found(name, "search", self._reading.longest_name(anywhere=True))

    def _found(self, name: str, how: str, short: int) -> Any:
        for part in self._needed:
            if part not in name:
                return None
        clock = self._budget.clock
        began = clock()
        if len(name) <= short:
            found = getattr(self._quick, how)(name)
        else:
            try:
                found = getattr(self._limited, how)(name, timeout=SECONDS)
            except (TimeoutError, MemoryError):
                raise self._too_slow(name) from None
        excess = clock() - began - _USUAL
        if excess > 0 and not self._budget.charge(excess):
            raise self._too_slow(name)
        return found

    def _refused(self, reason: _Refused) -> InputError:
        return InputError(f"`{self._pattern:.200}` {reason}", where=self._where, fix=reason.fix)

    def _too_slow(self, name: str) -> InputError:
        what = f"`{self._pattern:.200}` takes too long to match `{printable(name):.200}`"
        return InputError(what, where=self._where, fix=SIMPLER)


def globs(patterns: Iterable[str], where: str | None = None) -> re.Pattern[str]:
    """One expression, for whole names that match any of some globs. It has no groups.

    where: their place. InputError for a glob of more characters than any name needs.
    """
    given = [*patterns]
    for pattern in given:
        if len(pattern) > _LONGEST:
            what = f"`{printable(pattern):.80}...` is too long to match names with"
            raise InputError(what, where=where, fix="write a shorter glob, such as *_proj")
    return re.compile("|".join(f"(?:{translate(pattern)})" for pattern in given))


@lru_cache(4096)
def _glob(pattern: str) -> re.Pattern[str]:
    return globs([pattern])


def glob_matches(pattern: str, name: str) -> bool:
    """Whether a glob matches a whole name. InputError as `globs`."""
    return _glob(pattern).fullmatch(name) is not None


def own(expression: str) -> re.Pattern[str]:
    """An expression of this program or of a library, names in it escaped: it needs no limit."""
    return re.compile(expression)


def _compiled(engine: Any, text: str) -> Any:
    """An expression of `re` or `regex`. _Refused for a text that is none, or only with a warning."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # re only warns of a set that looks like a mistake
            return engine.compile(text)
    except (engine.error, OverflowError, Warning) as error:
        raise _Refused(f"is not a regular expression: {error}", _AS_IN_PYTHON) from None
    except (RecursionError, MemoryError):
        raise _Refused(_COSTLY) from None


@dataclass(frozen=True)
class _Reading:
    """What the tokens of an expression tell.

    for_regex: the same in the spelling of `regex`. needed: parts of every name that it matches.
    wide: its repetitions of one character. ways: to match, without those; None if a group is repeated,
    so that there may be any number.
    """

    for_regex: str
    needed: tuple[str, ...]
    wide: int
    ways: int | None

    def longest_name(self, *, anywhere: bool) -> int:
        """Characters of the longest name that `re` may match; -1 if there is none. anywhere: whether
        the match may begin anywhere in it."""
        if self.ways is None:
            return -1
        powers = self.wide + anywhere
        most = _MOST_WAYS * math.factorial(min(powers, 20)) / self.ways  # length ** powers
        if not powers:
            return _LONGEST_NAME if most >= 1 else -1
        return int(min(most ** (1 / powers), _LONGEST_NAME))


class _Tokens:
    """Reads an expression; the text need not be one. _Refused for what takes too much to compile."""

    def __init__(self, text: str) -> None:
        self._spelled: list[str] = []
        self._parts = [""]  # text that each match has
        self._certain = True  # whether it is
        self._sizes = [0]  # characters of each open group, with counted repetitions written out
        self._branches = [1]  # of each open group
        self._last, self._last_is_group = 0, False  # size of what a repetition would be of
        self._wide, self._ways, self._simple = 0, 1, True
        if _WIDE_RANGE.search(text):
            raise _Refused("has a range of characters beyond U+00FF")
        for token in _TOKEN.finditer(text):
            self._take(token)
            if self._sizes[-1] > _MOST_REPEATED or len(self._sizes) > _DEEPEST:
                raise _Refused(_COSTLY)
        self._ways *= self._branches[0]

    def reading(self) -> _Reading:
        """What they tell."""
        longest = sorted(set(self._parts) - {""}, key=lambda part: (-len(part), part))
        needed = tuple(longest[:2]) if self._certain else ()
        ways = self._ways if self._simple else None
        return _Reading("".join(self._spelled), needed, self._wide, ways)

    def _take(self, token: re.Match[str]) -> None:
        kind, piece, plain = token.lastgroup, token[0], ""
        if token["repeat"]:
            self._parts[-1] = self._parts[-1][:-1]
            self._repeat(token)
        elif kind == "open":
            self._open(piece)
        elif kind == "close":
            self._close()
        elif kind == "bar":
            self._branches[-1] += 1
            self._certain &= len(self._sizes) > 1
        else:
            self._last, self._last_is_group = 1, False
            self._sizes[-1] += 1
            if kind == "escape" and not piece[1].isalnum():
                plain = piece[1]
            elif kind == "escape":
                self._simple &= not piece[1].isdigit()  # it may be text that a group has matched
            elif kind == "one" and piece not in ".^$":
                plain = piece
                piece = "\\{" if piece == "{" else piece
            elif kind == "set":
                piece = "[" + _IN_SET.sub(lambda match: match[1] or r"\[", piece[1:])
        self._spelled.append(piece)
        if plain and len(self._sizes) == 1:
            self._parts[-1] += plain
        elif self._parts[-1]:
            self._parts.append("")

    def _repeat(self, token: re.Match[str]) -> None:
        piece, least, most = token[0], token["least"], token["most"]
        if piece[0] == "{":
            most = most if token["comma"] else least
            if len(least) > 6 or len(most) > 6:
                raise _Refused(_COSTLY)
        least, most = {"?": ("0", "1"), "*": ("0", ""), "+": ("1", "")}.get(piece[0], (least, most))
        times = max(1, int(most or least or 0))
        self._sizes[-1] += self._last * (times - 1)
        self._last *= times
        if most in {"0", "1"}:
            self._ways *= 2
        elif self._last_is_group:
            self._simple = False
        elif most != least:
            self._wide += 1

    def _open(self, piece: str) -> None:
        flags = piece[2:].partition("-")[0] if not piece.startswith("(?P") else ""
        if piece == "(?#" or "x" in flags:
            raise _Refused("has comments or the flag x, which are not taken")
        self._certain &= "i" not in flags
        self._simple &= not piece.startswith(("(?P=", "(?("))
        self._sizes.append(0)
        self._branches.append(1)

    def _close(self) -> None:
        if len(self._sizes) > 1:
            self._last, self._last_is_group = self._sizes.pop(), True
            self._sizes[-1] += self._last
            self._ways *= self._branches.pop()
