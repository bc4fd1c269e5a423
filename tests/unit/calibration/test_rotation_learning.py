"""Learned rotations: they stay orthogonal, int4 changes outputs less, and workers change nothing."""

import pytest
import torch

from quantcli.calibration.replay.replay import Replay
from quantcli.calibration.replay.skeleton import Skeleton
from quantcli.calibration.replay.taps import Matrices, Tap
from quantcli.calibration.rotation.find import trace
from quantcli.calibration.rotation.learning import Learning, Schedule
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.events import SILENT
from tests.replaying import CPU, make_batches
from tests.rotating import orthogonal
from tests.tiny_models import make_tiny


class Told:
    """A progress that keeps the errors that layers report."""

    def __init__(self):
        self.errors = []

    def __getattr__(self, name):
        return getattr(SILENT, name)

    def layer(self, name, index, note):
        """Keep the number at the end of a note."""
        self.errors.append(float(note.rpartition(" ")[2]))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with values in grouped heads and an outlier in its stream, and its places."""
    path = make_tiny(tmp_path_factory.mktemp("learned") / "m", "qwen3", dtype=torch.float32)
    return open_checkpoint(path), trace(open_checkpoint(path))


def run(model, folder, *, workers=1, epochs=3, schedule=None):
    """Learn from random rotations; the matrices, and the mean error of each pass over a layer."""
    checkpoint, traced = model
    skeleton = Skeleton(checkpoint, "F32", trust_remote_code=False)
    replay = Replay(skeleton, make_batches(), device=CPU, workers=workers)
    told = Told()
    folder.mkdir(exist_ok=True)
    learning = Learning(replay, traced, schedule or Schedule(epochs, 0.02), folder, told)
    heads = {pair.values: orthogonal(16, 7) for pair in traced.pairs}
    return learning.run(orthogonal(64, 5), heads), told.errors


def test_learning(model, tmp_path):
    (stream, heads), errors = run(model, tmp_path / "one")
    assert len(heads) == 3
    for matrix in (stream, *heads.values()):
        one = torch.eye(matrix.shape[-1])
        assert (matrix.mT @ matrix - one).abs().max() < 1e-5
    assert (stream - orthogonal(64, 5)).norm() > 0.1
    assert sum(errors[-3:]) < 0.97 * sum(errors[:3])
    (other, other_heads), _ = run(model, tmp_path / "three", workers=3)
    assert torch.equal(stream, other)
    assert all(torch.equal(heads[name], other_heads[name]) for name in heads)


def test_an_interrupted_run_continues(model, tmp_path, monkeypatch):
    (stream, _), _ = run(model, tmp_path / "whole", epochs=2)
    whole = Learning._layer

    def stops(self, epoch, index, *states):
        if (epoch, index) == (1, 1):
            raise KeyboardInterrupt
        whole(self, epoch, index, *states)

    monkeypatch.setattr(Learning, "_layer", stops)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "cut", epochs=2)
    monkeypatch.undo()
    (again, _), errors = run(model, tmp_path / "cut", epochs=2)
    assert len(errors) == 3  # the first pass is not repeated
    assert torch.equal(stream, again)


def test_without_rounding_the_function_stays(model):
    """The linears that learning replaces differ from the layer's own by int4 alone."""
    checkpoint, traced = model
    skeleton = Skeleton(checkpoint, "F32", trust_remote_code=False)
    replay = Replay(skeleton, make_batches(padded=False), device=CPU, workers=1)
    states = {}
    replay.begin(lambda number, hidden, _: states.update({number: hidden}))

    class Given:
        get, carried = staticmethod(states.__getitem__), staticmethod(lambda number: {})

    learning = Learning(replay, traced, Schedule(), checkpoint.path, SILENT)
    heads = {pair.values: orthogonal(16, 7) for pair in traced.pairs}
    learning._begin(orthogonal(64, 5), heads)
    with skeleton.loaded(1, read_tensor, CPU) as layer:
        before = replay.forward(1, layer, Given, 0)
        with learning._linears(1, layer) as linears:
            linears.rounded = frozenset()
            linears.basis = learning._basis(linears.pairs)
            tap = Tap(Matrices("model.layers.1", layer), linears)
            after = replay.forward(1, layer, Given, 0, lambda _: tap)
    assert (after - before).norm() < 1e-5 * before.norm()
