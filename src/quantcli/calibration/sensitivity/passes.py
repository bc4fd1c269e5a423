"""The passes of a measurement: the float model forward, and its gradients backward, a layer at a time.

KL divergence of a model whose linears have errors e in their outputs, to second order in e:

    KL = 1/2 E[(sum_t g_t . e_t)^2],   g = dL/dy with dL/dz = sqrt(p) s - p (sqrt(p) . s)

for logits z, p = softmax(z) and random signs s: the covariance of dL/dz is diag(p) - p p', which is
the Hessian of KL in z. Errors of different tokens and of different linears are taken as independent, so
that squares are summed by token and by linear: `benchmarks/budget.py` compares the sum with the KL of
whole recipes. One pass backward measures any number of schemes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from quantcli.calibration.replay.calls import NOTHING_CARRIED, Carry
from quantcli.calibration.replay.engine import EngineLinears, Quantizer
from quantcli.calibration.replay.replay import Replay
from quantcli.calibration.replay.skeleton import Segment, Skeleton
from quantcli.calibration.replay.states import (
    States,
    StatesWriter,
    load_states,
    note_stack,
    states_file,
)
from quantcli.calibration.replay.taps import Matrices, Matrix, Tap
from quantcli.calibration.text.dataset import Batch
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.spec import TensorSpec
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.errors import InputError, MachineError
from quantcli.core.events import Progress

_CPU = torch.device("cpu")
Errors = dict[str, list[float]]  # by module: for each option, the KL that its error makes, in nats


class FloatModel:
    """Batches on their way through a float model; hidden states of all layers stay on disk.

    Memory: one layer in float32, and what its quantized weights take.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        batches: Sequence[Batch],
        folder: Path,
        *,
        workers: int,
        progress: Progress,
        trust_remote_code: bool = False,
    ) -> None:
        """folder: where hidden states are kept; those that are there already are used.

        InputError for a model that does not predict text with one stack of layers.
        """
        self.skeleton = Skeleton(checkpoint, "F32", trust_remote_code=trust_remote_code)
        if len(self.skeleton.stacks) != 1 or not self.skeleton.predicts_text:
            raise InputError(
                "a budget needs a model that predicts text with one stack of layers",
                where=str(checkpoint.path),
                fix="choose schemes by rules, or measure weights alone, without a text",
            )
        self._folder, self.progress, self._batches = folder, progress, batches
        self._replay = Replay(self.skeleton, batches, device=_CPU, workers=workers)
        self._replay.report_to(progress, len(batches))
        self._specs: list[TensorSpec] = []

        def writer(specs: Sequence[TensorSpec]) -> StatesWriter:
            self._specs = list(specs)
            self._check_space()
            return self._writer(states_file(0))

        self._gradients: States | None = None
        self._inputs = [note_stack(self._replay, None, writer)]

    def _check_space(self) -> None:
        """MachineError if the disk has no room for hidden states of all layers and two gradients."""
        needed = (self.layers + 3) * sum(spec.nbytes for spec in self._specs)
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise MachineError(
                f"disk is too full for hidden states: needs {needed:,} bytes, {free:,} are free",
                where=str(self._folder),
                fix="free some space, or take fewer or shorter samples",
            )

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.skeleton.layers)

    @property
    def tokens(self) -> int:
        """Tokens of all batches, without padding."""
        masks = (batch.input_ids if batch.mask is None else batch.mask for batch in self._batches)
        return sum(int(m.sum()) if m.dtype == torch.bool else m.numel() for m in masks)

    def _writer(self, file: str) -> StatesWriter:
        return StatesWriter(self._folder, file, self._specs, 0)

    def _loaded(self, file: str) -> States | None:
        return load_states(self._folder, file, self._specs, 0)

    def forward(self) -> None:
        """Run all layers, or those whose outputs are not there yet."""
        self.progress.begin_layers(self.layers, 0, self.tokens)
        for index, (name, _) in enumerate(self.skeleton.layers):
            file = states_file(index + 1)
            outputs = self._loaded(file)
            if outputs is None:
                self.progress.begin_layer(name, index)
                outputs = self._run(index, self._inputs[index], None, file)
            self._inputs.append(outputs)
            self.progress.layer(name, index)

    def _run(
        self,
        index: int,
        states: States,
        quantizer: Quantizer | None,
        file: str,
        folder: Path | None = None,
    ) -> States:
        """A layer over all batches. quantizer: the engine's arithmetic in it."""
        name = self.skeleton.layers[index][0]
        with (
            self.skeleton.loaded(index, read_tensor, _CPU) as layer,
            StatesWriter(folder or self._folder, file, self._specs, 0) as writer,
        ):
            matrices = Matrices(name, layer, self.skeleton.transposed(index))
            engine = None
            if quantizer is not None:
                engine = EngineLinears(matrices, self.skeleton.segments(index), quantizer)
            tap = None if engine is None else lambda _: Tap(matrices, engine)
            self._replay.run(index, layer, states, writer.put, tap)
            return writer.finish()

    def logits(self, states: States) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits [batch, length, vocabulary] of every batch: of the float model, after `forward`, and
        after other outputs of the last layer."""
        return ((exact, other) for exact, other in self._replay.endings_of([self._inputs[-1], states]))

    def quantized(self, quantizer: Quantizer, folder: Path) -> States:
        """Outputs of the last layer if modules are quantized. folder: empty, for hidden states."""
        states = self._inputs[0]
        self.progress.begin_layers(self.layers, 0, self.tokens)
        for index, (name, _) in enumerate(self.skeleton.layers):
            self.progress.begin_layer(name, index)
            outputs = self._run(index, states, quantizer, states_file(index + 1), folder)
            for old in states.files - outputs.files if index else ():
                old.unlink(missing_ok=True)
            states = outputs
            self.progress.layer(name, index)
        return states

    def begin_backward(self) -> None:
        """Gradients with respect to the outputs of the last layer, for `layer`."""
        self._gradients = self._loaded(_gradients_file(self.layers))
        if self._gradients is None:
            self.progress.phase("gradients of predictions")
            with self._writer(_gradients_file(self.layers)) as writer:
                self._replay.gradients(self._inputs[-1], self._of_logits, writer.put)
                self._gradients = writer.finish()

    def continue_backward(self, index: int) -> bool:
        """Whether gradients that an interrupted run left let `layer` continue with layer `index`."""
        self._gradients = self._loaded(_gradients_file(index + 1))
        return self._gradients is not None

    def _of_logits(self, number: int, logits: Tensor) -> Tensor:
        """sqrt(p) s - p (sqrt(p) . s) of each prediction; zeros for padding."""
        generator = torch.Generator().manual_seed(number)
        found = torch.empty_like(logits)
        for row, of_row in enumerate(logits):  # the vocabulary is large
            p = of_row.float().softmax(-1)
            signs = torch.randint(0, 2, p.shape, generator=generator).to(p.dtype).mul_(2).sub_(1)
            signed = signs.mul_(p.sqrt())
            found[row] = signed - p * signed.sum(-1, keepdim=True)
        mask = self._batches[number].mask
        return found if mask is None else found * mask.unsqueeze(-1)

    def layer(self, index: int, quantizers: Sequence[Quantizer]) -> Errors:
        """The KL that each module of a layer makes in each of some arithmetics, nats per token; layers
        from the last to the first. Of a module that is float there: 0."""
        assert self._gradients is not None
        name, gradients = self.skeleton.layers[index][0], self._gradients
        segments = self.skeleton.segments(index)
        with (
            self.skeleton.loaded(index, read_tensor, _CPU) as layer,
            self._writer(_gradients_file(index)) as writer,
        ):
            matrices = Matrices(name, layer, self.skeleton.transposed(index))
            engines = [EngineLinears(matrices, segments, quantizer) for quantizer in quantizers]

            def work(number: int) -> dict[str, list[float]]:
                recorder, source = _Recorder(matrices), _Leaves(self._inputs[index])
                with torch.enable_grad():
                    out = self._replay.forward(
                        index, layer, source, number, lambda _: Tap(matrices, recorder)
                    )
                calls = [call for call in recorder.calls if call.y.requires_grad]
                found = torch.autograd.grad(
                    out,
                    [source.leaf, *(call.y for call in calls)],
                    gradients.get(number).to(out.dtype),
                    allow_unused=True,
                    materialize_grads=True,
                )
                writer.put(number, found[0], NOTHING_CARRIED)
                sums: dict[str, list[float]] = {}
                with torch.no_grad():
                    for call, gradient in zip(calls, found[1:], strict=True):
                        pieces = segments[call.matrix.parameter][call.matrix.expert]
                        _add(sums, pieces, engines, call, gradient)
                return sums

            results = self._replay.each(work, range(len(self._batches)))
            self._gradients = writer.finish()
        for old in gradients.files:
            old.unlink(missing_ok=True)
        modules = dict.fromkeys(module for result in results for module in result)
        nothing = [0.0] * len(engines)
        return {
            module: [
                0.5 * math.fsum(values) / self.tokens
                for values in zip(*(result.get(module, nothing) for result in results), strict=True)
            ]
            for module in modules
        }


@dataclass(frozen=True)
class _Call:
    """A multiplication y = x W' + bias, float, with its graph."""

    matrix: Matrix
    x: Tensor
    bias: Tensor | None
    y: Tensor


