"""A model run layer by layer from disk: float, or quantized with the engine's arithmetic."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from quantcli.calibration.replay.cache import entering
from quantcli.calibration.replay.calls import Carry
from quantcli.calibration.replay.engine import EngineLinears
from quantcli.calibration.replay.replay import Replay, Sink
from quantcli.calibration.replay.skeleton import Skeleton
from quantcli.calibration.replay.states import (
    States,
    StatesWriter,
    final_file,
    states_file,
)
from quantcli.calibration.replay.taps import Matrices, Matrix, Tap
from quantcli.calibration.text.dataset import Batch
from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import TensorSpec, safetensors_dtype, torch_dtype
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.errors import InputError
from quantcli.core.events import Progress
from quantcli.core.numerics import Cache, Numerics, Parts
from quantcli.core.registry import discover
from quantcli.schemes.arithmetic.cache import rounded
from quantcli.schemes.base import Scheme
from quantcli.targets.base import StoredCheckpoint, Target, target_of
from quantcli.targets.kv_cache import CachePart, sides_of


class Served:
    """A quantized checkpoint of any producer, as the engine loads it.

    modules: the quantized ones, by name.
    notes: on kernels of the engine that compute otherwise.
    dtype: in which to run it: float32, or the serving dtype if MXFP8 weights alone are rounded, which
           changes little more than the serving dtype itself does.
    """

    def __init__(self, stored: StoredCheckpoint, target: Target) -> None:
        """InputError for a type whose arithmetic this version does not have."""
        self.checkpoint = _unpacked(stored)
        self.modules = stored.modules
        self._target = target
        self.cache = _cache(stored)
        used = {module.numerics for module in stored.modules.values() if module.numerics}
        notes = {target.unlike_kernels(numerics) for numerics in used}
        self.notes = sorted(note for note in notes if note)
        fine = bool(used) and all(self._as_fine_as_floats(numerics) for numerics in used)
        self.dtype = stored.serving_dtype if fine else "F32"
        labels = {
            name: module.layout.label
            for name, module in stored.modules.items()
            if _scheme(module.numerics) is None
        }
        for name, label in (stored.unchecked | labels).items():
            raise InputError(
                f"this version cannot compute as the engine does with {label}",
                where=f"`{name}`",
                fix="verify it without --run",
            )

    def _as_fine_as_floats(self, numerics: Numerics) -> bool:
        """Whether the numerics are those of MXFP8 weights next to float inputs."""
        weight, parts = numerics.weight, self._target.engine_parts(numerics)
        mxfp8 = weight.scale == "e8m0" and weight.element.bits == 8
        return mxfp8 and (numerics.input is None or "float_inputs" in parts)

    @classmethod
    def open(cls, path: Path) -> Served:
        """The checkpoint in `path`."""
        checkpoint = open_checkpoint(path)
        target = target_of(checkpoint)
        if target is None:
            raise InputError("no quantized checkpoint of a known format", where=str(path))
        return cls(target.open_stored(checkpoint), target)

    def read(self, stored: StoredTensor) -> Tensor:
        """A float tensor as it is; a quantized weight as its codes times scales."""
        module, _, suffix = stored.spec.name.rpartition(".")
        if suffix != "weight" or module not in self.modules:
            return read_tensor(stored)
        scheme, parts = self._parts(module)
        return scheme.dequantize(parts)

    def quantizer(self, module: str, rows: Tensor, bias: Tensor | None) -> tuple[Scheme, Parts] | None:
        """The scheme and the stored parts of a module; None if it is float."""
        return self._parts(module) if module in self.modules else None

    def _parts(self, module: str) -> tuple[Scheme, Parts]:
        stored_module = self.modules[module]
        scheme = _scheme(stored_module.numerics)
        assert scheme is not None  # checked when it was opened
        tensors = {s: read_tensor(t) for s, t in stored_module.tensors.items() if s != "bias"}
        parts = self._target.unpack(scheme.numerics, tensors)
        return scheme, parts | self._target.engine_parts(scheme.numerics)


class ServedCache:
    """The cache of keys and values as the engine has it: what enters comes out rounded.

    Also if the engine's user has to ask for it, as for `quant_method: fp8`.
    """

    def __init__(
        self, cache: Cache, layers: Mapping[str, Mapping[CachePart, StoredTensor]], dtype: str
    ) -> None:
        """layers: scales by layer of attention. dtype: that of the engine, such as "BF16"."""
        self.cache = cache
        self._sides = sides_of(cache)
        self.layers = layers.keys()
        engine_dtype = torch_dtype(dtype) if cache.element.family == "int" else torch.float32
        self._scales = {
            (name, side): read_tensor(parts[side]).to(engine_dtype).flatten()
            for name, parts in layers.items()
            for side in self._sides
        }
        self._lock = threading.Lock()
        self._sums: dict[tuple[str, CachePart], list[tuple[float, float]]] = defaultdict(list)

    def enter(self, layer: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, heads, length, width] as attention reads them again."""
        states = {"k_scale": key, "v_scale": value}
        keys, *values = (self._rounded(layer, side, states[side]) for side in self._sides)
        return keys, values[0] if values else keys

    def _rounded(self, layer: str, side: CachePart, states: Tensor) -> Tensor:
        scale, heads = self._scales[layer, side], states.shape[1]
        if scale.numel() > 1:
            scale = scale.view(heads, 1, -1)
        again = rounded(states, scale.to(states.device), self.cache)
        exact = states.double()
        sums = float(exact.square().sum()), float((again.double() - exact).square().sum())
        with self._lock:
            self._sums[layer, side].append(sums)
        return again

    def sqnr(self) -> dict[tuple[str, CachePart], float]:
        """dB of the keys and of the values of each layer so far, by layer and the part that scales
        them."""
        return {
            place: decibels(*map(math.fsum, zip(*sums, strict=True)))
            for place, sums in sorted(self._sums.items())
        }


