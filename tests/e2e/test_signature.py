"""`sign`, `--sign` and `verify --identity`: what was signed is accepted, anything else is not."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

import quantcli
from quantcli.checkpoint.checkpoint import CONFIG
from quantcli.checkpoint.files import CARD, MANIFEST, SIGNATURE
from tests.e2e.conftest import Box, Result, make_box, run_cli, snapshot
from tests.signing import Issued, issue, write_key

WEIGHTS, TOKENIZER = "model-00001-of-00001.safetensors", "tokenizer.json"
DESCRIPTION = "quant_model_description.json"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    write_key(folder / "key.pem")
    write_key(folder / "other.pem")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Box:
    """A model, and a conversion of it that ended with a signature."""
    box = make_box(tmp_path_factory.mktemp("made"))
    assert box.run("--sign", keys / "key.pem").code == 0
    return box


@pytest.fixture
def out(made: Box, tmp_path: Path) -> Path:
    """A copy of the signed checkpoint, to be damaged."""
    return Path(shutil.copytree(made.out, tmp_path / "out"))


def check(out: Path, identity: Path, *more: object) -> Result:
    return run_cli("verify", out, "--identity", identity, *more, "--json")


def errors(result: Result) -> list[dict[str, str]]:
    """The errors about the signature."""
    found = [f for f in result.json["findings"] if f["severity"] == "error"]
    return [finding for finding in found if finding["check"] == "signature"]


def test_a_signed_conversion_is_accepted(made, keys):
    result = check(made.out, keys / "key.pub")
    assert result.code == 0
    files = len([*made.out.iterdir()]) - 1
    counts = {entry["name"]: entry["checked"] for entry in result.json["checks"]}
    assert counts["signature"] == files
    assert "identity" in result.json["depths"]
    assert any(f["what"].startswith("signed by the key sha256:") for f in result.json["findings"])


def test_sign_and_quantize_write_the_same_signature(made, out, keys):
    before = (out / SIGNATURE).read_bytes()
    assert "signed already" in run_cli("sign", out, "--key", keys / "key.pem").err
    result = run_cli("sign", out, "--key", keys / "key.pem", "--force", "--json")
    assert result.code == 0
    assert (out / SIGNATURE).read_bytes() == before
    assert result.json["files"] == len([*out.iterdir()]) - 1
    assert result.json["notes"] == []
    listed = json.loads((out / MANIFEST).read_bytes())["files"]
    nbytes = sum(entry["bytes"] for entry in listed.values()) + (out / MANIFEST).stat().st_size
    assert result.json["bytes"] == nbytes
    (out / SIGNATURE).unlink()
    assert quantcli.sign(out, keys / "key.pem").bytes == nbytes
    assert (out / SIGNATURE).read_bytes() == before


def test_without_an_identity_the_signature_is_not_checked(made):
    result = run_cli("verify", made.out, "--json")
    assert result.code == 0
    notes = [f["what"] for f in result.json["findings"] if f["check"] == "signature"]
    assert notes == ["it is signed, and the signature was not checked: --identity FILE checks it"]


def flip(name: str, at: int = -3) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        content = bytearray((out / name).read_bytes())
        content[at] ^= 1
        (out / name).write_bytes(content)

    return damage


def rename(out: Path) -> None:
    (out / TOKENIZER).rename(out / "tokenizer2.json")


def link(out: Path) -> None:
    (out / TOKENIZER).rename(out.parent / "elsewhere.json")
    (out / TOKENIZER).symlink_to(out.parent / "elsewhere.json")


def link_inside(out: Path) -> None:
    (out / CARD).rename(out / "COPY.md")
    (out / CARD).symlink_to("COPY.md")


def link_to_folder(out: Path) -> None:
    (out / "more").symlink_to(out.parent)


def add(name: str) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"")

    return damage


def odd_name(out: Path) -> None:
    Path(os.fsdecode(os.fsencode(out) + b"/\xff\x1b[2J")).write_bytes(b"")


CHANGED, MISSING, ADDED = "file is not what was signed", "is missing, and it was signed", "was added"
DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "bit of a weight": (flip(WEIGHTS), WEIGHTS, CHANGED),
    "bit of a header": (flip(WEIGHTS, 30), WEIGHTS, CHANGED),
    "bit of the manifest": (flip(MANIFEST), MANIFEST, CHANGED),
    "bit of the card": (flip(CARD), CARD, CHANGED),
    "bit of the configuration": (flip(CONFIG), CONFIG, CHANGED),
    "longer": (lambda out: (out / CARD).write_text((out / CARD).read_text() + "!"), CARD, CHANGED),
    "empty": (lambda out: (out / CARD).write_bytes(b""), CARD, CHANGED),
    "no weights": (lambda out: (out / WEIGHTS).unlink(), WEIGHTS, MISSING),
    "no description": (lambda out: (out / DESCRIPTION).unlink(), DESCRIPTION, MISSING),
    "no manifest": (lambda out: (out / MANIFEST).unlink(), MANIFEST, MISSING),
    "renamed": (rename, TOKENIZER, MISSING),
    "renamed, the new name": (rename, "tokenizer2.json", ADDED),
    "added code": (add("modeling.py"), "modeling.py", ADDED),
    "added and hidden": (add(".hidden/x"), ".hidden/x", ADDED),
    "added, an odd name": (odd_name, "\\xff\\x1b[2J", ADDED),
    "link": (link, TOKENIZER, "is a link"),
    "link inside": (link_inside, CARD, "is a link"),
    "link to a folder": (link_to_folder, "more", "is a link"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_not_signed_is_refused(out, keys, damage):
    change, name, words = DAMAGES[damage]
    change(out)
    result = check(out, keys / "key.pub")
    assert result.code == 1
    texts = [f"{finding['where']}: {finding['what']}" for finding in errors(result)]
    assert any(name in text and words in text for text in texts), texts


def edited(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A change of the signature's file."""

    def damage(out: Path) -> None:
        table = json.loads((out / SIGNATURE).read_bytes())
        change(table)
        (out / SIGNATURE).write_text(json.dumps(table))

    return damage


