"""Run a model one decoder layer at a time, weights from disk: any architecture, one layer of memory.

The model's own forward runs twice without its layers: at the start, when each layer only notes how it
is called, and at the end, when the stack returns the outputs of its last layer. In between each layer
is called as it was noted, over all batches, with its weights just read. If there are two stacks, the
forward runs between them too: the first returns its outputs, and the second notes its calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from inspect import signature
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from quantcli.calibration.replay.calls import (
    NOTHING_CARRIED,
    Call,
    Carry,
    Outline,
    Shared,
    map_tensors,
)
from quantcli.calibration.replay.devices import too_little_memory
from quantcli.calibration.replay.outside import outside
from quantcli.calibration.replay.skeleton import NO_DATA, Read, Skeleton
from quantcli.calibration.text.dataset import Batch
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.errors import InputError, QuantError
from quantcli.core.events import SILENT, Progress
from quantcli.core.memory.shortage import is_out_of_memory, machine_fault
from quantcli.core.threads import keep_freed_memory, one_thread, set_one_thread

T = TypeVar("T")
Tap = Callable[[int], AbstractContextManager[Any]]  # entered around the forward of a batch
Sink = Callable[[int, Tensor, Carry], None]  # takes the output of a batch, and what is carried on


class BatchSource(Protocol):
    """The hidden states of batches, and what earlier layers hand on next to them."""

    def get(self, batch: int) -> Tensor:
        """Hidden states of a batch."""

    def carried(self, batch: int) -> Carry:
        """What else the layers that follow are given of earlier ones."""


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
        self.batches = self._samples = batches
        self.device = device
        self._read = read
        skeleton.move_buffers(device)
        self._workers = workers if device.type == "cpu" else 1
        self._finals: list[BatchSource] = []  # the outputs of the stacks before the present one
        self._calls: list[list[Call]] = [[] for _ in batches]
        self._noted: Sequence[int] = range(len(batches))  # batches whose calls are noted
        self._shared = Shared()
        self.progress, self._counted = SILENT, 0

    def report_to(self, progress: Progress, batches: int) -> None:
        """Report batches as steps, of the first `batches` of them."""
        self.progress, self._counted = progress, batches

    @cached_property
    def _outlines(self) -> list[Outline]:
        """Of each stack; what the model calls after it are later stacks, and the head."""
        modules, head = [layer for _, layer in self.skeleton.layers], self.skeleton.head
        return [
            Outline(modules[stack.start : stack.stop], [*modules[stack.stop :], *head])
            for stack in self.skeleton.stacks
        ]

    @property
    def arguments_nbytes(self) -> int:
        """Bytes of masks and positions that are held."""
        return self._shared.nbytes

    def begin(self, sink: Sink, only: Collection[int] | None = None) -> None:
        """Note how every layer of the first stack is called for every batch, or for `only` some, which
        alone can run then; `sink` takes the inputs of the first layer.

        Raises InputError if the model's layers cannot be called one by one.
        """
        self._finals = []
        self.batches = self._samples
        self._calls = [[] for _ in self.batches]
        self._noted = range(len(self.batches)) if only is None else sorted(only)
        self._note_calls(sink)

    def onward(self, sink: Sink, final: BatchSource) -> None:
        """The same for the next stack; the one before has put out `final`, which must stay readable."""
        self._finals.append(final)
        if self.skeleton.next_token is None:
            self._note_calls(sink)
        else:
            self._note_next_token(sink, self.skeleton.next_token.layout.masked)

    def _note_next_token(self, sink: Sink, masked: bool) -> None:
        """Note how the layer is called for all tokens but the last of each sample; `sink` takes the
        embeddings of the tokens that follow, and behind them the model's last hidden states.

        masked: the first embedding is zeros.
        """
        model: Any = self.skeleton.model
        self.batches = [
            Batch(batch.input_ids[:, :-1], None if batch.mask is None else batch.mask[:, 1:])
            for batch in self._samples
        ]
        last = self._outlines[-1]
        with outside(self.skeleton, self._read, self.device), one_thread():
            for number in self._noted:
                samples, batch = self._samples[number], self.batches[number]
                final = self._finals[-1].get(number).to(self.device)[:, :-1]
                with self._outlines[0].ending(final), torch.no_grad():
                    noted = last.note(partial(self._forward, batch))
                    assert noted is not None, "the layer is called with hidden states"
                    with last.ending(final):
                        hidden = self._forward(batch, model.base_model).last_hidden_state
                    following = samples.input_ids[:, 1:].to(self.device)
                    embedding = model.get_input_embeddings()(following)
                    if masked:
                        embedding[:, :1] = 0
                self._calls[number] += [call.map(self._shared) for call in noted[1]]
                self._shared.forget()
                sink(number, torch.cat([embedding, hidden], -1), NOTHING_CARRIED)

    def _note_calls(self, sink: Sink) -> None:
        with outside(self.skeleton, self._read, self.device), one_thread():
            for number in self._noted:
                noted = self._note(number, self.batches[number])
                if noted is None:
                    raise InputError(
                        f"the layers of `{type(self.skeleton.model).__name__}` cannot be run one by "
                        "one: they do not pass hidden states on as they come, or run more than once",
                        where=str(self.skeleton.checkpoint.path),
                        fix=NO_DATA,
                    )
                hidden, calls = noted
                if number < self._counted:
                    self._step(number)
                self._calls[number] += [call.map(self._shared) for call in calls]
                self._shared.forget()
                sink(number, hidden, NOTHING_CARRIED)

    def _note(self, number: int, batch: Batch) -> tuple[Tensor, list[Call]] | None:
        """InputError if the model's own forward fails."""
        outline = self._outlines[len(self._finals)]
        try:
            with self._ending(number):
                return outline.note(partial(self._forward, batch))
        except QuantError:
            raise
        except Exception as error:  # code of the library, or of the model
            raise self._failed(
                f"the forward of `{type(self.skeleton.model).__name__}`", error
            ) from error

    @contextmanager
    def _ending(self, number: int) -> Iterator[None]:
        """Within it the stacks before the present one return their outputs."""
        with ExitStack() as stack:
            for outline, final in zip(self._outlines, self._finals, strict=False):
                stack.enter_context(outline.ending(final.get(number).to(self.device)))
            yield

    def _forward(self, batch: Batch, model: Any = None, *, differentiable: bool = False) -> Any:
        ids = batch.input_ids.to(self.device)
        mask = None if batch.mask is None else batch.mask.to(self.device, torch.int64)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self.skeleton.two_stacks:  # the decoder is to put out what the encoder was given
            start = ids.new_full((len(ids), 1), self.skeleton.start_token)
            inputs |= {"decoder_input_ids": torch.cat([start, ids[:, :-1]], 1)}
            inputs |= {"decoder_attention_mask": mask}
        taken = signature(self.skeleton.model.forward).parameters.values()
        if any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in taken):
            inputs["use_cache"] = False
        with torch.set_grad_enabled(differentiable):
            return (model or self.skeleton.model)(**inputs)

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
                out, onward = self._outputs(index, layer, states, number, tap)
            if check and not bool(torch.isfinite(out).all()):
                raise self._not_finite(name, out, number)
            if sink is not None:
                sink(number, out, onward)

        self.each(work, range(len(self.batches)) if only is None else only, counted=check)

    def forward(
        self, index: int, layer: nn.Module, states: BatchSource, number: int, tap: Tap | None = None
    ) -> Tensor:
        """A loaded layer over one batch, with or without gradients as the caller has it."""
        return self._outputs(index, layer, states, number, tap)[0]

    def _outputs(
        self, index: int, layer: nn.Module, states: BatchSource, number: int, tap: Tap | None
    ) -> tuple[Tensor, Carry]:
        hidden = states.get(number).to(self.device)
        carry = {
            name: map_tensors(item, lambda tensor: tensor.to(self.device))
            for name, item in states.carried(number).items()
        }
        try:
            with nullcontext() if tap is None else tap(number):
                return self._calls[number][index].run(layer, hidden, carry)
        except QuantError:
            raise
        except Exception as error:  # code of the library, or of the model
            raise self._failed(f"`{self.skeleton.layers[index][0]}`", error) from error

    def each(
        self, work: Callable[[int], T], numbers: Sequence[int], *, counted: bool = True
    ) -> list[T]:
        """The results of `work` for some batches, in their order; each is computed by one thread.

        counted: whether each of them is a step of the present phase.
        """
        stop = threading.Event()

        def one(number: int) -> T:
            if stop.is_set():
                raise CancelledError  # nobody waits for it
            return work(number)

        with one_thread():
            futures = [self._pool.submit(one, number) for number in numbers]
            try:
                return [
                    self._result(future, number, counted=counted)
                    for future, number in zip(futures, numbers, strict=True)
                ]
            except BaseException:
                stop.set()
                wait(futures)
                raise

    def _result(self, future: Future[T], number: int, *, counted: bool) -> T:
        result = future.result()
        if counted and number < self._counted:
            self._step(number)
        return result

    def _step(self, number: int) -> None:
        tokens = self.batches[number].input_ids.numel()
        self.progress.step(number + 1, self._counted, tokens=tokens)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        """The same threads for all layers: new ones would each begin to fill memory of their own."""
        keep_freed_memory()
        return ThreadPoolExecutor(self._workers, "replay", initializer=set_one_thread)

    def _failed(self, who: str, error: Exception) -> QuantError:
        """The error of a layer or a forward: too little memory, or what it said."""
        message = " ".join(str(error).split())[:200]
        if is_out_of_memory(error):
            return too_little_memory(who, error, self.device)
        if fault := machine_fault(error, who, self.skeleton.checkpoint.path):
            return fault
        return InputError(
            f"{who} fails on text: {type(error).__name__}: {message}",
            where=str(self.skeleton.checkpoint.path),
            fix=NO_DATA,
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
        """What the model puts out for every batch, in order: logits [batch, length, vocabulary], or
        logits of classes. If the head has no tensor: hidden states [batch, length, hidden]."""
        return (outputs for (outputs,) in self.endings_of([states]))

    def endings_of(self, variants: Sequence[BatchSource]) -> Iterator[list[Tensor]]:
        """The same for several outputs of the last layer, side by side."""
        with outside(self.skeleton, self._read, self.device), one_thread():
            for number, batch in enumerate(self.batches):
                outputs = []
                for states in variants:
                    final = states.get(number).to(self.device)
                    with self._ending(number), self._outlines[-1].ending(final):
                        outputs.append(self._put_out(batch))
                yield outputs
                if number < self._counted:
                    self._step(number)

    def gradients(
        self, states: BatchSource, of_logits: Callable[[int, Tensor], Tensor], sink: Sink
    ) -> None:
        """Gradients with respect to the outputs of the last layer, of every batch, for `sink`.

        of_logits: gives, for a batch and its logits [batch, length, vocabulary], the gradient with
        respect to these.
        """
        with outside(self.skeleton, self._read, self.device), one_thread():
            for number, batch in enumerate(self.batches):
                final = states.get(number).to(self.device).requires_grad_()
                with self._ending(number), self._outlines[-1].ending(final):
                    logits = self._put_out(batch, differentiable=True)
                (found,) = torch.autograd.grad(logits, [final], of_logits(number, logits.detach()))
                sink(number, found, NOTHING_CARRIED)
                if number < self._counted:
                    self._step(number)

    def _put_out(self, batch: Batch, *, differentiable: bool = False) -> Tensor:
        """InputError if the model's own forward fails behind its layers."""
        model = self.skeleton.model if self.skeleton.head_stored else self.skeleton.model.base_model
        try:
            out = self._forward(batch, model, differentiable=differentiable)
        except QuantError:
            raise
        except Exception as error:  # code of the library, or of the model
            raise self._failed(f"the forward of `{type(model).__name__}`", error) from error
        result: Tensor = out.logits if hasattr(out, "logits") else out[0]
        return result
