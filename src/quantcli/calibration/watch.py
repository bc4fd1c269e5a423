"""Inputs of a layer's matrices, without padding: counted, and shown to observers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn

from quantcli.calibration.flow import Flow, norms_followed
from quantcli.calibration.replay.experts import Experts, before_experts, must_be_rows
from quantcli.calibration.replay.skeleton import Segments
from quantcli.calibration.replay.taps import Listener, Matrices, Matrix, Tap
from quantcli.calibration.text.dataset import Batch
from quantcli.core.errors import InputError
from quantcli.core.threads import Locked
from quantcli.schemes.arithmetic.observers import Observer


class Looker(Protocol):
    """Anything that is shown inputs, such as an observer."""

    def update(self, x: Tensor, batch: int) -> None:
        """x: [tokens, k], no padding. batch: its place in the data."""


Lookers = Mapping[Matrix, Sequence[Looker]]


def joined(lookers: Iterable[Lookers]) -> dict[Matrix, list[Looker]]:
    """All lookers by matrix. Observers of one matrix with one kind of summary share it, so that one of
    them is enough. None has seen anything."""
    tables = list(lookers)
    places = Counter(id(looker) for table in tables for its in table.values() for looker in its)
    first: dict[tuple[Matrix, Hashable], Observer] = {}
    found: dict[Matrix, list[Looker]] = {}
    for matrix, looker in ((m, looker) for table in tables for m in table for looker in table[m]):
        if isinstance(looker, Observer) and places[id(looker)] == 1:
            kind = looker.summary.kind
            other = looker if kind is None else first.setdefault((matrix, kind), looker)
            if other is not looker:
                looker.share(other)
                continue
        found.setdefault(matrix, []).append(looker)
    return found


class Divisible(Protocol):
    """What can see some batches in another process."""

    def part(self) -> Any | None:
        """The same without anything seen, to be sent there; None if that is not possible."""

    def absorb(self, part: Any, /) -> None:
        """Count what a part has seen as seen here, too."""


class Hooks(Divisible, Protocol):
    """What sees more of a layer than the inputs of its matrices."""

    def entered(
        self, name: str, layer: nn.Module, segments: Segments
    ) -> AbstractContextManager[object]:
        """Within it the forward of a loaded layer is seen. name: in the model. segments: weights."""


class Watch(Locked):
    """The observers of a layer's matrices, and the number of tokens of each matrix.

    hooks:  are entered around the pass.
    routed: tokens that the router gave to matrices of experts, if these are shown all tokens.
    """

    def __init__(
        self,
        lookers: Lookers,
        engine: Listener | None = None,
        *,
        counts: bool = False,
        hooks: Sequence[Hooks] = (),
    ) -> None:
        """engine: computes the multiplications, after inputs were shown; None: the layer does. counts:
        whether tokens of matrices without observers count, too."""
        super().__init__()
        self.engine = engine
        self.hooks = hooks
        self.tokens: Counter[Matrix] = Counter()
        self.routed: Counter[Matrix] = Counter()
        self._lookers = lookers
        self._counts = counts

    def count(self, tokens: Counter[Matrix], routed: Counter[Matrix]) -> None:
        """Add the tokens of one batch."""
        with self.lock:
            self.tokens.update(tokens)
            self.routed.update(routed)

    def show(self, matrix: Matrix, x: Tensor, batch: int) -> None:
        """x: [tokens, k], no padding."""
        for looker in self._lookers.get(matrix, ()):
            looker.update(x, batch)

    def part(self) -> Watch | None:
        """The same without anything seen, for another process; None if not all in it can be sent."""
        seeing = [*self._seeing()]
        if self.engine is not None or not all(hasattr(one, "part") for one in seeing):
            return None
        parts = {id(one): one.part() for one in seeing}
        if None in parts.values():
            return None
        lookers = {
            matrix: [parts[id(looker)] for looker in its] for matrix, its in self._lookers.items()
        }
        return Watch(lookers, counts=self._counts, hooks=[parts[id(one)] for one in self.hooks])

    def absorb(self, part: Watch) -> None:
        """Count what a part has seen as seen here, too."""
        for one, other in zip(self._seeing(), part._seeing(), strict=True):
            one.absorb(other)
        self.count(part.tokens, part.routed)

    def _seeing(self) -> Iterable[Any]:
        """All lookers and hooks, each once."""
        lookers = [looker for its in self._lookers.values() for looker in its]
        return {id(one): one for one in [*lookers, *self.hooks]}.values()

    def numbers(self, experts: Experts) -> Iterable[int]:
        """The experts that need to be shown tokens."""
        return experts.matrices if self._counts else experts.with_any(self._lookers.keys())


class _BatchWatch:
    """The listener of one batch, on the thread that runs it."""

    def __init__(self, watch: Watch, number: int, batch: Batch, experts: Collection[str]) -> None:
        """experts: parameters of experts that are shown all tokens, in place of those given to them."""
        self.flow: Flow | None = None  # if there is padding: knows which token a row is
        self.tokens: Counter[Matrix] = Counter()
        self.routed: Counter[Matrix] = Counter()
        self._watch = watch
        self._number = number
        self._mask = batch.mask
        self._experts = experts
        self._everywhere = False
        self._block_tokens: dict[nn.Module, Tensor] = {}  # the last tokens of each module of experts

    @property
    def batch(self) -> tuple[int, Tensor | None]:
        """Its number, and its mask: false for padding."""
        return self._number, self._mask

    def linear(self, matrix: Matrix, x: Tensor, bias: Tensor | None) -> Tensor | None:
        rows = x.reshape(-1, x.shape[-1])
        if self._mask is not None and self.flow is not None and not self._everywhere:
            tokens = self.flow.rows_of(x)
            if tokens is not None:
                rows = rows[self._mask.flatten()[tokens.cpu()].to(rows.device)]
        if self._everywhere == (matrix.parameter in self._experts):
            self.tokens[matrix] += len(rows)
            self._watch.show(matrix, rows, self._number)
        elif not self._everywhere:
            self.routed[matrix] += len(rows)
        engine = self._watch.engine
        return None if engine is None else engine.linear(matrix, x, bias)

    def everywhere(self, experts: Experts, tokens: Tensor) -> None:
        """Show all tokens [n, k] to experts. InputError if these are others than the batch's."""
        if self._everywhere:
            return  # within a block that is run again
        self._block_tokens[experts.host] = tokens
        if self._mask is not None:
            mask = self._mask.flatten().to(tokens.device)
            if len(mask) != len(tokens):
                raise InputError(
                    f"experts are given {len(tokens)} tokens of a batch of {len(mask)}",
                    where="calibration.all_tokens",
                    fix="set calibration.all_tokens to false",
                )
            tokens = tokens[mask]
        self._everywhere = True
        try:
            experts.run(tokens, self._watch.numbers(experts))
        finally:
            self._everywhere = False

    def check(self, experts: Experts, rows: Tensor) -> None:
        """InputError if an expert is given rows [n, k] on its own that are not among the tokens."""
        if not self._everywhere:
            must_be_rows(experts, rows, self._block_tokens[experts.host])


