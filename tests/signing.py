"""Keys and certificates for tests of signatures, as files in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_YEARS = timedelta(days=3650)


def write_key(file: Path, key: Any = None, password: bytes | None = None) -> Any:
    """Write a private key, by default a new one, and its public key as FILE.pub."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    secret = form.BestAvailableEncryption(password) if password else form.NoEncryption()
    pem, kind = form.Encoding.PEM, form.PrivateFormat.PKCS8
    file.write_bytes(key.private_bytes(pem, kind, secret))
    public = key.public_key().public_bytes(pem, form.PublicFormat.SubjectPublicKeyInfo)
    file.with_suffix(".pub").write_bytes(public)
    return key


@dataclass(frozen=True)
class Issued:
    """A certificate, and the key that it is of."""

    certificate: x509.Certificate
    key: Any

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(form.Encoding.PEM)


def issue(
    name: str,
    by: Issued | None = None,
    *,
    ca: bool = False,
    signs: bool = True,
    valid: timedelta = _YEARS,
    key: Any = None,
) -> Issued:
    """A certificate; `by` itself if nobody is given. signs: whether it is one for signatures.

    valid: until when from now on; it is valid for a year or more before.
    """
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer, signing = (by.certificate.subject, by.key) if by else (subject, key)
    end = datetime.now(UTC) + valid
    usage = x509.KeyUsage(signs and not ca, False, not signs, False, False, ca, ca, False, False)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(end, datetime.now(UTC)) - timedelta(days=365))
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.RFC822Name(f"{name}@example.com")]), False)
    )
    if signs and not ca:
        extended = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
        builder = builder.add_extension(extended, critical=False)
    return Issued(builder.sign(signing, hashes.SHA256()), key)