def decibels(signal: float, noise: float) -> float:
    """SQNR in dB of sums of squares; 200 without noise, -200 without a signal."""
    if not noise:
        return 200.0
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -200.0


def _cache(stored: StoredCheckpoint) -> ServedCache | None:
    """The cache of a checkpoint; None if it stays float, or lacks scales, which is reported."""
    cache = stored.cache
    if cache is None or cache.cache is None or not cache.layers:
        return None
    sides = sides_of(cache.cache)
    if not all(side in parts for parts in cache.layers.values() for side in sides):
        return None
    return ServedCache(cache.cache, cache.layers, stored.serving_dtype)


def _unpacked(stored: StoredCheckpoint) -> Checkpoint:
    """The checkpoint with a `.weight` also if codes have another name: `read` gives its values."""
    more = {
        name: StoredTensor(
            TensorSpec(name, "F32", stored_module.shape),
            stored_module.codes.file,
            stored_module.codes.offset,
        )
        for module, stored_module in stored.modules.items()
        if (name := f"{module}.weight") not in stored.checkpoint.tensors
    }
    return replace(stored.checkpoint, tensors={**stored.checkpoint.tensors, **more})


@cache
def _scheme(numerics: Numerics | None) -> Scheme | None:
    """The arithmetic of these numerics: of the first scheme that makes them."""
    if numerics is None:
        return None
    candidates = (scheme.for_numerics(numerics) for scheme in discover(Scheme).values())
    return next((scheme for scheme in candidates if scheme is not None), None)


class _Heard:
    """A listener that keeps what one matrix reads, and lets the engine compute."""

    def __init__(self, matrix: Matrix, engine: EngineLinears | None) -> None:
        self.inputs: list[Tensor] = []  # [tokens, k] each
        self._matrix = matrix
        self._engine = engine

    def linear(self, matrix: Matrix, x: Tensor, bias: Tensor | None) -> Tensor | None:
        if matrix == self._matrix:
            self.inputs.append(x.reshape(-1, x.shape[-1]).clone())
        return None if self._engine is None else self._engine.linear(matrix, x, bias)


