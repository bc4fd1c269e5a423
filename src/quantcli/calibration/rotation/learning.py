"""Learned rotations: the matrices with which int4 changes the outputs of layers least.

The matrices begin as Hadamard ones and stay orthogonal: each step moves them along the manifold. One
layer at a time is in memory; its inputs and outputs, of the float model, are on disk. Source of the
method: SpinQuant, arXiv 2405.16406, section 3.2, which takes gradients through the whole model instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from quantcli.calibration.replay.replay import Replay
from quantcli.calibration.replay.states import (
    States,
    StatesWriter,
    load_states,
    note_stack,
    states_file,
)
from quantcli.calibration.replay.taps import Matrices, Tap
from quantcli.calibration.rotation.find import Traced
from quantcli.calibration.rotation.linears import Basis, RotatedLinears
from quantcli.calibration.rotation.proof import HeadPair
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.header import layout, read_header
from quantcli.checkpoint.roles import roles_of
from quantcli.checkpoint.rotation.orthogonal import Dense, Orthogonal, matrix_of
from quantcli.checkpoint.rotation.virtual import Rotated
from quantcli.checkpoint.spec import TensorSpec, safetensors_dtype
from quantcli.checkpoint.tensors import read_tensor, tensor_bytes
from quantcli.checkpoint.writer import ShardWriter
from quantcli.core.errors import InputError, QuantError
from quantcli.core.events import Progress
from quantcli.core.threads import one_thread

_FLOAT = frozenset({"router", "head", "embedding", "tower", "other"})  # roles that stay float
_TOGETHER = 2  # batches of a step, whatever the number of workers
_FIRST, _SECOND = 0.9, 0.95  # decay of the moments of gradients


@dataclass(frozen=True)
class Schedule:
    """epochs: passes over all layers and batches. rate: of the first step, in radians for each entry of
    the skew matrix that a step turns by; it falls to 0 in a straight line."""

    epochs: int = 4
    rate: float = 0.01


@dataclass
class _Moving:
    """An orthogonal matrix, or several [.., n, n], on its way; float64."""

    matrix: Tensor
    first: Tensor
    second: Tensor
    steps: int = 0

    @classmethod
    def at(cls, matrix: Tensor) -> _Moving:
        zeros = torch.zeros(matrix.shape, dtype=torch.float64)
        return cls(matrix.double(), zeros, zeros.clone())

    def move(self, gradient: Tensor, rate: float) -> None:
        """A step R <- R (1 + A / 2)^-1 (1 - A / 2), with a skew A: Adam's moments of the gradient on
        the manifold, R^T G - G^T R, times the rate."""
        skew = self.matrix.mT @ gradient.double()
        skew = skew - skew.mT
        self.steps += 1
        self.first = _FIRST * self.first + (1 - _FIRST) * skew
        self.second = _SECOND * self.second + (1 - _SECOND) * skew.square()
        mean = self.first / (1 - _FIRST**self.steps)
        size = (self.second / (1 - _SECOND**self.steps)).sqrt()
        half = rate / 2 * mean / size.clamp_min(torch.finfo(torch.float32).tiny)
        one = torch.eye(half.shape[-1], dtype=torch.float64)
        self.matrix = self.matrix @ torch.linalg.solve(one + half, one - half)


@dataclass
class Learning:
    """The learning of all matrices of a model; see `learned`."""

    replay: Replay
    traced: Traced
    schedule: Schedule
    folder: Path
    progress: Progress
    budget: int = 0
    unrounded: frozenset[str] = (
        frozenset()
    )  # modules that stay float, or whose inputs the engine rotates
    _moving: dict[str, _Moving] = field(default_factory=dict)  # "" is the stream's

    def run(self, stream: Tensor, heads: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The learned matrices: of the stream float32 [h, h], and of heads [d, d] by the parameter of
        the values. stream, heads: where they begin.

        What an interrupted run has left in the folder is used: hidden states by layer, matrices by
        epoch. Results are the same for any number of workers.
        """
        self._begin(stream, heads)
        done = self._load()
        if done < self.schedule.epochs:
            self._learn(done)
        found = {name: moving.matrix.float() for name, moving in self._moving.items()}
        return found.pop(""), found

    def _learn(self, done: int) -> None:
        """All epochs after those that are done."""
        states = self._states()
        layers = len(self.replay.skeleton.layers)
        self.progress.begin_layers(
            layers * (self.schedule.epochs - done),
            0,
            sum(b.input_ids.numel() for b in self.replay.batches),
        )
        with one_thread():
            for epoch in range(done, self.schedule.epochs):
                for index in range(layers):
                    self._layer(epoch, index, states[index], states[index + 1])
                self._save(epoch + 1)
        for kept in states:
            for file in kept.files:
                file.unlink(missing_ok=True)

    def _begin(self, stream: Tensor, heads: Mapping[str, Tensor]) -> None:
        self._moving = {"": _Moving.at(stream)} | {k: _Moving.at(m) for k, m in heads.items()}

    def _basis(self, pairs: Sequence[HeadPair]) -> Basis:
        """The present matrices of a layer, float32, as leaves of a graph."""

        def leaf(name: str) -> Tensor:
            return self._moving[name].matrix.float().requires_grad_()

        return Basis(leaf(""), {pair.values: leaf(pair.values) for pair in pairs})

    # -- hidden states ---------------------------------------------------------------------------

    def _states(self) -> list[States]:
        """Inputs of every layer, and the outputs of the last one."""
        specs: list[TensorSpec] = []

        def writer(found: Sequence[TensorSpec]) -> StatesWriter:
            specs.extend(found)
            return StatesWriter(self.folder, states_file(0), found, self.budget)

        self.progress.phase("embedding", passes=0)
        states = [note_stack(self.replay, None, writer)]
        for index in range(len(self.replay.skeleton.layers)):
            left = load_states(self.folder, states_file(index + 1), specs, self.budget)
            if left is None:
                skeleton = self.replay.skeleton
                with (
                    StatesWriter(self.folder, states_file(index + 1), specs, self.budget) as put,
                    skeleton.loaded(index, read_tensor, self.replay.device) as layer,
                ):
                    self.replay.run(index, layer, states[-1], put.put)
                    left = put.finish()
            states.append(left)
        return states

    # -- steps -----------------------------------------------------------------------------------

    def _layer(self, epoch: int, index: int, inputs: States, outputs: States) -> None:
        """One pass over all batches of a layer; every group of batches is a step."""
        skeleton, numbers = self.replay.skeleton, range(len(self.replay.batches))
        name = skeleton.layers[index][0]
        self.progress.begin_layer(name, epoch * len(skeleton.layers) + index, 1)
        groups = [numbers[i : i + _TOGETHER] for i in range(0, len(numbers), _TOGETHER)]
        steps = self.schedule.epochs * len(skeleton.layers) * len(groups)
        losses = []
        with (
            skeleton.loaded(index, read_tensor, self.replay.device) as layer,
            self._linears(index, layer) as linears,
        ):
            for place, group in enumerate(groups):
                step = (epoch * len(skeleton.layers) + index) * len(groups) + place
                rate = self.schedule.rate * (1 - step / steps)
                losses += self._step(index, layer, linears, (inputs, outputs), group, rate)
        mean = math.fsum(losses) / len(losses)
        self.progress.layer(name, index, f"pass {epoch + 1}: relative error {mean:.5f}")

    @contextmanager
    def _linears(self, index: int, layer: nn.Module) -> Iterator[RotatedLinears]:
        """The rotated matrices of a loaded layer, whose norms are one meanwhile."""
        skeleton, traced = self.replay.skeleton, self.traced
        name = skeleton.layers[index][0]
        matrices = Matrices(name, layer, skeleton.transposed(index))
        gammas: dict[str, Tensor | None] = {}
        for parameter in matrices.shapes:
            if parameter in traced.readers:
                norm = traced.readers[parameter]
                gammas[parameter] = None if norm is None else self._gamma(name, layer, norm)
        norms = {norm for parameter in gammas if (norm := traced.readers[parameter]) is not None}
        before: list[tuple[nn.Module, nn.Parameter]] = []
        try:
            for norm in norms:
                module = layer.get_submodule(norm.removeprefix(f"{name}."))
                weight = module.get_parameter("weight")
                before.append((module, weight))
                one = torch.full_like(weight, 1.0 - traced.norms[norm])
                module._parameters["weight"] = nn.Parameter(one, requires_grad=False)
            yield RotatedLinears(
                matrices,
                gammas,
                traced.writers,
                [pair for pair in traced.pairs if pair.values in matrices.shapes],
                self._rounded(index),
                self._basis([]),
                {},
            )
        finally:
            for module, weight in before:
                module._parameters["weight"] = weight

    def _gamma(self, name: str, layer: nn.Module, norm: str) -> Tensor:
        module = layer.get_submodule(norm.removeprefix(f"{name}."))
        return module.get_parameter("weight").detach().float() + self.traced.norms[norm]

    def _rounded(self, index: int) -> set[str]:
        roles = roles_of(self.replay.skeleton.checkpoint)
        return {
            parameter
            for parameter, experts in self.replay.skeleton.segments(index).items()
            if roles.get(experts[0][0].module, "other") not in _FLOAT
            and experts[0][0].module not in self.unrounded
        }

    def _step(
        self,
        index: int,
        layer: nn.Module,
        linears: RotatedLinears,
        states: tuple[States, States],
        group: Sequence[int],
        rate: float,
    ) -> list[float]:
        """Move the matrices by the gradients of some batches; the relative errors of their outputs."""
        linears.basis = self._basis(linears.pairs)
        own = {"": linears.basis.stream, **linears.basis.heads}
        inputs, outputs = states
        # clips are searched by one batch, before threads share them
        work = self.replay.each if linears.clips else lambda f, numbers, counted: [*map(f, numbers)]

        def gradients(number: int) -> tuple[float, tuple[Tensor, ...]]:
            tap = Tap(linears.matrices, linears)
            with torch.enable_grad():
                out = self.replay.forward(index, layer, inputs, number, lambda _: tap)
                target = outputs.get(number).to(out.device)
                error = (out.float() - target.float()).square().sum() / target.float().square().sum()
                return error.item(), torch.autograd.grad(error, [*own.values()])

        results = work(gradients, group, counted=False)
        for place, name in enumerate(own):
            self._moving[name].move(sum(grads[place] for _, grads in results), rate)  # type: ignore[arg-type]
        return [error for error, _ in results]

    # -- what is kept ----------------------------------------------------------------------------

    def _save(self, epoch: int) -> None:
        tensors = {}
        for name, moving in self._moving.items():
            for part in ("matrix", "first", "second"):
                tensors[f"{name}.{part}"] = getattr(moving, part).contiguous()
            tensors[f"{name}.steps"] = torch.tensor([moving.steps])
        tensors["epoch"] = torch.tensor([epoch])
        for name, moving in self._moving.items():  # for those who read the matrices alone
            tensors[f"{self._stored_name(name)}.learned"] = moving.matrix.float().contiguous()
        specs = [
            TensorSpec(name, safetensors_dtype(t.dtype), tuple(t.shape)) for name, t in tensors.items()
        ]
        writer = ShardWriter(self.folder, _FILE, layout(specs))
        try:
            for name, tensor in tensors.items():
                writer.write(name, 0, tensor_bytes(tensor))
            writer.finish()
        except BaseException:
            writer.abandon()
            raise

    def _stored_name(self, values: str) -> str:
        """What the matrices of a pair are called in the file: its stored module of values."""
        for pair, heads in zip(self.traced.pairs, self.traced.places.heads, strict=True):
            if pair.values == values:
                return heads.values
        return _STREAM

    def _load(self) -> int:
        """Take what an interrupted run has left; the epochs that are done."""
        try:
            stored = {tensor.spec.name: tensor for tensor in read_header(self.folder / _FILE)[0]}
            epoch = int(read_tensor(stored["epoch"]))
            found = {
                name: _Moving(
                    read_tensor(stored[f"{name}.matrix"]),
                    read_tensor(stored[f"{name}.first"]),
                    read_tensor(stored[f"{name}.second"]),
                    int(read_tensor(stored[f"{name}.steps"])),
                )
                for name in self._moving
            }
        except (QuantError, KeyError):
            return 0
        if any(found[name].matrix.shape != old.matrix.shape for name, old in self._moving.items()):
            return 0
        if epoch > self.schedule.epochs:
            return 0
        self._moving = found
        return epoch


