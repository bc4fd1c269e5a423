"""The signature of a checkpoint against an identity, and every file against what was signed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantcli.checkpoint.files import SIGNATURE
from quantcli.checkpoint.remote.file import as_remote
from quantcli.checkpoint.signature.bundle import (
    IGNORED,
    Piece,
    Statement,
    is_ignored,
    read_bundle,
    read_statement,
)
from quantcli.checkpoint.signature.keys import Identity, Untrusted
from quantcli.checkpoint.signature.listing import file_names, why_no_file
from quantcli.core.disk import digest_of
from quantcli.core.errors import InputError
from quantcli.core.events import Progress
from quantcli.core.findings import COPY_AGAIN, Finding, failed, noted
from quantcli.core.untrusted.names import printable
from quantcli.core.untrusted.tables import read_bytes
from quantcli.verification.spread.pool import Pool

CHECK = "signature"
_SIGN = "have it signed: quantcli sign OUT --key KEY.pem"
_OTHER = "get the checkpoint from its publisher, or the identity of whoever signed this one"
_ADDED = "remove it, or copy the checkpoint again"


@dataclass(frozen=True)
class Signed:
    """What the check of a signature found. files: that were compared."""

    findings: tuple[Finding, ...]
    files: int = 0

    @property
    def ok(self) -> bool:
        """Whether the signature holds."""
        return not any(finding.severity == "error" for finding in self.findings)


def verify_identity(path: Path, identity: Identity, pool: Pool, progress: Progress) -> Signed:
    """Check the signature in a checkpoint, and that its files are those that were signed.

    Nothing of the statement is used before the signature over it is proven. Raises MachineError for a
    file that cannot be read.
    """
    root = as_remote(path.resolve())
    try:
        bundle = read_bundle(_content(root / SIGNATURE), SIGNATURE)
        signer = identity.check(bundle)
        statement = read_statement(bundle.payload, SIGNATURE)
    except FileNotFoundError:
        return Signed((failed(CHECK, f"there is no signature: {SIGNATURE} is missing", None, _SIGN),))
    except Untrusted as refusal:
        return Signed((failed(CHECK, str(refusal), SIGNATURE, _OTHER),))
    except InputError as error:
        return Signed(
            (failed(CHECK, f"signature cannot be read: {error.what}", SIGNATURE, COPY_AGAIN),)
        )
    findings = [noted(CHECK, f"signed by {signer}", SIGNATURE)]
    if identity.roots and identity.signer is None:
        what = "any signer counts whose certificate leads to one of the identity; --signer names one"
        findings.append(noted(CHECK, what, SIGNATURE))
    findings += _compare(root, statement, pool, progress)
    return Signed(tuple(findings), len({piece.name for piece in statement.pieces}))


def _content(file: Path) -> bytes:
    """The bytes of a signature. FileNotFoundError if it is missing, InputError if it is not a file."""
    if not os.path.lexists(file):
        raise FileNotFoundError
    if not file.is_file():
        raise InputError("it is not a regular file")
    return read_bytes(file)


def _compare(root: Path, statement: Statement, pool: Pool, progress: Progress) -> Iterator[Finding]:
    """Findings for files that are not as they were signed, and for others; in the order of names."""
    ignored = {*IGNORED, *statement.ignored}
    present = {name: None for name in file_names(root) if not is_ignored(name, IGNORED)}
    signed = {piece.name for piece in statement.pieces}
    findings: dict[str, Finding] = {}
    for name in signed - present.keys():
        what = f"file `{name}` is missing, and it was signed"
        findings[name] = failed(CHECK, what, SIGNATURE, COPY_AGAIN)
    for name in present.keys() - signed:
        label = printable(name)
        if is_ignored(name, ignored):
            what = "file is not signed: the signature leaves it out"
            findings[name] = noted(CHECK, what, label)
        elif not statement.names_empty and (root / name).stat().st_size == 0:
            what = "file is empty, and this signature does not name empty files"
            findings[name] = noted(CHECK, what, label)
        else:
            findings[name] = failed(CHECK, "file is not signed: it was added later", label, _ADDED)
    for name in present:
        if (fault := why_no_file(root, name)) is not None:
            findings[name] = failed(CHECK, fault, printable(name), COPY_AGAIN)
    requests = [
        _Request(root / piece.name, piece, (root / piece.name).stat().st_size)
        for piece in statement.pieces
        if piece.name in present and piece.name not in findings
    ]
    last = {each.piece.name: each.piece for each in requests}
    for request in requests:
        stop = last[request.piece.name].stop
        if stop is not None and stop != request.nbytes:
            what = f"file has {request.nbytes} bytes; {stop} were signed"
            findings[request.piece.name] = failed(CHECK, what, request.piece.name, COPY_AGAIN)
    progress.begin(sum(each.length for each in requests), len(last), "file")
    results = pool.each(_is_same, None, requests, [each.length for each in requests], progress)
    for request, same in zip(requests, results, strict=True):
        if not same:
            what = "file is not what was signed"
            name = request.piece.name
            findings.setdefault(name, failed(CHECK, what, name, COPY_AGAIN))
    return (findings[name] for name in sorted(findings))


@dataclass(frozen=True)
class _Request:
    """Bytes of a file to hash. nbytes: of the file."""

    file: Path
    piece: Piece
    nbytes: int

    @property
    def length(self) -> int:
        """Bytes to read."""
        stop = self.nbytes if self.piece.stop is None else min(self.nbytes, self.piece.stop)
        return max(0, stop - self.piece.start)


def _is_same(_: None, request: _Request, progress: Progress) -> bool:
    """Whether bytes have the hash that was signed."""
    piece = request.piece
    same = digest_of(request.file, piece.algorithm, piece.start, piece.stop) == piece.digest
    progress.advance(request.length)
    return same
