"""Places of rotations in a model: stored tensors that read its residual stream, or add to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from quantcli.calibration.channels import LayerLayout, Producer, shape_of
from quantcli.calibration.flow import Flow, norms_followed
from quantcli.calibration.replay.calls import NOTHING_CARRIED, Call, Handed, Table
from quantcli.calibration.replay.skeleton import Skeleton
from quantcli.calibration.replay.taps import Matrices
from quantcli.calibration.rotation.probe import Probe
from quantcli.calibration.rotation.proof import HeadPair, Turn, keeps_layer, keeps_outside
from quantcli.calibration.rotation.stream import Trace, Uses, reflections
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.rotation.places import Heads, Norm, Places
from quantcli.core.errors import InputError
from quantcli.core.threads import one_thread
from quantcli.sources.stacked import split_experts

_FIX = "leave `rotate.residual` out; heads can have rotations all the same"
_SEEDS = (0, 1)  # near ties of a router may fall otherwise once, by float32


def find_places(
    checkpoint: Checkpoint, *, trust_remote_code: bool = False, residual: bool = True
) -> Places:
    """The places of a decoder, see `trace`."""
    return trace(checkpoint, trust_remote_code=trust_remote_code, residual=residual).places


def trace(checkpoint: Checkpoint, *, trust_remote_code: bool = False, residual: bool = True) -> Traced:
    """The places of a decoder, found and proved with random weights: none of its own are read.

    residual: whether the stream is to be rotated; else only heads are looked for. One layer of each
    kind runs: layers of one class, shapes and settings have one flow. Memory: two copies of a layer in
    float32, of which experts share the weights.

    Raises InputError with the reason if the stream cannot be rotated, or if transformers cannot build
    the model.
    """
    with one_thread():
        return _Search(checkpoint, trust_remote_code=trust_remote_code).traced(residual=residual)


@dataclass(frozen=True)
class Traced:
    """What a rotation concerns, by names in the model; `places` by names in the checkpoint.

    readers: matrices, with the norm before each. norms: their offsets. pairs: values and outputs.
    """

    places: Places
    readers: Mapping[str, str | None]
    norms: Mapping[str, int]
    writers: frozenset[str]
    pairs: tuple[HeadPair, ...]


class _Search:
    def __init__(self, checkpoint: Checkpoint, *, trust_remote_code: bool) -> None:
        self._checkpoint = split_experts(checkpoint)
        self._skeleton = Skeleton(self._checkpoint, "F32", trust_remote_code=trust_remote_code)
        self._probe = Probe(self._skeleton)
        hidden, self._calls = self._probe.begin()
        self._hidden = self._probe.hidden = hidden.shape[-1]
        self._carried = any(_handed(call) for call in self._calls)

    def traced(self, *, residual: bool) -> Traced:
        """The places, proved; InputError for a stream that cannot be rotated."""
        if residual:
            self._check_whole()
        uses = self._follow() if residual else Uses()
        if uses.fault is not None:
            raise self._refusal(*uses.fault)
        everywhere = self._spread(uses)
        pairs = [] if self._carried else [*self._pairs()]
        fault = self._fault(everywhere, pairs, residual=residual)
        if fault is not None and pairs:
            pairs = []
            fault = self._fault(everywhere, pairs, residual=residual)
        if fault is not None:
            raise self._refusal(fault, "does not give rotated outputs for rotated hidden states")
        return Traced(
            self._stored(everywhere, pairs),
            everywhere.readers,
            everywhere.offsets,
            frozenset(everywhere.writers),
            tuple(pairs),
        )

    def _refusal(self, where: str, what: str) -> InputError:
        return InputError(
            f"the residual stream cannot be rotated: `{where}` {what}",
            where=str(self._checkpoint.path),
            fix=_FIX,
        )

    def _check_whole(self) -> None:
        """InputError for a model with parts that text alone does not show."""
        if len(self._skeleton.stacks) > 1:
            raise self._refusal(type(self._skeleton.model).__name__, "has an encoder and a decoder")
        tensors = self._checkpoint.tensors
        for name in self._skeleton.unused:
            if name in tensors and len(tensors[name].spec.shape) > 1:
                raise self._refusal(
                    name, "is a part that transformers does not build, such as a draft layer"
                )

    # -- flow ------------------------------------------------------------------------------------

    def _kinds(self) -> list[int]:
        """The first layer of each kind; all layers if they hand on more than hidden states."""
        if self._carried:
            return [*range(len(self._calls))]
        first: dict[Any, int] = {}
        for index, (_, layer) in enumerate(self._skeleton.layers):
            first.setdefault(_kind(layer), index)
        return [*first.values()]

    def _follow(self) -> Uses:
        """The ways of the stream in one layer of each kind, and outside of the layers."""
        probe, model = self._probe, self._skeleton.model
        trace = Trace(self._hidden)
        with trace.watching("", model), trace:
            hidden, _ = probe.begin(seen=trace)
            trace.ends(hidden, self._embedding_name())
            carry = NOTHING_CARRIED
            for index in self._kinds():
                name = self._skeleton.layers[index][0]
                states = probe.states(index, self._hidden)
                trace.begin(states)
                with probe.layer(index, seen=trace) as layer:
                    out, carry = probe.run(index, self._calls[index], layer, states, carry)
                trace.ends(out, name)
            final = probe.states(-1, self._hidden)
            trace.begin(final)
            probe.end(final, seen=trace)
        unseen = [
            name
            for name, _ in model.named_parameters(remove_duplicate=False)
            if not self._skeleton.in_stack(name)
            and name not in probe.used
            and self._skeleton.outside(name) is not None
        ]
        if unseen:
            trace.uses.refuse(unseen[0], "is a part of the model that text does not reach")
        return trace.uses

    def _embedding_name(self) -> str:
        """The module whose outputs are the first hidden states, as far as the model tells it."""
        modules = self._skeleton.model.named_modules()
        own = self._skeleton.embedding
        return next((name for name, module in modules if module is own), "the embedding")

    def _spread(self, uses: Uses) -> Uses:
        """The same for all layers: what is so in one is so in its like, for each of its experts."""
        if self._carried:
            return uses
        spread = Uses(embeddings=uses.embeddings, offsets={}, fault=uses.fault)
        like: dict[Any, list[int]] = {}
        for index, (_, layer) in enumerate(self._skeleton.layers):
            like.setdefault(_kind(layer), []).append(index)

        def names(parameter: str) -> Iterator[tuple[str, str]]:
            """A parameter, or its like in another layer and of other experts, with the layer's name."""
            index = next(
                (
                    indices[0]
                    for indices in like.values()
                    if parameter.startswith(f"{self._skeleton.layers[indices[0]][0]}.")
                ),
                None,
            )
            if index is None:
                yield parameter, ""
                return
            first, layer = self._skeleton.layers[index]
            local = parameter.removeprefix(f"{first}.")
            alike = [n for n, _ in _members(layer) if shape_of(f".{n}") == shape_of(f".{local}")]
            for other in like[_kind(layer)]:
                for own in alike:
                    yield f"{self._skeleton.layers[other][0]}.{own}", self._skeleton.layers[other][0]

        def moved(norm: str | None, layer: str) -> str | None:
            if norm is None or not layer:
                return norm
            for name, _ in self._skeleton.layers:
                if norm.startswith(f"{name}."):
                    return layer + norm.removeprefix(name)
            return norm

        for parameter, norm in uses.readers.items():
            spread.readers |= {name: moved(norm, layer) for name, layer in names(parameter)}
        for kind in ("writers", "biases"):
            for parameter in getattr(uses, kind):
                getattr(spread, kind).update(dict.fromkeys(name for name, _ in names(parameter)))
        for norm, offset in uses.offsets.items():
            spread.offsets |= {name: offset for name, _ in names(norm)}
        return spread

    def _pairs(self) -> Iterator[HeadPair]:
        """Values and outputs of attention in every layer."""
        found: dict[Any, tuple[str, list[HeadPair]]] = {}
        for index, (name, layer) in enumerate(self._skeleton.layers):
            kind = _kind(layer)
            if kind not in found:
                found[kind] = name, [*self._pairs_of(index)]
            first, pairs = found[kind]
            for pair in pairs:
                values, output = (name + p.removeprefix(first) for p in (pair.values, pair.output))
                yield replace(pair, values=values, output=output)

    def _pairs_of(self, index: int) -> Iterator[HeadPair]:
        probe, (name, _) = self._probe, self._skeleton.layers[index]
        segments = self._skeleton.segments(index)
        with probe.layer(index) as layer:
            samples, length = probe.tokens
            matrices = Matrices(name, layer, self._skeleton.transposed(index))
            flow = Flow(matrices, None, samples * length)
            with norms_followed(name, layer), flow:
                probe.run(index, self._calls[index], layer, probe.states(index, self._hidden))
        for producer in LayerLayout(segments, flow).producers():
            pair = _pair(producer)
            if pair is not None:
                yield pair

    # -- proof -----------------------------------------------------------------------------------

    def _fault(self, uses: Uses, pairs: list[HeadPair], *, residual: bool) -> str | None:
        """The first part that does not keep the function; None if all of them do."""
        faults: list[str | None] = []
        for seed in _SEEDS:
            probe = Probe(self._skeleton, seed)
            probe.begin()
            probe.hidden = self._hidden
            faults.append(self._fault_of(self._turn(probe, uses, pairs, residual=residual)))
            if faults[-1] is None:
                return None
        return faults[0]

    def _turn(self, probe: Probe, uses: Uses, pairs: list[HeadPair], *, residual: bool) -> Turn:
        turned_over = [self._skeleton.transposed(index) for index in range(len(self._calls))]
        norms = {f"{norm}.weight": offset for norm, offset in uses.offsets.items()}
        return Turn(
            probe,
            reflections(self._hidden, probe.seed) if residual else None,
            {name: None if norm is None else f"{norm}.weight" for name, norm in uses.readers.items()},
            norms,
            frozenset(uses.writers),
            frozenset([*uses.embeddings, *uses.biases]),
            pairs,
            frozenset().union(*turned_over),
        )

    def _fault_of(self, turn: Turn) -> str | None:
        if turn.vectors is not None and (what := keeps_outside(turn)) is not None:
            return what
        carries = NOTHING_CARRIED, NOTHING_CARRIED
        for index in self._kinds():
            kept, *carries_now = keeps_layer(turn, index, self._calls[index], *carries)
            carries = carries_now[0], carries_now[1]
            if not kept:
                return self._skeleton.layers[index][0]
        return None

    # -- names in the checkpoint -----------------------------------------------------------------

    def _stored(self, uses: Uses, pairs: list[HeadPair]) -> Places:
        norms = {
            name: Norm(self._vector(f"{name}.weight"), offset) for name, offset in uses.offsets.items()
        }
        tables = {name: self._table(name) for name in uses.embeddings}
        readers: dict[str, Norm | None] = {}
        head, tied = None, False
        for parameter, norm in uses.readers.items():
            folded = None if norm is None else norms[norm]
            for stored in self._weights(parameter):
                if self._of_head(parameter):
                    head, tied = stored, stored in tables.values()
                    if tied:  # the name that a tensor of its own would have
                        stored = head = self._head_name()
                readers[stored] = folded
        used = {norm.name for norm in readers.values() if norm is not None}
        return Places(
            hidden=self._hidden,
            embeddings=tuple(tables.values()),
            readers=readers,
            writers=tuple(w for name in uses.writers for w in self._weights(name, whole=True)),
            biases=tuple(self._vector(name) for name in uses.biases),
            norms=tuple(norm for norm in norms.values() if norm.name in used),
            heads=tuple(self._heads(pair) for pair in pairs),
            head=head,
            tied=tied,
        )

    def _heads(self, pair: HeadPair) -> Heads:
        (values, first), (output, _) = self._module(pair.values), self._module(pair.output)
        rows = tuple(row - first for row in pair.rows)
        return Heads(values, rows, output, pair.heads, pair.head_dim)

    def _module(self, parameter: str) -> tuple[str, int]:
        ((segment,),) = self._segments(parameter)
        return segment.module, segment.start

    def _segments(self, parameter: str) -> Any:
        index = next(
            i for i, (name, _) in enumerate(self._skeleton.layers) if parameter.startswith(f"{name}.")
        )
        return self._skeleton.segments(index).get(parameter, [])

    def _weights(self, parameter: str, *, whole: bool = False) -> list[str]:
        """The stored weights that a matrix is made of; whole: of which each has all its rows."""
        if not self._skeleton.in_stack(parameter):
            return [self._table(parameter)]
        experts = self._segments(parameter)
        names = [f"{segment.module}.weight" for segments in experts for segment in segments]
        if not names or any(name not in self._checkpoint.tensors for name in names):
            raise self._refusal(parameter, "is stored in a form that has no rows of a linear")
        if whole and any(len(segments) > 1 for segments in experts):
            raise self._refusal(parameter, "adds to the hidden states, and is stored in parts")
        return names

    def _table(self, parameter: str) -> str:
        group = self._skeleton.outside(parameter)
        if group is None or group.renamed is None:
            raise self._refusal(parameter, "is stored in another form")
        return group.renamed.spec.name

    def _vector(self, parameter: str) -> str:
        stored = self._skeleton.source(parameter)
        if stored is None:
            raise self._refusal(parameter, "is stored in another form")
        return stored

    def _head_name(self) -> str:
        """The weight of the output matrix, as the model names it."""
        (head,) = self._skeleton.head
        modules = self._skeleton.model.named_modules()
        return next(f"{name}.weight" for name, module in modules if module is head)

    def _of_head(self, parameter: str) -> bool:
        path = parameter.rpartition(".")[0]
        return any(
            module is head
            for name, module in self._skeleton.model.named_modules()
            if name == path
            for head in self._skeleton.head
        )


