"""Checks as tasks of a cluster: the document of threads, whatever cuts the work."""

from __future__ import annotations

import json
import shutil

import pytest

from quantcli.core.errors import MachineError
from quantcli.core.events import Progress
from quantcli.verification import full
from quantcli.verification.depths import verify
from quantcli.verification.options import VerifyOptions
from quantcli.verification.spread import pool
from tests.e2e.conftest import run_cli
from tests.verify.damage import GOODS
from tests.verify.test_recomputed import calibration_of


def sent(value):
    """A value after Ray has sent it to another process."""
    from ray import cloudpickle

    return cloudpickle.loads(cloudpickle.dumps(value))


class Here:
    """A cluster whose tasks run in this process, with what they would be sent."""

    def __init__(self, cpus=2):
        self.cpus = cpus
        self.tasks = []

    def slots(self, cpus, spare=None):
        return 4

    def task_cpus(self, workers):
        return self.cpus

    def everywhere(self, work, *, common, progress):
        work(sent(common), None, progress)

    def run(self, work, requests, *, common, options, progress):
        common = sent(common)
        self.tasks += requests
        return [work(common, sent(request), progress) for request in requests]


class Bytes(Progress):
    def __init__(self):
        self.done = 0

    def advance(self, nbytes):
        self.done += nbytes


def damage(folder):
    """Change a byte at every few thousand of each weight file, behind its header."""
    for file in folder.glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        begin = 8 + int.from_bytes(content[:8], "little")
        for place in range(begin + 101, len(content), 4001):
            content[place] ^= 0x7F
        file.write_bytes(content)


@pytest.mark.parametrize("state", ["sound", "damaged"])
@pytest.mark.parametrize("name", ["static", "moe", "gptq mixed", "ct nvfp4", "mo mxfp8", "kv heads"])
def test_the_document_is_that_of_threads(stock, tmp_path, monkeypatch, name, state):
    good = stock.good(*GOODS[name])
    path = good.path
    if state == "damaged":
        path = shutil.copytree(path, tmp_path / path.name)
        damage(path)
    options = VerifyOptions(
        path, full=True, against=str(good.source), calibration=calibration_of(good), workers=2
    )
    of_threads, of_tasks = Bytes(), Bytes()
    expected = verify(options, of_threads).to_json()
    monkeypatch.setattr(pool, "_LEAST", 2**10)
    monkeypatch.setattr(full, "_SPAN", 2**10)
    here = Here()
    found = verify(options, of_tasks, here).to_json()
    assert json.dumps(found) == json.dumps(expected)
    assert of_tasks.done == of_threads.done
    assert len(here.tasks) > 20
    failed = {check["name"] for check in found["checks"] if check["failed"]}
    assert failed >= {"hashes", "recomputed"} if state == "damaged" else not failed


def test_a_file_is_one_task_if_it_is_small(stock, monkeypatch):
    """So that a node reads it once."""
    good = stock.good(*GOODS["static"])
    files = sorted(file.name for file in good.path.glob("*.safetensors"))
    monkeypatch.setattr(pool, "_LEAST", 60_000)
    here = Here(cpus=1)
    verify(VerifyOptions(good.path, full=True), cluster=here)
    orders = [[request.file.name for request in task] for task in here.tasks]
    weights = [name for names in orders for name in dict.fromkeys(names) if name in files]
    assert len(here.tasks) > 2
    assert len(weights) <= len(files) + len(here.tasks)  # a cut costs a second reading


def test_tasks_have_work_for_each_cpu():
    assert pool._count(61, 2**40, cpus=4, slots=8) == 15
    assert pool._count(61, 2**40, cpus=4, slots=40) == 40
    assert pool._count(10_000, 2**40, cpus=4, slots=8) == 64
    assert pool._count(10_000, 2**20, cpus=4, slots=8) == 1
    assert pool._cuts([1, 2, 3, 4, 100], 4) == [(0, 4), (4, 5)]
    assert pool._cuts([0, 0], 2) == [(0, 2)]
    assert pool._cuts([25, 50, 75, 100], 4) == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_a_node_without_the_model_is_named(stock, tmp_path, monkeypatch):
    good = stock.good(*GOODS["moe"])
    path = shutil.copytree(good.path, tmp_path / "copy")
    here = Here()

    def elsewhere(work, *, common, progress):
        (path / "model-00001-of-00002.safetensors").unlink(missing_ok=True)
        next(path.glob("*.safetensors")).unlink()
        work(common, None, progress)

    monkeypatch.setattr("quantcli.core.cluster.worker.node_address", lambda: "10.0.0.2")
    monkeypatch.setattr(here, "everywhere", elsewhere)
    with pytest.raises(MachineError, match="cannot be read") as caught:
        verify(VerifyOptions(path, full=True), cluster=here)
    assert "on node 10.0.0.2" in caught.value.where


def test_what_a_cluster_does_not_do_is_said(stock):
    good = stock.good(*GOODS["mini"])
    result = run_cli("verify", good.path, "--executor", "ray:127.0.0.1:1")
    assert result.code == 0
    assert "headers are read here: --executor ray:127.0.0.1:1 has no effect" in result.err
    result = run_cli("verify", good.path, "--full", "--executor", "ray:127.0.0.1:1")
    assert result.code == 3
    assert "no Ray cluster answers" in result.err
    result = run_cli("verify", good.path, "--executor", "dask")
    assert result.code == 2
