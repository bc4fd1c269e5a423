"""Addresses of object storage, and what its errors become."""

import obstore
import pytest

from quantcli.checkpoint.remote.stores import (
    may_pass,
    open_store,
    parse_place,
    store_errors,
)
from quantcli.core.errors import InputError, MachineError
from tests.object_faults import between
from tests.object_server import Objects


def test_an_address_is_a_bucket_and_a_folder() -> None:
    place = parse_place("s3://models/team/qwen/")
    assert (place.bucket, place.folder) == ("models", "team/qwen")
    assert place.key("config.json") == "team/qwen/config.json"
    assert str(place) == "s3://models/team/qwen"
    assert parse_place("gs://models").key("config.json") == "config.json"


@pytest.mark.parametrize(
    "address",
    ["s3://", "s3:///a", "s3://b/../c", "s3://b//c", "s3://b/a\x1b[2J", "s3://b/c?X-Amz-Signature=5e"],
)
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(InputError, match="not an address of object storage") as caught:
        parse_place(address)
    assert "Signature" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_an_address_with_a_key_in_it_is_refused_and_not_repeated() -> None:
    with pytest.raises(InputError, match="must not hold a key") as caught:
        parse_place("s3://AKIA1:hunter2@bucket/folder")
    assert "hunter2" not in str(caught.value)
    assert "AKIA1" not in str(caught.value)


def test_objects_are_read_and_what_is_not_there_is_said(objects: Objects) -> None:
    place = parse_place(objects.bucket("stores") + "/a")
    store = open_store(place)
    obstore.put(store, place.key("b"), b"content")
    assert objects.content("stores", "a/b") == b"content"
    with pytest.raises(InputError, match="no such file") as caught, store_errors(place, "c"):
        obstore.head(store, place.key("c"))
    assert caught.value.where == "s3://stores/a/c"
    nowhere = parse_place("s3://no-such-bucket/a")
    with (
        pytest.raises(InputError, match="bucket `no-such-bucket` does not exist"),
        store_errors(nowhere),
    ):
        obstore.get(open_store(nowhere), nowhere.key("b"))


@pytest.mark.parametrize(
    ("address", "name", "value", "what"),
    [
        ("s3://bucket/a", "AWS_ENDPOINT_URL", "", "not the address of a server"),
        ("s3://bucket/a", "AWS_ENDPOINT_URL", "secret", "not the address of a server"),
        ("s3://bucket/a", "AWS_ENDPOINT_URL_S3", "http://[secret", "not the address of a server"),
        ("gs://bucket/a", "GOOGLE_BASE_URL", "http://secret:port", "not the address of a server"),
        ("s3://bucket/a", "AWS_SECRET_ACCESS_KEY", "secret\n", "a character that it must not have"),
        ("s3://bucket/a", "AWS_SESSION_TOKEN", "secr\xe9t", "a character that it must not have"),
    ],
)
def test_settings_at_which_the_library_breaks_off(
    address: str, name: str, value: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=what) as caught:
        open_store(parse_place(address))
    assert caught.value.where == name
    assert "secr" not in str(caught.value)


def test_a_bucket_of_another_region(objects: Objects) -> None:
    place = parse_place(objects.bucket("far-away") + "/a")
    with between(objects) as proxy:
        proxy.fault = lambda method, path: 301
        store = open_store(place)
        with (
            pytest.raises(InputError, match="bucket `far-away` is in another region") as caught,
            store_errors(place),
        ):
            obstore.get(store, "a/b")
    assert caught.value.fix == "set AWS_REGION to the region of the bucket"


def test_a_server_that_does_not_answer_is_the_machine(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    place = parse_place("s3://bucket/a")
    store = open_store(place, retries=False)
    with (
        pytest.raises(MachineError, match="no answer: error sending") as caught,
        store_errors(place),
    ):
        obstore.get(store, "a")
    assert "127.0.0.1" not in str(caught.value)
    with pytest.raises(obstore.exceptions.GenericError) as raised:
        obstore.get(store, "a")
    assert may_pass(raised.value)
