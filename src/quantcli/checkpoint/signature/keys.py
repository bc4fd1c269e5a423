"""Keys and certificates: what signs, and whom a verification trusts.

Keys are of the elliptic curves P-256, P-384 and P-521, as in the reference client. Source:
model-signing 1.1.1, _signing/sign_ec_key.py and sign_certificate.py.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.signature.bundle import Bundle
from quantcli.core.errors import InputError, MachineError
from quantcli.core.text import pip_install
from quantcli.core.untrusted.names import printable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import HashAlgorithm
    from cryptography.x509 import Certificate, Name

PASSWORD = "QUANTCLI_PASSWORD"  # the environment variable of an encrypted key
_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----.*?-----END \1-----\s*", re.DOTALL)
_MOST = 2**20  # bytes of a file with keys
_CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
_MAKE = "make one: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
_PUBLIC = "give the public key: openssl ec -in key.pem -pubout -out key.pub"


class Untrusted(Exception):
    """A signature that does not prove who signed. Its text says why."""


@dataclass(frozen=True)
class Signer:
    """A private key, perhaps with certificates: the signer's own first, then those above it."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificates: tuple[Certificate, ...] = ()

    @property
    def name(self) -> str:
        """Who signs, for people: the subject of the certificate, or the hash of the public key."""
        if self.certificates:
            return _name_of(self.certificates[0])
        return _name_of_key(self.key.public_key())

    def sign(self, payload: bytes) -> Bundle:
        """The signature over a payload. The same bytes each time, if OpenSSL can do that."""
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ec

        public = self.key.public_key()
        hint = "" if self.certificates else _hint(public)
        unsigned = Bundle(payload, b"", hint, tuple(map(_der, self.certificates)))
        algorithm = _hash_of(public)
        try:
            how = ec.ECDSA(algorithm, deterministic_signing=True)
            signature = self.key.sign(unsigned.signed, how)
        except UnsupportedAlgorithm:
            signature = self.key.sign(unsigned.signed, ec.ECDSA(algorithm))
        return Bundle(payload, signature, hint, unsigned.certificates)


@dataclass(frozen=True)
class Identity:
    """Whom a verification trusts: public keys, and certificates that the signer's own must lead to.

    signer: the name that the signer's certificate must have; None: any.
    """

    keys: tuple[ec.EllipticCurvePublicKey, ...]
    roots: tuple[Certificate, ...]
    signer: str | None = None

    def check(self, bundle: Bundle, now: datetime | None = None) -> str:
        """Who signed, for people. Untrusted if it was nobody of this identity.

        now: the time at which certificates must be valid.
        """
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ec

        if bundle.certificates:
            signers = [self._certified(bundle, now or datetime.now(UTC))]
        else:
            signers = self._named(bundle)
        for public, name in signers:
            with suppress(InvalidSignature):
                public.verify(bundle.signature, bundle.signed, ec.ECDSA(_hash_of(public)))
                return name
        names = " or ".join(name for _, name in signers)
        raise Untrusted(f"the signature is not one of {names} over this statement")

    def _named(self, bundle: Bundle) -> list[tuple[ec.EllipticCurvePublicKey, str]]:
        """The key that a signature says it is of, with its name; all keys if it does not say."""
        if not self.keys:
            raise Untrusted("signed with a key alone, and the identity has only certificates")
        keys = [key for key in self.keys if not bundle.hint or bundle.hint == _hint(key)]
        if not keys:
            raise Untrusted(f"signed with another key, sha256:{printable(bundle.hint):.16}")
        return [(key, _name_of_key(key)) for key in keys]

    def _certified(self, bundle: Bundle, now: datetime) -> tuple[ec.EllipticCurvePublicKey, str]:
        """The key of the signer's certificate, after that was checked."""
        from cryptography import x509

        if not self.roots:
            raise Untrusted("signed with a certificate, and the identity is a key alone")
        try:
            own, *others = map(x509.load_der_x509_certificate, bundle.certificates)
            names = _names_in(own)
            name, public = _name_of(own), _usable(own.public_key())
            extensions = own.extensions
        except InputError as error:
            raise Untrusted(f"the certificate cannot sign: {error.what}") from None
        except Exception as error:  # what a parser says of hostile bytes
            raise Untrusted(f"the certificate cannot be read: {_words(error)}") from None
        if not _is_valid(own, now):
            raise Untrusted(f"the certificate of {name} is valid {_days(own)} only")
        if own not in self.roots:  # else it is trusted by itself
            _check_chain(own, others, self.roots, now, name)
        if not _may_sign(extensions):
            raise Untrusted(f"the certificate of {name} is not one for signing")
        if self.signer is not None and self.signer not in names:
            raise Untrusted(f"signed by {name}, not by {printable(self.signer)}")
        return public, name