class _Recorder:
    """A listener that keeps the multiplications of a forward."""

    def __init__(self, matrices: Matrices) -> None:
        self._matrices = matrices
        self.calls: list[_Call] = []

    def linear(self, matrix: Matrix, x: Tensor, bias: Tensor | None) -> Tensor | None:
        y = F.linear(x, self._matrices.weight(matrix), bias)
        self.calls.append(_Call(matrix, x.detach(), bias, y))
        return y


class _Leaves:
    """Hidden states of one batch at a time, as the leaf of a graph."""

    def __init__(self, states: States) -> None:
        self._states = states
        self.leaf = torch.empty(0)

    def get(self, batch: int) -> Tensor:
        self.leaf = self._states.get(batch).requires_grad_()
        return self.leaf

    def carried(self, batch: int) -> Carry:
        return self._states.carried(batch)


def _add(
    sums: dict[str, list[float]],
    pieces: Sequence[Segment],
    engines: Sequence[EngineLinears],
    call: _Call,
    gradient: Tensor,
) -> None:
    """Add the squares of g . e over the tokens of a call, by module and engine."""
    for number, engine in enumerate(engines):
        quantized = engine.linear(call.matrix, call.x, call.bias)
        if quantized is None:
            continue
        product = gradient * (quantized - call.y)
        for piece in pieces:
            of_module = sums.setdefault(piece.module, [0.0] * len(engines))
            by_token = product[..., piece.start : piece.stop].sum(-1, dtype=torch.float64)
            of_module[number] += float(by_token.square().sum())


def _gradients_file(index: int) -> str:
    """Name of the file with the gradients with respect to the inputs of a layer, by its index."""
    return f"gradients-{states_file(index)}"
