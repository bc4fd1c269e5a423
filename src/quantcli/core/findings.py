"""One thing that verification found: wrong, or worth a word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quantcli.core.errors import QuantError


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth a word, in the terms of QuantError."""

    check: str
    severity: Literal["error", "note"]
    what: str
    where: str | None = None
    fix: str | None = None


def failed(check: str, what: str, where: str | None = None, fix: str | None = None) -> Finding:
    """A finding that makes the answer no."""
    return Finding(check, "error", what, where, fix)


def noted(check: str, what: str, where: str | None = None, fix: str | None = None) -> Finding:
    """A finding that changes no answer."""
    return Finding(check, "note", what, where, fix)


def of_error(check: str, error: QuantError) -> Finding:
    """A finding from an error of ours."""
    lfs = error.fix if error.fix and "lfs" in error.fix else None
    fix = lfs or "copy the checkpoint again, or convert the model again"
    return failed(check, error.what, error.where, fix)