def load_signer(key: Path, certificate: Path | None = None, chain: Path | None = None) -> Signer:
    """What signs: a private key in PEM. Certificates may be in its file or in those of their own.

    The password of an encrypted key is in the environment variable QUANTCLI_PASSWORD. InputError
    for files that hold no such key or certificates, or whose certificate is another key's;
    MachineError without the package cryptography.
    """
    blocks = _read(key)
    private = [block for kind, block in blocks if kind.endswith("PRIVATE KEY")]
    if len(private) != 1:
        what = "no private key" if not private else f"{len(private)} private keys"
        raise InputError(f"file has {what}", where=str(key), fix=_MAKE)
    loaded = _load_private(private[0], key)
    listed = [*_certificates(blocks, key)]
    for file in filter(None, (certificate, chain)):
        found = _certificates(_read(file), file)
        if not found:
            raise InputError("file has no certificate", where=str(file), fix="give it in PEM")
        listed += found
    if listed and listed[0].public_key() != loaded.public_key():
        what = f"certificate of {_name_of(listed[0])} is not that of the key"
        where = str(certificate or chain or key)
        raise InputError(what, where=where, fix="give --certificate of this key, then --chain")
    if listed and not _is_valid(listed[0], datetime.now(UTC)):
        what = f"certificate of {_name_of(listed[0])} is valid {_days(listed[0])} only"
        raise InputError(what, where=str(certificate or chain or key), fix="renew it, or wait")
    if listed and not _may_sign(listed[0].extensions):
        what = f"certificate of {_name_of(listed[0])} is not one for signing"
        fix = "give one with the key usage digitalSignature, or codeSigning"
        raise InputError(what, where=str(certificate or chain or key), fix=fix)
    return Signer(loaded, tuple(listed))


def load_identity(file: Path, signer: str | None = None) -> Identity:
    """Whom to trust: public keys or certificates in PEM. InputError for a file without any."""
    blocks = _read(file)
    if any(kind.endswith("PRIVATE KEY") for kind, _ in blocks):
        raise InputError(
            "an identity is public, and this is a private key", where=str(file), fix=_PUBLIC
        )
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    keys = []
    for kind, block in blocks:
        if kind == "PUBLIC KEY":
            try:
                keys.append(_usable(load_pem_public_key(block)))
            except (InputError, ValueError, TypeError) as error:
                what = f"public key cannot be used: {_words(error)}"
                fix = "give the public key of whoever signed"
                raise InputError(what, where=str(file), fix=fix) from None
    roots = _certificates(blocks, file)
    if not keys and not roots:
        what = "file has neither a public key nor a certificate"
        raise InputError(what, where=str(file), fix=f"give one in PEM, or {_PUBLIC}")
    if signer is not None and not roots:
        what = "--signer names the subject of a certificate, and the identity has none"
        raise InputError(
            what, where=str(file), fix="leave --signer out: a key is an identity by itself"
        )
    return Identity(tuple(keys), tuple(roots), signer)


def _read(file: Path) -> list[tuple[str, bytes]]:
    """The blocks of a PEM file: kind and text. InputError if it cannot be read or has none."""
    try:
        import cryptography  # noqa: F401
    except ModuleNotFoundError:
        raise MachineError(
            "signatures need the package cryptography", fix=pip_install("sign")
        ) from None
    try:
        if not file.is_file() or file.stat().st_size > _MOST:
            raise InputError("not a file with a key", where=str(file), fix="give one in PEM")
        content = file.read_bytes()
    except OSError as error:
        what = f"key cannot be read: {(error.strerror or str(error)).lower()}"
        raise InputError(what, where=str(file), fix="check the path and its permissions") from None
    blocks = [(match[1].decode(), match[0]) for match in _BLOCK.finditer(content)]
    if not blocks:
        raise InputError(
            "file has no key or certificate in PEM", where=str(file), fix="give one in PEM"
        )
    return blocks


def _load_private(block: bytes, file: Path) -> ec.EllipticCurvePrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    password = os.environ.get(PASSWORD) or None
    encrypted = b"ENCRYPTED" in block
    if encrypted and password is None:
        what, fix = "private key has a password", f"set the environment variable {PASSWORD}"
        raise InputError(what, where=str(file), fix=fix)
    try:
        secret = password.encode() if encrypted and password else None
        key = load_pem_private_key(block, secret)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # the library's words may quote the file
        what, fix = "private key cannot be read", _MAKE
        if encrypted:
            what, fix = f"{what} with the password in {PASSWORD}", f"set {PASSWORD} to the key's own"
        raise InputError(what, where=str(file), fix=fix) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        what = f"private key is of {_kind(key)}; signatures take the curves P-256, P-384 and P-521"
        raise InputError(what, where=str(file), fix=_MAKE)
    return key


