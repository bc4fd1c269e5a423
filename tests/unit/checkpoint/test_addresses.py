"""Addresses that users and servers give: which are read, and what messages show of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.hub import find_model
from quantcli.checkpoint.remote.address import address_of, public_form, scheme_of, without_secrets
from quantcli.convert.destination import destination_of
from quantcli.core.errors import InputError, MachineError
from tests.builders import make_model
from tests.hub_server import Fault
from tests.object_server import Objects
from tests.web_server import served


def test_what_is_an_address() -> None:
    assert address_of("s3://bucket/a") == address_of("S3:/bucket/a") == "s3://bucket/a"
    assert address_of(str(Path("https://host/a"))) == "https://host/a"
    texts = ("org/name", "./s3:/x", "ftp:/a/b", "s3", "", "hf:org/name")
    assert [address_of(text) for text in texts] == [None] * 6
    assert [scheme_of(text) for text in ("FTP://a/b", "hf:/a/b", "/a/b")] == ["ftp", "hf", None]


def _destination(address: str) -> str:
    return destination_of(address).remark


@pytest.mark.parametrize(
    "address",
    [
        "http://me:secret@host/a", "https:/me:secret@host/a", "HTTPS://me:secret@host",
        "https://host/a?token=secret", "https://host/a#secret", "https://me:secret@[host",
        "https://host:99999/?secret", "ftp://me:secret@host/a", "s3://me:sec/secret@bucket/a",
        "S3://secret@bucket/a", "s3a://me:secret@bucket/a", "gs://bucket/a?X-Goog-Signature=secret",
        "hf://secret@org/name", "hf://org/name?token=secret",
    ],
)  # fmt: skip
def test_what_is_refused_is_repeated_without_secrets(address: str) -> None:
    for use in (find_model, _destination):
        with pytest.raises(InputError) as caught:
            use(address)
        text = str(caught.value)
        assert "secret" not in text, use
        assert "-->" in text
    assert "@" not in address or "secret" not in without_secrets(f"--model={address}")


@pytest.mark.parametrize(
    "address",
    [
        "http://[::1", "http://host:99999/a", "https://me:word", "http://a b", "http://a..b",
        f"https://{'a' * 64}.org/a",
    ],
)  # fmt: skip
def test_what_is_not_an_address(address: str) -> None:
    with pytest.raises(InputError, match="not an address"):
        find_model(address)


def test_what_messages_show_of_an_address() -> None:
    assert public_form("s3://key:se/cret@bucket/a?b") == "s3://...@bucket/a"
    assert public_form("hf://org/name@branch") == "hf://org/name@branch"
    assert public_form("https://host/\x1b[2J") == r"https://host/\x1b[2J"
    assert without_secrets("models/a?b@c:d") == "models/a?b@c:d"


def test_a_path_in_python_is_an_address_as_well() -> None:
    place = destination_of(Path("s3://bucket/folder"))
    assert (str(place), place.folder) == ("s3://bucket/folder", None)


@pytest.mark.parametrize("proxy", ["http://me:sec/ret@proxy:80", "socks5://proxy:1", "http://:80"])
def test_a_proxy_that_cannot_be_one(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(MachineError, match="the proxy that the environment names") as caught:
        find_model("http://host.invalid/a")
    assert "sec" not in str(caught.value)
    assert caught.value.where == "HTTP_PROXY"


def test_pages_that_do_not_tell_all(tmp_path: Path) -> None:
    make_model(tmp_path / "name", {"model.safetensors": {}}, config={}, files={"a.txt": "a"})
    (tmp_path / "name" / "b.txt").symlink_to("nothing")
    for folder in ("one/two/three/four", "more"):
        (tmp_path / "name" / folder).mkdir(parents=True)
    with served(tmp_path) as web:
        web.faults = [Fault("/name/", cut=20)]
        folder = find_model(f"{web.address}/name")
        assert {path.name for path in folder.glob("*.*")} == {
            "a.txt", "config.json", "model.safetensors",
        }  # fmt: skip
        assert open_checkpoint(folder).notes == [
            f"{web.address}/name has too many folders, or too deep ones: 1 folder left out, such as "
            "'one/two/three/four/'",
            f"{web.address}/name links to 1 file that the server does not have, such as 'b.txt'",
        ]
        for location, what in [
            ("http://host:port/", "what is not an address"),
            ("http://[/", "what is not an address"),
            ("http://host:99999/", "what is not an address"),
            ("http://a..b/", "what is not an address"),
        ]:
            web.faults = [Fault("/name/config.json", method="HEAD", location=location)]
            with pytest.raises(InputError, match=what):
                find_model(f"{web.address}/name")


def test_a_folder_that_is_an_object(objects: Objects, tmp_path: Path) -> None:
    bucket = objects.bucket("folders")
    model = make_model(tmp_path, {"model.safetensors": {}}, config={}, files={"sub/a.txt": "a"})
    objects.upload(model, "folders", "m")
    objects.client.put_object(Bucket="folders", Key="m/", Body=b"")
    objects.client.put_object(Bucket="folders", Key="m/sub/", Body=b"")
    folder = find_model(f"{bucket}/m")
    assert sorted(open_checkpoint(folder).aux) == sorted(open_checkpoint(model).aux)
    objects.client.put_object(Bucket="folders", Key="m/sub", Body=b"content")
    with pytest.raises(InputError, match="`sub` as a file and as a folder") as caught:
        find_model(f"{bucket}/m")
    assert caught.value.where == f"{bucket}/m"