_listening: ContextVar[_BatchWatch | None] = ContextVar("listening", default=None)


def current_batch() -> tuple[int, Tensor | None] | None:
    """The number and the mask [batch, length] of the batch that this thread runs within `watched`."""
    listener = _listening.get()
    return None if listener is None else listener.batch


@contextmanager
def watched(
    watch: Watch, matrices: Matrices, number: int, batch: Batch, experts: Collection[str] = ()
) -> Iterator[None]:
    """Within it `watch` sees the matrix multiplications of a batch's forward on this thread.

    experts: parameters that are shown all tokens within `layer_watched`.
    """
    listener = _BatchWatch(watch, number, batch, experts)
    if batch.mask is None:
        tap = Tap(matrices, listener)
    else:
        tap = listener.flow = Flow(matrices, listener, batch.input_ids.numel())
    token = _listening.set(listener)
    try:
        with tap:
            yield
    finally:
        _listening.reset(token)
    watch.count(listener.tokens, listener.routed)


@contextmanager
def layer_watched(
    name: str, layer: nn.Module, batches: Sequence[Batch], experts: Sequence[Experts] = ()
) -> Iterator[None]:
    """Around all batches: norms are followed if a batch has padding. experts: to show all tokens."""
    with ExitStack() as stack:
        if any(batch.mask is not None for batch in batches):
            stack.enter_context(norms_followed(name, layer))
        stack.enter_context(before_experts(experts, _show_all, _check))
        yield


def _show_all(experts: Experts, tokens: Tensor) -> None:
    listener = _listening.get()
    if listener is not None:
        listener.everywhere(experts, tokens)


def _check(experts: Experts, rows: Tensor) -> None:
    listener = _listening.get()
    if listener is not None:
        listener.check(experts, rows)