def _usable(key: Any) -> ec.EllipticCurvePublicKey:
    """A public key, if its curve is one of those. InputError otherwise."""
    from cryptography.hazmat.primitives.asymmetric import ec

    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise InputError(f"it is of {_kind(key)}, not of the curve P-256, P-384 or P-521")
    return key


def _kind(key: Any) -> str:
    """The kind of a key as text: `the curve secp256k1`, `RSA`."""
    curve = getattr(key, "curve", None)
    if curve is not None:
        return f"the curve {curve.name}"
    return re.sub(r"(Private|Public)Key.*", "", type(key).__name__).strip("_") or "another kind"


def _certificates(blocks: list[tuple[str, bytes]], file: Path) -> list[Certificate]:
    from cryptography import x509

    try:
        return [
            x509.load_pem_x509_certificate(block) for kind, block in blocks if kind == "CERTIFICATE"
        ]
    except ValueError as error:
        what, fix = f"certificate cannot be read: {_words(error)}", "copy the certificate again"
        raise InputError(what, where=str(file), fix=fix) from None


def _check_chain(
    own: Certificate,
    others: list[Certificate],
    roots: tuple[Certificate, ...],
    now: datetime,
    name: str,
) -> None:
    """Untrusted unless a certificate leads to one of the roots through others that may issue."""
    from cryptography import x509
    from cryptography.x509.verification import (
        Criticality,
        ExtensionPolicy,
        PolicyBuilder,
        Store,
        VerificationError,
    )

    def must_issue(_: Any, __: Certificate, constraints: x509.BasicConstraints) -> None:
        if not constraints.ca:
            raise ValueError("a certificate in the chain may not issue others")

    def may_issue(_: Any, __: Certificate, usage: x509.KeyUsage | None) -> None:
        if usage is not None and not usage.key_cert_sign:
            raise ValueError("a certificate in the chain may not issue others")

    either = Criticality.AGNOSTIC
    policy = ExtensionPolicy.permit_all()
    issuers = policy.require_present(x509.BasicConstraints, either, must_issue)
    issuers = issuers.may_be_present(x509.KeyUsage, either, may_issue)
    builder = PolicyBuilder().store(Store(list(roots))).time(now)
    builder = builder.extension_policies(ca_policy=issuers, ee_policy=policy)
    try:
        builder.build_client_verifier().verify(own, others)
    except (VerificationError, ValueError) as error:
        what = f"the certificate of {name} does not lead to one of the identity: {_words(error)}"
        raise Untrusted(what) from None


def _is_valid(certificate: Certificate, now: datetime) -> bool:
    return certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc


def _days(certificate: Certificate) -> str:
    return f"from {certificate.not_valid_before_utc:%F} to {certificate.not_valid_after_utc:%F}"


def _may_sign(extensions: Any) -> bool:
    """Whether a certificate is for signatures or for code, by its extensions."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    for each in extensions:
        value = each.value
        if isinstance(value, x509.KeyUsage) and value.digital_signature:
            return True
        if isinstance(value, x509.ExtendedKeyUsage) and ExtendedKeyUsageOID.CODE_SIGNING in value:
            return True
    return False


def _names_in(certificate: Certificate) -> set[str]:
    """The names that a certificate gives: those of its subject, and alternative ones."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    names = {certificate.subject.rfc4514_string()}
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    names |= {str(each.value) for each in common}
    for each in certificate.extensions:
        if isinstance(each.value, x509.SubjectAlternativeName):
            kinds = (x509.RFC822Name, x509.DNSName, x509.UniformResourceIdentifier)
            names |= {name.value for name in each.value if isinstance(name, kinds)}
    return names


def _name_of(certificate: Certificate) -> str:
    subject: Name = certificate.subject
    return f"`{printable(subject.rfc4514_string()):.200}`"


def _name_of_key(key: ec.EllipticCurvePublicKey) -> str:
    return f"the key sha256:{_hint(key):.16}"


def _hint(key: ec.EllipticCurvePublicKey) -> str:
    """sha256 of a public key's PEM, in hex."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _hash_of(key: ec.EllipticCurvePublicKey) -> HashAlgorithm:
    from cryptography.hazmat.primitives import hashes

    algorithm: HashAlgorithm = getattr(hashes, _CURVES[key.curve.name])()
    return algorithm


def _der(certificate: Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.DER)


def _words(error: Exception) -> str:
    """What a library says, on one line."""
    return printable(" ".join(str(error).split()))[:200] or type(error).__name__
