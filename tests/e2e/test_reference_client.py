"""Signatures of ours in the hands of the reference client of OpenSSF Model Signing, and the reverse."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from quantcli.checkpoint.files import CARD, SIGNATURE
from tests.e2e.conftest import make_box, run_cli
from tests.signing import issue, write_key

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import model_signing
    from model_signing import hashing, signing, verifying


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a signature, with a file of git and one in a folder; keys; certificates."""
    box = make_box(tmp_path_factory.mktemp("reference"))
    assert box.run().code == 0
    (box.out / ".gitattributes").write_text("*.safetensors filter=lfs")
    (box.out / "images").mkdir()
    (box.out / "images" / "a b.png").write_bytes(b"png")
    write_key(box.root / "key.pem")
    root = issue("root", ca=True)
    middle = issue("middle", root, ca=True)
    for name, each in {"root": root, "middle": middle, "signer": issue("signer", middle)}.items():
        write_key(box.root / f"{name}.pem", each.key)
        (box.root / f"{name}.crt").write_bytes(each.pem)
    return box.root


@pytest.fixture
def out(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "out", tmp_path / "out"))


def reference_signer(place: Path, kind: str) -> Any:
    if kind == "key":
        return signing.Config().use_elliptic_key_signer(private_key=place / "key.pem")
    return signing.Config().use_certificate_signer(
        private_key=place / "signer.pem",
        signing_certificate=place / "signer.crt",
        certificate_chain=[place / "middle.crt"],
    )


def reference_verifier(place: Path, kind: str) -> Any:
    if kind == "key":
        return verifying.Config().use_elliptic_key_verifier(public_key=place / "key.pub")
    return verifying.Config().use_certificate_verifier(certificate_chain=[place / "root.crt"])


def ours(place: Path, out: Path, kind: str) -> None:
    how = ["--key", place / "key.pem"]
    if kind == "certificate":
        how = ["--key", place / "signer.pem", "--certificate", place / "signer.crt"]
        how += ["--chain", place / "middle.crt"]
    result = run_cli("sign", out, *how)
    assert result.code == 0, result.err


IDENTITY = {"key": "key.pub", "certificate": "root.crt"}


@pytest.mark.parametrize("kind", IDENTITY)
def test_the_reference_client_accepts_our_signature(place, out, kind):
    ours(place, out, kind)
    reference_verifier(place, kind).verify(out, out / SIGNATURE)
    (out / CARD).write_text("changed")
    with pytest.raises(ValueError, match=r"Hash mismatch for .*README\.md"):
        reference_verifier(place, kind).verify(out, out / SIGNATURE)


@pytest.mark.parametrize("kind", IDENTITY)
def test_we_accept_a_signature_of_the_reference_client(place, out, kind):
    config = hashing.Config().set_ignored_paths(paths=[SIGNATURE])
    reference_signer(place, kind).set_hashing_config(config).sign(out, out / SIGNATURE)
    verify = ["verify", out, "--identity", place / IDENTITY[kind], "--json"]
    assert run_cli(*verify).code == 0
    (out / CARD).write_text("changed")
    result = run_cli(*verify)
    assert result.code == 1
    errors = [f["where"] for f in result.json["findings"] if f["check"] == "signature"]
    assert CARD in errors


def shards() -> Any:
    return hashing.Config().use_shard_serialization(shard_size=1000)


def blake3() -> Any:
    return hashing.Config().use_file_serialization(hashing_algorithm="blake3")


@pytest.mark.parametrize("how", [shards, blake3])
def test_other_ways_of_the_reference_client_to_hash(place, out, how):
    (out / "nothing.txt").write_bytes(b"")
    config = how().set_ignored_paths(paths=[SIGNATURE, "images"])
    reference_signer(place, "key").set_hashing_config(config).sign(out, out / SIGNATURE)
    verify = ["verify", out, "--identity", place / "key.pub", "--json"]
    result = run_cli(*verify)
    assert result.code == 0
    notes = {f["where"]: f["what"] for f in result.json["findings"] if f["check"] == "signature"}
    assert notes["images/a b.png"] == "file is not signed: the signature leaves it out"
    assert ("nothing.txt" in notes) == (how is shards)
    weights = next(out.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b"\0")
    result = run_cli(*verify)
    assert result.code == 1
    assert weights.name in {f["where"] for f in result.json["findings"] if f["severity"] == "error"}


def test_this_is_the_client_that_the_format_was_read_from():
    assert model_signing.__version__ == "1.1.1"
