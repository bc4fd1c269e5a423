"""A written checkpoint run layer by layer with the engine's arithmetic."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from quantcli.calibration.dataset import Batch
from quantcli.calibration.engine import Engine
from quantcli.calibration.replay import Replay
from quantcli.calibration.skeleton import Skeleton
from quantcli.calibration.states import StatesWriter
from quantcli.calibration.taps import Matrices, Tap
from quantcli.checkpoint import Checkpoint, open_checkpoint
from quantcli.header import StoredTensor
from quantcli.numerics import Parts
from quantcli.plan import Plan, Quantize
from quantcli.schemes.base import Scheme
from quantcli.tensors import read_tensor
from quantcli.tensorspec import TensorSpec, safetensors_dtype


class Served:
    """The tensors of a checkpoint that a plan has written, as the engine takes them."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self.checkpoint = open_checkpoint(out)
        self._target = plan.recipe.target
        items = (item for shard in plan.shards for item in shard.items)
        self._items = {item.module: item for item in items if isinstance(item, Quantize)}

    def read(self, stored: StoredTensor) -> Tensor:
        """A float tensor as it is; a weight that was quantized as its codes stand for it."""
        module, _, suffix = stored.spec.name.rpartition(".")
        if suffix != "weight" or module not in self._items:
            return read_tensor(stored)
        scheme, parts = self._parts(module)
        return scheme.dequantize(parts)

    def quantizer(self, module: str, rows: Tensor, bias: Tensor | None) -> tuple[Scheme, Parts] | None:
        """The scheme and the stored parts of a module; None where it is float."""
        return self._parts(module) if module in self._items else None

    def _parts(self, module: str) -> tuple[Scheme, Parts]:
        item = self._items[module]
        suffixes = (spec.name.removeprefix(f"{module}.") for spec in item.outputs)
        tensors = self.checkpoint.tensors
        stored = {suffix: read_tensor(tensors[f"{module}.{suffix}"]) for suffix in suffixes}
        return item.scheme, self._target.unpack(item.scheme.numerics, stored)


def log_probs(
    model: Checkpoint | Served,
    batches: Sequence[Batch],
    *,
    dtype: str = "F32",
    workers: int = 1,
    each_layer: Callable[[int, int, Tensor], None] | None = None,
) -> list[Tensor]:
    """The log-probability of every token but the first of each sample, float32 [batch, length - 1].

    dtype: of everything but the quantized modules' inner arithmetic. Memory: one layer, and on disk
    the hidden states of all batches. each_layer: told of every layer's output (layer, batch, output).
    """
    served = model if isinstance(model, Served) else None
    checkpoint = model.checkpoint if isinstance(model, Served) else model
    read = served.read if served else read_tensor
    skeleton = Skeleton(checkpoint, dtype, trust_remote_code=False)
    cpu = torch.device("cpu")
    replay = Replay(skeleton, batches, device=cpu, workers=workers, read=read)
    first: dict[int, Tensor] = {}
    replay.begin(first.__setitem__)
    specs = [
        TensorSpec("", safetensors_dtype(first[number].dtype), tuple(first[number].shape))
        for number in range(len(batches))
    ]
    with tempfile.TemporaryDirectory(prefix="quantcli-") as folder:
        writer = StatesWriter(Path(folder), 0, specs, 0)
        for number, hidden in first.items():
            writer.put(number, hidden)
        states = writer.finish()
        first.clear()
        for index, (name, _) in enumerate(skeleton.layers):
            writer = StatesWriter(Path(folder), index + 1, specs, 0)

            def sink(
                number: int, out: Tensor, index: int = index, writer: StatesWriter = writer
            ) -> None:
                writer.put(number, out)
                if each_layer is not None:
                    each_layer(index, number, out)

            with skeleton.loaded(index, read, cpu) as layer:
                tap = None
                if served is not None:
                    segments = skeleton.segments(index)
                    engine = Engine(name, layer, segments, served.quantizer)
                    matrices = Matrices(name, layer)
                    tap = lambda _, m=matrices, e=engine: Tap(m, e)  # noqa: E731
                replay.run(index, layer, states, sink, tap)
            for old in states.files:
                old.unlink()
            states = writer.finish()
        found: dict[int, Tensor] = {}

        def take(number: int, logits: Tensor) -> None:
            ids = batches[number].input_ids
            scores = logits[:, :-1].float().log_softmax(-1)
            found[number] = scores.gather(-1, ids[:, 1:, None]).squeeze(-1)

        replay.finish(states, take)
    return [found[number] for number in range(len(batches))]