class Forward:
    """Batches on their way through a model, one decoder layer in memory, hidden states on disk."""

    def __init__(
        self,
        model: Checkpoint | Served,
        batches: Sequence[Batch],
        folder: Path,
        *,
        dtype: str = "F32",
        workers: int = 1,
        trust_remote_code: bool = False,
    ) -> None:
        """dtype: of everything but the quantized modules' inner arithmetic."""
        self._served = model if isinstance(model, Served) else None
        self._read = self._served.read if self._served else read_tensor
        checkpoint = model.checkpoint if isinstance(model, Served) else model
        self.skeleton = Skeleton(checkpoint, dtype, trust_remote_code=trust_remote_code)
        self._device = torch.device("cpu")
        self._replay = Replay(
            self.skeleton, batches, device=self._device, workers=workers, read=self._read
        )
        self._folder = folder
        self._finals: list[States] = []
        self.states = self._begin(0)

    def _begin(self, stack: int) -> States:
        """Note the calls of a stack; the inputs of its first layer."""
        first: dict[int, Tensor] = {}

        def note(number: int, hidden: Tensor, carry: Carry) -> None:
            first[number] = hidden

        if stack:
            self._replay.onward(note, self._finals[-1])
        else:
            self._replay.begin(note)
        self.specs = [
            TensorSpec("", safetensors_dtype(first[number].dtype), tuple(first[number].shape))
            for number in range(len(first))
        ]
        writer = self._writer(states_file(self.skeleton.stacks[stack].start))
        for number, hidden in first.items():
            writer.put(number, hidden)
        return writer.finish()

    def _writer(self, file: str) -> StatesWriter:
        return StatesWriter(self._folder, file, self.specs, 0)

    def report_to(self, progress: Progress) -> None:
        """Report batches as steps."""
        self._replay.report_to(progress, len(self.specs))

    @property
    def _starts(self) -> list[int]:
        """The first layer of each stack."""
        return [stack.start for stack in self.skeleton.stacks]

    def enter(self, index: int) -> None:
        """Layer `index` is next: `states` become its inputs, if it begins another stack."""
        if index in self._starts[1:]:
            self._finals.append(self.states)
            self.states = self._begin(self._starts.index(index))

    def layer(
        self, index: int, other: States | None = None, only: Sequence[int] | None = None
    ) -> dict[int, Tensor]:
        """Run a layer over the states of its inputs, which its outputs replace.

        other: run it over these as well, for the batches `only`, and return the outputs.
        """
        aside: dict[int, Tensor] = {}

        def put_aside(number: int, hidden: Tensor, carry: Carry) -> None:
            aside[number] = hidden

        with self._opened(index) as (layer, matrices, engine):

            def run(states: States, sink: Sink, only: Sequence[int] | None = None) -> None:
                tap = None if engine is None else lambda _: Tap(matrices, engine)
                self._replay.run(index, layer, states, sink, tap, only)

            if other is not None:
                run(other, put_aside, only)
            ends = index + 1 in self._starts
            file = final_file(self._starts.index(index + 1) - 1) if ends else states_file(index + 1)
            with self._writer(file) as writer:
                run(self.states, writer.put)
                outputs = writer.finish()
        kept = {file for states in (outputs, *self._finals) for file in states.files}
        for old in self.states.files - kept:
            old.unlink(missing_ok=True)
        self.states = outputs
        return aside

    @contextmanager
    def _opened(self, index: int) -> Iterator[tuple[nn.Module, Matrices, EngineLinears | None]]:
        """A layer with its weights, its matrices, and the engine's arithmetic if it is quantized."""
        name = self.skeleton.layers[index][0]
        with ExitStack() as stack:
            layer = stack.enter_context(self.skeleton.loaded(index, self._read, self._device))
            matrices = Matrices(name, layer, self.skeleton.transposed(index))
            engine = None
            if self._served is not None:
                segments = self.skeleton.segments(index)
                engine = EngineLinears(matrices, segments, self._served.quantizer)
                cache = self._served.cache
                if cache is not None:
                    stack.enter_context(entering(name, layer, segments, cache.layers, cache.enter))
            yield layer, matrices, engine

    def place(self, index: int, module: str) -> tuple[Matrix, slice] | None:
        """The matrix of a layer that a stored module is, and its rows; None if it is not in it."""
        for parameter, experts in self.skeleton.segments(index).items():
            for expert, parts in enumerate(experts):
                for part in parts:
                    if part.module == module:
                        return Matrix(parameter, expert), slice(part.start, part.stop)
        return None

    def inputs(self, index: int, matrix: Matrix) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What a matrix of a layer reads, batch by batch: [tokens, k], and its bias [n], if it has one.

        The layer runs over the states of its inputs, which stay.
        """
        with self._opened(index) as (layer, matrices, engine):
            for number in range(len(self.specs)):
                heard = _Heard(matrix, engine)

                def tap(_: int, heard: _Heard = heard) -> Tap:
                    return Tap(matrices, heard)

                self._replay.run(index, layer, self.states, None, tap, [number])
                empty = matrices.weight(matrix).new_empty(0, matrices.weight(matrix).shape[1])
                yield torch.cat([empty, *heard.inputs]), matrices.bias(matrix)

    def logits(self) -> Iterator[Tensor]:
        """Logits [batch, length, vocabulary] of every batch, in order, or what else the model puts out:
        see `Replay.endings`."""
        return self._replay.endings(self.states)


def token_log_probs(logits: Tensor, batch: Batch, *, ahead: int = 1) -> Tensor:
    """The log-probability of every token but the first of each sample: float32 [batch, length - 1].

    ahead: 1 if logits are of the next token; 0 if they are of the token itself, as an encoder's decoder
    is given the tokens before it.
    """
    scores = (logits[:, :-1] if ahead else logits[:, 1:]).float().log_softmax(-1)
    return scores.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)


def log_probs(
    model: Checkpoint | Served, batches: Sequence[Batch], *, dtype: str = "F32", workers: int = 1
) -> list[Tensor]:
    """The log-probability of every token but the first of each sample, by batch."""
    with TemporaryDirectory(prefix="quantcli-") as folder:
        forward = Forward(model, batches, Path(folder), dtype=dtype, workers=workers)
        for index in range(len(forward.skeleton.layers)):
            forward.enter(index)
            forward.layer(index)
        return [token_log_probs(y, b) for y, b in zip(forward.logits(), batches, strict=True)]
