"""Verifications on three nodes: the document of threads, whatever happens to processes and nodes."""

from __future__ import annotations

import json

import pytest

from quantcli.verification.spread import pool
from tests.cluster.conftest import kill
from tests.e2e.conftest import run_cli


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory):
    """A conversion in shards, one of which has changed since."""
    out = tmp_path_factory.mktemp("converted") / "out"
    words = ["--model", model, "--out", out, "--set", "max_shard=8MB"]
    assert run_cli("quantize", "w8a8_dynamic", *words).code == 0
    file = sorted(out.glob("*.safetensors"))[2]
    content = bytearray(file.read_bytes())
    content[-1000] ^= 0x40
    file.write_bytes(content)
    return out


@pytest.fixture
def documents(model, converted, three, monkeypatch, when_begun):
    """The document of threads; that of three nodes, with what was said, while `act` is done."""
    monkeypatch.setattr(pool, "_LEAST", 2**20)

    def verified(act, path=converted, against=model):
        words = ["verify", path, "--full", "--against", against, "--workers", 1, "--json"]
        expected = run_cli(*words)
        places = when_begun(act)
        found = run_cli(*words, *three.option)
        assert (expected.code, found.code) == (1, 1), found.err
        return json.loads(expected.out), json.loads(found.out), found.err, places

    return verified


def test_three_nodes_find_what_threads_find(documents):
    expected, found, _, places = documents(lambda place: False)
    assert found == expected
    failed = {check["name"] for check in found["checks"] if check["failed"]}
    assert failed >= {"hashes", "recomputed"}
    assert len({place.node for place in places}) == 3


@pytest.mark.parametrize("end", ["process", "node"])
def test_a_loss_costs_one_task(documents, three, end):
    act = kill if end == "process" else lambda place: three.remove(place.node)
    expected, found, said, _ = documents(act)
    assert found == expected
    assert "1 task is done again" in said


def test_in_object_storage(documents, model, converted, objects):
    objects.bucket("verified")
    path = objects.upload(converted, "verified", "out")
    source = objects.upload(model, "verified", "model")
    expected, found, _, places = documents(lambda place: False, path, source)
    assert found == expected
    assert len({place.node for place in places}) == 3
