"""Conversions on three nodes: the bytes of one machine, whatever happens to processes and nodes."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import quantcli
from quantcli.convert.spread import chunks
from tests.cluster.conftest import NODE, kill
from tests.e2e.conftest import run_cli, snapshot

SHARDED = ("--set", "max_shard=8MB")


@pytest.fixture(scope="session")
def whole(model, tmp_path_factory):
    """What threads write: in shards, and as one."""

    def written(*options):
        folder = tmp_path_factory.mktemp("whole")
        result = run_cli(
            "quantize", "w8a8_dynamic", "--model", model, "--out", folder / "out", *options
        )
        assert result.code == 0, result.err
        return snapshot(folder / "out")

    return {"shards": written(*SHARDED), "one": written()}


def weights(files: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if name.endswith(".safetensors")}


def test_three_nodes_write_the_bytes_of_one_machine(three, large, whole, when_begun):
    places = when_begun(lambda place: False)
    result = large.run(*SHARDED, *three.option)
    assert result.code == 0, result.err
    assert weights(snapshot(large.out)) == weights(whole["shards"])
    assert len({place.node for place in places}) == 3
    assert "3 nodes, 3 CPUs" in result.err


def test_three_nodes_write_one_shard_together(three, large, whole, when_begun, monkeypatch):
    monkeypatch.setattr(chunks, "LEAST", 2**20)
    places = when_begun(lambda place: False)
    result = large.run(*three.option, "--verbose")
    assert result.code == 0, result.err
    assert weights(snapshot(large.out)) == weights(whole["one"])
    assert "is written in" in result.err
    assert len({place.node for place in places}) == 3


def test_a_killed_process_costs_its_shard(three, large, whole, when_begun):
    when_begun(kill)
    result = large.run(*SHARDED, *three.option)
    assert result.code == 0, result.err
    assert "has died: 1 shard is done again" in result.err
    assert weights(snapshot(large.out)) == weights(whole["shards"])


@pytest.mark.parametrize("kind", ["shards", "one"])
def test_a_removed_node_costs_its_shard(three, large, whole, when_begun, monkeypatch, kind):
    monkeypatch.setattr(chunks, "LEAST", 2**20)
    when_begun(lambda place: three.remove(place.node))
    result = large.run(*(SHARDED if kind == "shards" else ()), *three.option)
    assert result.code == 0, result.err
    assert re.search(r"node \S+ is gone: 1 (shard|chunk) is done again", result.err), result.err
    assert weights(snapshot(large.out)) == weights(whole[kind])


def test_a_killed_driver_is_continued(three, large, whole):
    command = [sys.executable, "-m", "quantcli", *map(str, large.args(*SHARDED, *three.option))]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as driver:
        for line in driver.stderr:
            if b"shard 2/" in line:
                driver.send_signal(signal.SIGKILL)
                break
        driver.stderr.read()
    assert driver.returncode == -signal.SIGKILL
    assert large.partial.is_dir()
    result = large.run(*SHARDED, *three.option, "--json")
    assert result.code == 0, result.err
    assert result.json["shards_reused"] >= 2
    assert weights(snapshot(large.out)) == weights(whole["shards"])


def test_a_node_with_other_code_is_refused(three, large, tmp_path):
    other = tmp_path / "src" / "quantcli"
    shutil.copytree(Path(quantcli.__file__).parent, other)
    with (other / "core" / "text.py").open("a") as file:
        file.write("\n# changed\n")
    paths = os.pathsep.join([str(other.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    node = three.cluster.add_node(**NODE, env_vars={"PYTHONPATH": paths})
    try:
        result = large.run(*three.option)
    finally:
        three.cluster.remove_node(node, allow_graceful=False)
    assert result.code == 2
    assert re.search(r"has quantcli's files \w+, not \w+", result.err), result.err
    assert not large.out.exists()


def test_the_cluster_of_the_environment_is_used(three, box, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", three.cluster.address)
    monkeypatch.setenv("QUANTCLI_EXECUTOR", "ray")
    result = box.run()
    assert result.code == 0, result.err
    assert f"Ray cluster at {three.cluster.address}" in result.err


def test_a_folder_that_nodes_do_not_share_is_refused(three, box, monkeypatch):
    from quantcli.core.cluster import cluster

    def blind(common, node, progress):
        return "does not see the files here"

    monkeypatch.setattr(cluster, "_probe", blind)
    blind.__module__ = "__main__"  # sent by its code
    result = box.run(*three.option)
    assert result.code == 3
    assert "a node of the cluster does not see the files here" in result.err


def test_from_object_storage_to_object_storage(three, large, whole, when_begun, objects):
    objects.bucket("spread")
    source = objects.upload(large.model, "spread", "model")
    when_begun(lambda place: three.remove(place.node))
    words = ["--model", source, "--out", "s3://spread/out", *SHARDED, *three.option]
    result = run_cli("quantize", "w8a8_dynamic", *words)
    assert result.code == 0, result.err
    assert "is gone: 1 shard is done again" in result.err
    names = objects.names("spread", "out/")
    found = {
        name.removeprefix("out/"): hashlib.sha256(objects.content("spread", name)).hexdigest()
        for name in names
    }
    assert weights(found) == weights(whole["shards"])


def test_each_node_writes_a_part_to_its_own_disk(three, large, whole):
    options = (*SHARDED, *three.option, "--part", "nodes")
    first = large.run(*options)
    assert first.code == 0, first.err
    folders = [large.out.with_name(f"out.part-{number}-of-3") for number in (1, 2, 3)]
    for number, folder in enumerate(folders, start=1):
        assert f"note: part {number} of 3 is in {folder} on node " in first.err
    assert not large.out.exists()
    shutil.rmtree(folders[1])  # of a node that was replaced
    again = large.run(*options, "--json")
    shards = len(weights(whole["shards"]))
    assert 0 < again.json["shards_reused"] < shards
    merged = run_cli("pack", "--merge", *folders, "--out", large.out)
    assert merged.code == 0, merged.err
    assert weights(snapshot(large.out)) == weights(whole["shards"])


def test_parts_on_nodes_need_a_cluster(box):
    result = box.run("--part", "nodes")
    assert result.code == 2
    assert "add --executor ray" in result.err
