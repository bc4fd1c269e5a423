"""Run a model one decoder layer at a time, weights from disk: any architecture, one layer of memory.

The model's own forward runs twice without its layers: at the start, where each layer only notes how it
is called, and at the end, where the stack returns the outputs of its last layer. In between each layer
is called as it was noted, over all batches, with its weights just read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from quantcli.calibration.replay.calls import Call, Outline, Shared
from quantcli.calibration.replay.outside import outside
from quantcli.calibration.replay.skeleton import Read, Skeleton
from quantcli.calibration.text.dataset import Batch
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.errors import InputError, MachineError, QuantError

T = TypeVar("T")
Tap = Callable[[int], AbstractContextManager[Any]]  # entered around the forward of a batch
Sink = Callable[[int, Tensor], None]  # takes the output of a batch


class BatchSource(Protocol):
    """The hidden states of batches."""

    def get(self, batch: int) -> Tensor:
        """Hidden states of a batch."""


class Replay:
    """Batches on their way through a model."""

    def __init__(
        self,
        skeleton: Skeleton,
        batches: Sequence[Batch],
        *,
        device: torch.device,
        workers: int,
        read: Read = read_tensor,
    ) -> None:
        """read: gives stored tensors outside of the layers. workers: batches at a time, each computed
        by one thread on its own, so that results do not depend on their number."""
        self.skeleton = skeleton
        self.batches = batches
        self.device = device
        self._read = read
        skeleton.move_buffers(device)
        self._workers = workers if device.type == "cpu" else 1
        self._outline = Outline([layer for _, layer in skeleton.layers])
        self._calls: list[list[Call]] = []
        self._shared = Shared()

    @property
    def arguments_nbytes(self) -> int:
        """Bytes of masks and positions that are held."""
        return self._shared.nbytes

    def begin(self, sink: Sink) -> None:
        """Note how every layer is called for every batch; `sink` takes the inputs of the first.

        Raises InputError if the model's layers cannot be called one by one.
        """
        with outside(self.skeleton, self._read, self.device), _one_thread():
            for number, batch in enumerate(self.batches):
                noted = self._outline.note(partial(self._forward, batch))
                if noted is None:
                    raise InputError(
                        f"the layers of `{type(self.skeleton.model).__name__}` cannot be run one by "
                        "one: they do not pass hidden states on as they come",
                        where=str(self.skeleton.checkpoint.path),
                        fix="use schemes that need no data, such as w8a8_dynamic",
                    )
                hidden, calls = noted
                self._calls.append([call.map(self._shared) for call in calls])
                self._shared.forget()
                sink(number, hidden)

    def _forward(self, batch: Batch) -> Any:
        ids = batch.input_ids.to(self.device)
        mask = None if batch.mask is None else batch.mask.to(self.device, torch.int64)
        with torch.no_grad():
            return self.skeleton.model(input_ids=ids, attention_mask=mask, use_cache=False)

    def run(
        self,
        index: int,
        layer: nn.Module,
        states: BatchSource,
        sink: Sink | None = None,
        tap: Tap | None = None,
        only: Sequence[int] | None = None,
        check: bool = True,
    ) -> None:
        """A loaded layer over all batches, or `only` some; with `check`, InputError for NaN or Inf."""
        name = self.skeleton.layers[index][0]

        def work(number: int) -> None:
            with torch.no_grad():
                out = self.forward(index, layer, states, number, tap)
            if check and not bool(torch.isfinite(out).all()):
                raise self._not_finite(name, out, number)
            if sink is not None:
                sink(number, out)

        self.each(work, range(len(self.batches)) if only is None else only)

    def forward(
        self, index: int, layer: nn.Module, states: BatchSource, number: int, tap: Tap | None = None
    ) -> Tensor:
        """A loaded layer over one batch, with or without gradients as the caller has it."""
        hidden = states.get(number).to(self.device)
        try:
            with nullcontext() if tap is None else tap(number):
                return self._calls[number][index].run(layer, hidden)
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise self._failed(self.skeleton.layers[index][0], error) from error

    def each(self, work: Callable[[int], T], numbers: Sequence[int]) -> list[T]:
        """The results of `work` for some batches, in their order; each is computed by one thread."""
        stop = threading.Event()

        def one(number: int) -> T | None:
            return None if stop.is_set() else work(number)

        with _one_thread():
            futures = [self._pool.submit(one, number) for number in numbers]
            try:
                return [future.result() for future in futures]  # type: ignore[misc]
            except BaseException:
                stop.set()
                wait(futures)
                raise

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        """The same threads for all layers: new ones would each begin to fill memory of their own."""
        return ThreadPoolExecutor(
            self._workers, "replay", initializer=torch.set_num_threads, initargs=(1,)
        )

    def _failed(self, layer: str, error: Exception) -> QuantError:
        """The error of a layer: too little memory, or it needs more than its own arguments."""
        message = " ".join(str(error).split())[:200]
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in message:
            return MachineError(
                f"memory does not suffice for `{layer}`: {message}",
                fix="take fewer --workers or a shorter calibration.length",
            )
        return InputError(
            f"`{layer}` cannot be run on its own: {type(error).__name__}: {message}",
            where=str(self.skeleton.checkpoint.path),
            fix="use schemes that need no data, such as w8a8_dynamic",
        )

    def _not_finite(self, layer: str, out: Tensor, batch: int) -> InputError:
        bad = (~torch.isfinite(out)).reshape(len(out), -1).any(1).nonzero()
        sample = sum(len(b.input_ids) for b in self.batches[:batch]) + int(bad[0])
        return InputError(
            f"`{layer}` yields NaN or Inf for sample {sample}, counted from 0",
            where=str(self.skeleton.checkpoint.path),
            fix="if the model is sound, it needs more range: set calibration.dtype to float32",
        )

    def endings(self, states: BatchSource) -> Iterator[Tensor]:
        """Logits [batch, length, vocabulary] of every batch, in order."""
        with outside(self.skeleton, self._read, self.device), _one_thread():
            for number, batch in enumerate(self.batches):
                with self._outline.ending(states.get(number).to(self.device)):
                    out = self._forward(batch)
                yield out.logits if hasattr(out, "logits") else out[0]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread: sums over several would depend on how many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