def _pair(producer: Producer) -> HeadPair | None:
    """Values and output of attention, if that is what a producer and its reader are."""
    width = producer.head_width
    if producer.matrix is None or not width or len(producer.readers) != 1:
        return None
    (reader,) = producer.readers
    if len(reader.channels) % width:
        return None
    blocks = reader.channels.view(-1, width)
    starts = blocks[:, 0].tolist()
    if not bool((blocks == blocks[:, :1] + blocks.new_tensor(range(width))).all()):
        return None
    rows = [start for number, start in enumerate(starts) if start not in starts[:number]]
    if len(starts) % len(rows):
        return None
    if starts != [row for row in rows for _ in range(len(starts) // len(rows))]:
        return None
    return HeadPair(producer.matrix.parameter, tuple(rows), reader.matrix.parameter, len(starts), width)


def _members(layer: nn.Module) -> Iterable[tuple[str, Any]]:
    """Parameters and modules of a layer by their names in it."""
    yield from layer.named_parameters()
    yield from layer.named_modules()


def _kind(layer: nn.Module) -> Any:
    """What layers with one flow have in common: classes, shapes, and settings of all modules."""
    return tuple(
        (
            name,
            type(module).__name__,
            tuple((key, tuple(p.shape)) for key, p in module._parameters.items() if p is not None),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if isinstance(value, (int, float, str)) and key not in {"layer_idx", "layer_id"}
            ),
        )
        for name, module in layer.named_modules()
    )


def _handed(call: Call) -> bool:
    """Whether a layer is given something of earlier layers next to hidden states."""
    values: Mapping[Any, Any] = {**dict(enumerate(call.args)), **call.kwargs}
    return bool(call.outputs) or any(
        isinstance(value, Table) or any(isinstance(part, Handed) for part in _parts(value))
        for value in values.values()
    )


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _parts(part)
    else:
        yield value