def payload(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A change of what was signed."""

    def inside(table: dict) -> None:
        statement = json.loads(base64.b64decode(table["dsseEnvelope"]["payload"]))
        change(statement)
        table["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()

    return edited(inside)


def write(content: bytes) -> Callable[[Path], None]:
    return lambda out: (out / SIGNATURE).write_bytes(content)


ENVELOPE = "dsseEnvelope"
FORGED = "is not one of the key"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "none": (lambda out: (out / SIGNATURE).unlink(), "there is no signature"),
    "a folder": (lambda out: ((out / SIGNATURE).unlink(), (out / SIGNATURE).mkdir()), "regular file"),
    "a link to nothing": (lambda out: ((out / SIGNATURE).unlink(),
                                       (out / SIGNATURE).symlink_to("x")), "regular file"),
    "empty": (write(b""), "not valid JSON"),
    "a list": (write(b"[]"), "must hold a JSON object"),
    "deep": (write(b'{"a":' * 4000 + b"1" + b"}" * 4000), "nested too deeply"),
    "cut": (lambda out: write((out / SIGNATURE).read_bytes()[:-9])(out), "not valid JSON"),
    "another kind": (edited(lambda t: t.update(mediaType="x")), "`mediaType` is `x`"),
    "no envelope": (edited(lambda t: t.pop(ENVELOPE)), "`dsseEnvelope` is missing"),
    "no signature": (edited(lambda t: t[ENVELOPE].update(signatures=[])), "should have one entry"),
    "text for bytes": (edited(lambda t: t[ENVELOPE].update(payload="%")), "is not base64"),
    "another signature": (edited(lambda t: t[ENVELOPE]["signatures"][0].update(sig="MAAA")), FORGED),
    "a list as hint": (edited(lambda t: t["verificationMaterial"].update(publicKey=[])),
                       "should be an object"),
    "no certificates": (edited(lambda t: t["verificationMaterial"].update(
        x509CertificateChain={"certificates": []})), "is empty"),
    "junk as certificate": (edited(lambda t: t["verificationMaterial"].update(
        x509CertificateChain={"certificates": [{"rawBytes": "AAAA"}]})), "the identity is a key alone"),
    "of a service": (edited(lambda t: t.update(verificationMaterial={"certificate": {}})), "Sigstore"),
    "another file in it": (payload(lambda s: s["predicate"]["resources"].pop()), FORGED),
    "more left out": (payload(lambda s: s["predicate"]["serialization"]["ignore_paths"].append(CARD)),
                      FORGED),
}  # fmt: skip


@pytest.mark.parametrize("damage", BROKEN)
def test_a_damaged_signature_is_refused(out, keys, damage):
    change, words = BROKEN[damage]
    change(out)
    result = check(out, keys / "key.pub")
    assert result.code == 1
    assert words in errors(result)[0]["what"]


def test_another_key_is_refused(made, keys, tmp_path):
    found = errors(check(made.out, keys / "other.pub"))
    assert ["signed with another key" in finding["what"] for finding in found] == [True]
    both = keys / "both.pub"
    both.write_bytes((keys / "other.pub").read_bytes() + (keys / "key.pub").read_bytes())
    assert check(made.out, both).code == 0
    out = Path(shutil.copytree(made.out, tmp_path / "out"))
    edited(lambda t: t["verificationMaterial"]["publicKey"].pop("hint"))(out)  # any key may fit
    assert check(out, both).code == 0
    assert "the signature is not one of" in errors(check(out, keys / "other.pub"))[0]["what"]


@pytest.fixture(scope="module")
def chain(keys: Path) -> dict[str, Issued]:
    """A root, a certificate below it, and those of signers."""
    root = issue("root", ca=True)
    middle = issue("middle", root, ca=True)
    leaf = issue("signer", middle)
    issued = {
        "root": root,
        "middle": middle,
        "signer": leaf,
        "other root": issue("root", ca=True),
        "expired": issue("late", middle, valid=-timedelta(days=1)),
        "reader": issue("reader", middle, signs=False),
        "below a signer": issue("evil", leaf),
    }
    for name, each in issued.items():
        write_key(keys / f"{name}.pem", each.key)
        (keys / f"{name}.crt").write_bytes(each.pem)
    return issued


def sign_with(out: Path, keys: Path, name: str, *above: str) -> Result:
    """Sign with a certificate, and those above it in one file."""
    above_it = keys / f"{name}.chain"
    above_it.write_bytes(b"".join((keys / f"{each}.crt").read_bytes() for each in above))
    how = ["--key", keys / f"{name}.pem", "--certificate", keys / f"{name}.crt"]
    return run_cli("sign", out, *how, *(["--chain", above_it] if above else []), "--force")


def test_a_certificate_that_leads_to_the_identity_is_accepted(out, keys, chain):
    assert sign_with(out, keys, "signer", "middle").code == 0
    result = check(out, keys / "root.crt")
    assert result.code == 0
    notes = [f["what"] for f in result.json["findings"] if f["check"] == "signature"]
    assert notes[0] == "signed by `CN=signer`"
    assert "--signer names one" in notes[1]
    assert check(out, keys / "root.crt", "--signer", "signer@example.com").code == 0
    assert check(out, keys / "signer.crt").code == 0  # the signer's own
    refused = errors(check(out, keys / "root.crt", "--signer", "somebody"))
    assert refused[0]["what"] == "signed by `CN=signer`, not by somebody"
    refused = errors(check(out, keys / "other root.crt"))
    assert "does not lead to one of the identity" in refused[0]["what"]
    refused = errors(check(out, keys / "key.pub"))
    assert refused[0]["what"] == "signed with a certificate, and the identity is a key alone"


def test_a_chain_with_a_gap_is_refused(out, keys, chain):
    assert sign_with(out, keys, "signer").code == 0
    assert "does not lead" in errors(check(out, keys / "root.crt"))[0]["what"]
    assert check(out, keys / "middle.crt").code == 0


def test_a_signer_may_not_issue(out, keys, chain):
    assert sign_with(out, keys, "below a signer", "signer", "middle").code == 0
    assert "does not lead" in errors(check(out, keys / "root.crt"))[0]["what"]


def test_an_expired_certificate_is_refused(out, keys, chain, monkeypatch):
    assert f"only\n  --> {keys / 'expired.crt'}" in sign_with(out, keys, "expired", "middle").err
    name = "quantcli.checkpoint.signature.keys"
    monkeypatch.setattr(f"{name}._is_valid", lambda certificate, now: True)
    assert sign_with(out, keys, "expired", "middle").code == 0
    monkeypatch.undo()
    assert "`CN=late` is valid from" in errors(check(out, keys / "root.crt"))[0]["what"]


def test_a_certificate_for_other_uses_is_refused(out, keys, chain, monkeypatch):
    assert "is not one for signing" in sign_with(out, keys, "reader", "middle").err
    name = "quantcli.checkpoint.signature.keys"
    monkeypatch.setattr(f"{name}._may_sign", lambda extensions: True)
    assert sign_with(out, keys, "reader", "middle").code == 0
    monkeypatch.undo()
    assert "is not one for signing" in errors(check(out, keys / "root.crt"))[0]["what"]


def test_key_and_certificates_may_be_in_one_file(out, keys, chain):
    one = keys / "one.pem"
    parts = (keys / "signer.pem", keys / "signer.crt", keys / "middle.crt")
    one.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert run_cli("sign", out, "--key", one, "--force").code == 0
    assert check(out, keys / "root.crt").code == 0


@pytest.fixture(scope="module")
def odd_keys(keys: Path, chain: dict[str, Issued]) -> Path:
    write_key(keys / "rsa.pem", rsa.generate_private_key(65537, 2048))
    write_key(keys / "ed.pem", ed25519.Ed25519PrivateKey.generate())
    write_key(keys / "bitcoin.pem", ec.generate_private_key(ec.SECP256K1()))
    write_key(keys / "secret.pem", password=b"open sesame")
    (keys / "empty.pem").write_bytes(b"")
    (keys / "broken.pem").write_text("-----BEGIN PRIVATE KEY-----\nQUJD\n-----END PRIVATE KEY-----\n")
    (keys / "two.pem").write_bytes((keys / "key.pem").read_bytes() + (keys / "ed.pem").read_bytes())
    return keys


KEYS = {
    "nothing.pem": "not a file with a key",
    "empty.pem": "no key or certificate in PEM",
    "key.pub": "file has no private key",
    "two.pem": "file has 2 private keys",
    "broken.pem": "private key cannot be read",
    "rsa.pem": "private key is of RSA",
    "ed.pem": "private key is of Ed25519",
    "bitcoin.pem": "private key is of the curve secp256k1",
    "secret.pem": "private key has a password",
    "": "not a file with a key",
}


@pytest.mark.parametrize("name", KEYS)
def test_a_key_that_cannot_sign_is_bad_input(made, odd_keys, name):
    result = run_cli("sign", made.out, "--key", odd_keys / name)
    assert result.code == 2
    assert KEYS[name] in result.err
    content = (odd_keys / name).read_text() if (odd_keys / name).is_file() else ""
    assert not any(len(line) > 9 and line in result.err for line in content.splitlines())


IDENTITIES = {
    "nothing.pub": "not a file with a key",
    "empty.pem": "no key or certificate in PEM",
    "key.pem": "this is a private key",
    "rsa.pub": "it is of RSA",
    "bitcoin.pub": "it is of the curve secp256k1",
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_an_identity_that_is_none_is_bad_input(made, odd_keys, name):
    result = run_cli("verify", made.out, "--identity", odd_keys / name)
    assert result.code == 2
    assert IDENTITIES[name] in result.err


def test_the_password_comes_from_the_environment(out, odd_keys, monkeypatch):
    monkeypatch.setenv("QUANTCLI_PASSWORD", "wrong")
    result = run_cli("sign", out, "--key", odd_keys / "secret.pem", "--force")
    assert result.code == 2
    assert "with the password in QUANTCLI_PASSWORD" in result.err
    assert "fix: set QUANTCLI_PASSWORD to the key's own" in result.err
    monkeypatch.setenv("QUANTCLI_PASSWORD", "open sesame")
    assert run_cli("sign", out, "--key", odd_keys / "secret.pem", "--force").code == 0
    assert check(out, odd_keys / "secret.pub").code == 0


def test_nothing_there_is_bad_input_with_an_identity_too(tmp_path, keys):
    result = run_cli("verify", tmp_path / "nowhere", "--identity", keys / "key.pub")
    assert (result.code, "no such model directory" in result.err) == (2, True)


def test_only_what_was_written_is_signed(out, keys):
    key = ["--key", keys / "key.pem"]
    flip(WEIGHTS)(out)
    result = run_cli("sign", out, *key, "--force")
    assert result.code == 1
    assert f"`{WEIGHTS}` is not what was written" in result.err
    flip(WEIGHTS)(out)
    odd = out / "a\nb"
    odd.touch()  # verify would not read a signature with this name
    result = run_cli("sign", out, *key, "--force")
    assert (result.code, "file name `a\\nb` has control characters" in result.err) == (2, True)
    odd.unlink()
    (out / TOKENIZER).unlink()
    assert "`tokenizer.json` is missing" in run_cli("sign", out, *key, "--force").err
    link_to_folder(out)
    result = run_cli("sign", out, *key, "--force")
    assert result.code == 2
    assert "is a link" in result.err


def test_files_of_others_are_signed_with_a_note(out, keys):
    (out / "NOTES.txt").write_text("added")
    result = run_cli("sign", out, "--key", keys / "key.pem", "--force", "--json")
    assert result.json["notes"] == ["signed, though the manifest does not list it: NOTES.txt"]
    assert check(out, keys / "key.pub").code == 0


def test_what_is_no_folder_of_a_checkpoint_is_not_signed(tmp_path, keys):
    key = ["--key", keys / "key.pem"]
    places = {"s3://bucket/out": "writes into a folder", tmp_path / "x": "no such folder"}
    for place, words in {**places, tmp_path: "no .safetensors file"}.items():
        result = run_cli("sign", place, *key)
        assert result.code == 2
        assert words in result.err


def test_a_signature_is_neither_copied_nor_in_the_way(made, out, keys, tmp_path):
    before = snapshot(out)
    packed = tmp_path / "packed"
    pack = ["pack", out, "--target", "compressed-tensors", "--out", packed]
    assert run_cli(*pack).code == 0
    assert not (packed / SIGNATURE).exists()
    assert run_cli(*pack, "--force", "--sign", keys / "key.pem").code == 0
    assert check(packed, keys / "key.pub").code == 0
    assert run_cli(*pack, "--force").code == 0  # replaces the signed one
    assert not (packed / SIGNATURE).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "packed"]
    result = run_cli("verify", out, "--against", made.model, "--card")
    assert result.code == 2
    assert "--card would change files that model.sig signs" in result.err
    assert snapshot(out) == before


def test_parts_are_signed_when_they_are_joined(made, keys, tmp_path):
    sign = ["--sign", keys / "key.pem"]
    quantize = ["quantize", made.recipe, "--model", made.model, "--out", tmp_path / "out"]
    refused = run_cli(*quantize, "--part", "1/1", *sign)
    assert refused.code == 2
    assert "a part is not signed" in refused.err
    assert run_cli(*quantize, "--part", "1/1").code == 0
    parts = tmp_path / "out.part-1-of-1"
    assert run_cli("pack", "--merge", parts, "--out", tmp_path / "out", *sign).code == 0
    assert snapshot(tmp_path / "out") == snapshot(made.out)
    refused = run_cli(*quantize, "--force", "--no-checksum", *sign)
    assert refused.code == 2
    assert "--sign needs the hashes" in refused.err