_FILE = "rotation.safetensors"
_STREAM = "stream"


def stream_of(checkpoint: Checkpoint, traced: Traced) -> tuple[Tensor, dict[str, Tensor]]:
    """The matrices of a rotated checkpoint, as `Learning.run` takes them."""
    table = checkpoint.tensors[traced.places.embeddings[0]]
    assert isinstance(table, Rotated)
    assert table.right is not None
    heads = {}
    for pair, places in zip(traced.pairs, traced.places.heads, strict=True):
        values = checkpoint.tensors[f"{places.values}.weight"]
        if isinstance(values, Rotated) and values.left is not None:
            heads[pair.values] = matrix_of(values.left)
    return matrix_of(table.right), heads


def learned_matrices(checkpoint: Checkpoint, folder: Path) -> dict[Orthogonal, Orthogonal]:
    """The learned matrix for each one that a rotated checkpoint has, from a calibration's folder.

    InputError if one is missing or has another size.
    """
    try:
        stored = {tensor.spec.name: tensor for tensor in read_header(folder / _FILE)[0]}
    except QuantError as error:
        raise _missing(folder) from error
    turned = {n: t for n, t in checkpoint.tensors.items() if isinstance(t, Rotated)}
    owners: dict[Orthogonal, str] = {}
    for name, tensor in turned.items():
        if tensor.heads is not None and tensor.left is not None:
            owners[tensor.left] = name.removesuffix(".weight")
    found: dict[Orthogonal, Orthogonal] = {}
    for tensor in turned.values():
        for matrix in (tensor.right, tensor.left):
            if matrix is None or matrix in found:
                continue
            own = owners.get(matrix, _STREAM)
            learned = stored.get(f"{own}.learned")
            if learned is None or learned.spec.shape != (matrix.size, matrix.size):
                raise _missing(folder)
            found[matrix] = Dense(learned, f"a learned matrix of {matrix.size}")
    return found


def _missing(folder: Path) -> InputError:
    return InputError(
        "the calibration has no learned rotation of this model",
        where=str(folder / _FILE),
        fix="calibrate again, in another folder",
    )
