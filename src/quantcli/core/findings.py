"""Findings: what verification reports, as an error or as a note."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quantcli.core.errors import QuantError, named

# The fix for files that are not what was written.
COPY_AGAIN = "copy the checkpoint again, or convert the model again"


@dataclass(frozen=True)
class Finding:
    """One error or note of a check; `what`, `where` and `fix` as in QuantError."""

    check: str
    severity: Literal["error", "note"]
    what: str
    where: str | None = None
    fix: str | None = None


def failed(check: str, what: str, where: str | None = None, fix: str | None = None) -> Finding:
    """An error: verification fails."""
    return Finding(check, "error", named(what), where and named(where), fix and named(fix))


def noted(check: str, what: str, where: str | None = None, fix: str | None = None) -> Finding:
    """A note: it does not change the verdict."""
    return Finding(check, "note", named(what), where and named(where), fix and named(fix))


def of_error(check: str, error: QuantError) -> Finding:
    """An exception as a finding. The fix is a new copy, unless the error's own is about Git LFS."""
    lfs = error.fix if error.fix and "lfs" in error.fix else None
    return failed(check, error.what, error.where, lfs or COPY_AGAIN)
