"""The file of a signature: a statement that names every file with its hash, and the signature over it.

Source of the format: model-signing 1.1.1, _signing/signing.py (the statement), sign_sigstore_pb.py
(bundle and envelope), sign_ec_key.py (the hint of a key), manifest.py (names of pieces).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from quantcli.checkpoint.files import SIGNATURE
from quantcli.core.errors import InputError
from quantcli.core.untrusted.names import file_name_fault, printable
from quantcli.core.untrusted.tables import Table, parse_table

IGNORED = (SIGNATURE, ".git", ".gitattributes", ".github", ".gitignore")  # as the reference client does
_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_DIGESTS = {"sha256": 32, "blake2b": 64, "blake3": 32}  # bytes
_AGAIN = "sign the checkpoint again"


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a file, and their hash. stop: None for the end of the file."""

    name: str
    algorithm: str
    digest: str  # hex
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Statement:
    """What was signed: pieces of files, and files and folders that were left out.

    names_empty: whether it names empty files, too; in pieces of one size they have none.
    """

    pieces: tuple[Piece, ...]
    ignored: tuple[str, ...]
    names_empty: bool = True


@dataclass(frozen=True)
class Bundle:
    """A signature as its file has it; nothing in it is proven yet.

    signed:       the bytes that the signature is over.
    hint:         sha256 of the PEM of the public key; empty for a signature with certificates.
    certificates: in DER, the signer's first.
    """

    payload: bytes
    signature: bytes
    hint: str = ""
    certificates: tuple[bytes, ...] = ()

    @property
    def signed(self) -> bytes:
        """The payload behind its type, each with its length."""
        return b"DSSEv1 %d %s %d %s" % (
            len(_PAYLOAD),
            _PAYLOAD.encode(),
            len(self.payload),
            self.payload,
        )


def statement_bytes(model: str, digests: Mapping[str, str]) -> bytes:
    """The statement over files. model: the name of their folder. digests: file -> sha256 in hex."""
    names = sorted(digests, key=PurePosixPath)
    whole = hashlib.sha256(b"".join(bytes.fromhex(digests[name]) for name in names))
    serialization = {
        "method": "files",
        "hash_type": "sha256",
        "allow_symlinks": False,
        "ignore_paths": list(IGNORED),
    }
    resources = [{"name": n, "algorithm": "sha256", "digest": digests[n]} for n in names]
    return _encode(
        {
            "_type": _STATEMENT,
            "subject": [{"name": model, "digest": {"sha256": whole.hexdigest()}}],
            "predicateType": _PREDICATE,
            "predicate": {"serialization": serialization, "resources": resources},
        }
    )


def bundle_bytes(bundle: Bundle) -> bytes:
    """The file of a signature."""
    if bundle.certificates:
        chain = [{"rawBytes": _text(certificate)} for certificate in bundle.certificates]
        material: dict[str, Any] = {"x509CertificateChain": {"certificates": chain}}
    else:
        material = {"publicKey": {"hint": bundle.hint}}
    return _encode(
        {
            "mediaType": _BUNDLE,
            "verificationMaterial": {**material, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": _text(bundle.payload),
                "payloadType": _PAYLOAD,
                "signatures": [{"sig": _text(bundle.signature), "keyid": ""}],
            },
        }
    )


def read_bundle(content: bytes, where: str) -> Bundle:
    """The signature in a file. InputError for anything else."""
    table = parse_table(content, where, _AGAIN)
    _must_be(table, "mediaType", _BUNDLE)
    envelope = table.table("dsseEnvelope")
    _must_be(envelope, "payloadType", _PAYLOAD)
    signatures = envelope.list_of_tables("signatures")
    if len(signatures) != 1:
        envelope.refuse("signatures", f"should have one entry, not {len(signatures)}")
    payload, signature = _bytes(envelope, "payload"), _bytes(signatures[0], "sig")
    material = table.table("verificationMaterial")
    if (chain := material.table("x509CertificateChain", None)) is not None:
        certificates = tuple(_bytes(each, "rawBytes") for each in chain.list_of_tables("certificates"))
        if not certificates:
            chain.refuse("certificates", "is empty")
        return Bundle(payload, signature, certificates=certificates)
    if "certificate" in material:
        raise InputError(
            "signed through Sigstore's service, which takes a network to verify",
            where=where,
            fix="verify it with its own client: model_signing verify sigstore",
        )
    return Bundle(payload, signature, material.table("publicKey").text("hint", ""))


