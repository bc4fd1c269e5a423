"""No single bit of any file can change unnoticed, with --full. Ten thousand: benchmarks/bitflips.py."""

import importlib.util
import shutil
import sys

import pytest

from quantcli.verification.depths import verify
from quantcli.verification.options import VerifyOptions
from tests.e2e.calibrating import ROOT
from tests.verify.damage import good_of


@pytest.fixture
def bitflips(monkeypatch):
    """benchmarks/bitflips.py: the same flips, fewer of them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("bitflips", ROOT / "benchmarks/bitflips.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bitflips", module)
    spec.loader.exec_module(module)
    return module


def test_every_flip_is_seen(stock, tmp_path, bitflips):
    folder = tmp_path / "copy"
    shutil.copytree(good_of(stock, "mini").path, folder)
    flips = list(bitflips.flips(folder, 300, seed=1))
    assert {flip.file.name for flip in flips} == {path.name for path in folder.iterdir()}
    assert [str(flip) for flip in flips if not bitflips.seen(folder, flip)] == []
    assert verify(VerifyOptions(folder, full=True)).ok
