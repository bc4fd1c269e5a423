"""Limits of the machine, and interrupts when the work is done: message, code, and what is left."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from quantcli.cli import conversion, quantize
from quantcli.convert import shards
from quantcli.core.memory import shortage
from quantcli.core.memory.limits import Limit
from tests.e2e.conftest import Box, make_box, snapshot

MB = 10**6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Box:
    """A conversion that nothing disturbed."""
    box = make_box(tmp_path_factory.mktemp("whole"))
    assert box.run().code == 0
    return box


@pytest.fixture
def box(whole: Box, tmp_path: Path) -> Box:
    """The same conversion to another place."""
    return Box(tmp_path, whole.model, whole.recipe, tmp_path / "out")


def continued(box: Box, whole: Box) -> None:
    """The same command gives the usual bytes, and nothing else."""
    assert box.run().code == 0
    assert snapshot(box.out) == snapshot(whole.out)
    assert [path.name for path in box.root.iterdir()] == ["out"]


@contextmanager
def file_size(nbytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_of_file_sizes(box: Box, whole: Box) -> None:
    with file_size(1000):
        result = box.run()
    assert result.code == 3, result.err
    assert "error: file too large\n" in result.err
    assert "raise the limit of file sizes (ulimit -f)" in result.err
    assert not box.out.exists()
    continued(box, whole)


def test_no_memory_for_a_row_block(box: Box, whole: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(*_: Any) -> Iterator[Any]:
        yield torch.empty(2**55, dtype=torch.uint8)

    monkeypatch.setattr(shards, "compute", compute)
    result = box.run()
    monkeypatch.undo()
    assert result.code == 3, result.err
    assert "memory does not suffice for a row block: 36028797018963968 bytes were asked" in result.err
    assert "  --> `model." in result.err
    assert "Traceback" not in result.err
    continued(box, whole)


@pytest.mark.parametrize("plan", [(), ("--plan",)])
def test_a_container_that_is_too_small(
    box: Box, monkeypatch: pytest.MonkeyPatch, plan: tuple[str, ...]
) -> None:
    limit = Limit("limit of the container (cgroup)", 300 * MB, 9 * MB, "raise it")
    monkeypatch.setattr(shortage, "hard_limits", lambda: [limit])
    result = box.run("--workers", 3, *plan)
    assert result.code == 3, result.err
    assert "error: this conversion with 3 workers takes about " in result.err
    assert "9.0 MB are left of the limit of the container (cgroup), 300.0 MB" in result.err
    assert not box.out.exists()
    assert not box.partial.exists()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_after_publishing(
    box: Box, whole: Box, monkeypatch: pytest.MonkeyPatch, stop: signal.Signals
) -> None:
    def stopped(*_: Any) -> str:
        signal.raise_signal(stop)
        return ""

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(quantize, "show_job", lambda *_: None)
    monkeypatch.setattr(conversion, "decimal", stopped)  # of the closing line
    try:
        result = box.run("--quiet")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert result.code == 130, result.err
    assert f"error: interrupted; kept: {box.out}, which is complete\n" in result.err
    assert "fix: nothing is left to do; `quantcli verify` checks it again" in result.err
    assert snapshot(box.out) == snapshot(whole.out)