def read_statement(payload: bytes, where: str) -> Statement:
    """The statement in a payload. InputError for anything else, and for one that contradicts itself."""
    table = parse_table(payload, where, _AGAIN)
    _must_be(table, "_type", _STATEMENT)
    _must_be(table, "predicateType", _PREDICATE)
    subjects = table.list_of_tables("subject")
    if len(subjects) != 1:
        table.refuse("subject", f"should have one entry, not {len(subjects)}")
    predicate = table.table("predicate")
    serialization = predicate.table("serialization")
    method = serialization.text("method")
    if method not in {"files", "shards"}:
        serialization.refuse("method", f"is `{printable(method):.40}`, which is not known")
    resources = predicate.list_of_tables("resources")
    pieces = tuple(_piece(resource, method) for resource in resources)
    whole = hashlib.sha256(b"".join(bytes.fromhex(piece.digest) for piece in pieces)).hexdigest()
    if subjects[0].table("digest").text("sha256") != whole:
        raise InputError("the statement's digest is not that of its files", where=where, fix=_AGAIN)
    if len({(piece.name, piece.start) for piece in pieces}) < len(pieces):
        raise InputError("the statement names a file twice", where=where, fix=_AGAIN)
    _must_be_whole(pieces, where)
    return Statement(pieces, serialization.texts("ignore_paths", ()), method == "files")


def _piece(resource: Table, method: str) -> Piece:
    name, algorithm, digest = map(resource.text, ("name", "algorithm", "digest"))
    start, stop = 0, None
    if method == "shards":
        name, *ends = name.rsplit(":", 2)
        if len(ends) != 2 or not all(end.isdecimal() and end.isascii() for end in ends):
            resource.refuse("name", "should be FILE:BEGIN:END")
        start, stop = map(int, ends)
        algorithm = algorithm.partition("-sharded-")[0]
    if (fault := file_name_fault(name)) is not None:
        resource.refuse("name", f"cannot be: {fault}")
    if algorithm not in _DIGESTS:
        resource.refuse("algorithm", f"is `{printable(algorithm):.40}`, which is not known")
    if len(digest) != 2 * _DIGESTS[algorithm] or set(digest) - set("0123456789abcdef"):
        resource.refuse("digest", f"is not a {algorithm}")
    return Piece(name, algorithm, digest, start, stop)


def _must_be_whole(pieces: Sequence[Piece], where: str) -> None:
    """InputError unless the pieces of each file follow each other from its first byte."""
    ends: dict[str, int | None] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.name, piece.start)):
        if piece.start != ends.get(piece.name, 0) or (piece.stop or 0) < 0:
            what = f"the statement does not cover all of `{printable(piece.name)}`"
            raise InputError(what, where=where, fix=_AGAIN)
        ends[piece.name] = piece.stop


def is_ignored(name: str, ignored: Iterable[str]) -> bool:
    """Whether a file, or a folder above it, is one of those."""
    path = PurePosixPath(name)
    return any(path.is_relative_to(each) for each in ignored)


def _must_be(table: Table, key: str, value: str) -> None:
    found = table.text(key)
    if found != value:
        table.refuse(key, f"is `{printable(found):.80}`, not `{value}`")


def _bytes(table: Table, key: str) -> bytes:
    try:
        return base64.b64decode(table.text(key), validate=True)
    except (binascii.Error, ValueError):
        table.refuse(key, "is not base64")


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _encode(table: dict[str, Any]) -> bytes:
    return json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
