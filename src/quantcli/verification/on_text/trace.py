"""One module on text: what comes in, what goes out, and where the error comes from.

With the float weight W and input x as the scheme's codes meet them (divided by smoothing, transformed),
the stored weight Q, and `engine` for the engine's product, whose inputs are rounded:

    engine(x') - x W = (x' - x) W          earlier modules: x' is the input with all their errors
                     + x (Q - W)           weights, on float inputs
                     + engine(x) - x Q     inputs: their rounding, as the stored weights show it

The first line holds but for products of errors. A weight beyond the largest code of its group is
clipped: the error of cutting it off there is `clipping`, the rest is `rounding`; likewise inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantcli.calibration.replay.served import Forward, Served, decibels
from quantcli.checkpoint.spec import FLOATS
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.errors import InputError, one_of
from quantcli.core.events import Progress
from quantcli.core.numerics import Parts, multiplier
from quantcli.core.threads import one_thread
from quantcli.schemes.arithmetic import elements, kronecker
from quantcli.schemes.arithmetic.fp4 import LARGEST as LARGEST_FP4
from quantcli.schemes.base import Scheme
from quantcli.schemes.transformed import Transformed
from quantcli.targets.base import StoredCheckpoint
from quantcli.verification.compare import (
    UNLIKE,
    FittedFactors,
    Pair,
    Weight,
    compare,
    opener,
    shape_of,
)
from quantcli.verification.edits import candidates, choose, fit, text_of
from quantcli.verification.on_text.corpus import Corpus
from quantcli.verification.on_text.reports import SourceReport, TraceReport, WorstReport
from quantcli.verification.on_text.tokens import Texts
from quantcli.verification.reference import Reference
from quantcli.verification.structure import layer_of

_WORST = 5
_E4M3 = 448.0
EARLIER, WEIGHTS, INPUTS = "earlier modules", "weights", "inputs"
_PARTS = ("clipping", "rounding")
_NORMS = (".weight", ".gamma")


@dataclass
class _Sums:
    """Squares of one error of the outputs, in all and by channel."""

    total: float = 0.0
    channels: Tensor | None = None  # float64 [n]

    def add(self, error: Tensor) -> None:
        by_channel = error.double().square().sum(0)
        self.total += float(by_channel.sum())
        self.channels = by_channel if self.channels is None else self.channels + by_channel


@dataclass(frozen=True)
class _Weights:
    """A module's weight in both models, as codes meet it: [n, k] each.

    stored: codes times scales. exact, cut: the float weight, and the same without what no code reaches;
    None if it is not known.
    factors: how the float one was multiplied.
    """

    scheme: Scheme
    parts: Parts
    stored: Tensor
    exact: Tensor | None
    cut: Tensor | None
    factors: FittedFactors | None


def check_modules(stored: StoredCheckpoint, modules: Sequence[str]) -> None:
    """InputError for a module that is not a quantized one of the checkpoint."""
    for module in modules:
        if module not in stored.modules:
            what = f"`{module}` is not a quantized module of the checkpoint"
            fix = one_of(module, sorted(stored.modules))
            raise InputError(what, where=f"--layer {module}", fix=fix)


def layers_of(modules: Sequence[str], model: Forward) -> dict[str, int]:
    """The layer of each module, by its number. InputError for one that is in none."""
    found = {}
    for module in modules:
        layers = range(len(model.skeleton.layers))
        index = next((index for index in layers if model.place(index, module)), None)
        if index is None:
            what = f"`{module}` is outside of the decoder layers, which alone are traced"
            raise InputError(what, where=f"--layer {module}", fix="name a module of a layer")
        found[module] = index
    return found


class Tracer:
    """Traces modules, each before its layer runs.

    reports: of those whose layers were there.
    """

    def __init__(self, served: Served, reference: Reference, corpus: Corpus, texts: Texts) -> None:
        """texts: of several sequences of token ids."""
        self.reports: list[TraceReport] = []
        self._served = served
        self._reference = reference
        self._corpus = corpus
        self._texts = texts
        self._layers: dict[str, int] = {}

    def find(self, modules: Sequence[str], model: Forward) -> None:
        """Trace these modules from here on. InputError for one that is not in a decoder layer."""
        self._layers = layers_of(modules, model)

    def layer(self, index: int, expected: Forward, actual: Forward, progress: Progress) -> None:
        """Trace the modules of a layer that both models run next.

        InputError for one that the other model does not have.
        """
        for module in (module for module, layer in self._layers.items() if layer == index):
            progress.phase(f"tracing {module}")
            other, own = expected.place(index, module), actual.place(index, module)
            if other is None or own is None:
                raise InputError(
                    "the module is not a matrix of both models",
                    where=f"--layer {module}",
                    fix="give --against the model that the checkpoint was made from",
                )
            found, weights = _Found(), None
            pairs = zip(expected.inputs(index, other[0]), actual.inputs(index, own[0]), strict=True)
            for (x, _), (x_own, all_bias) in pairs:
                bias = None if all_bias is None else all_bias[own[1]].float()
                with one_thread():
                    weights = weights or self._weights(module, bias)
                    found.add(weights, x, x_own, bias)
            assert weights is not None  # there are batches
            self.reports.append(self._report(module, weights, found))

    def _weights(self, module: str, bias: Tensor | None) -> _Weights:
        quantized = self._served.quantizer(module, torch.empty(0), bias)
        assert quantized is not None  # see check_modules
        scheme, parts = quantized
        stored = _dequantized(scheme, parts)
        factors, unlike = _edits(self._served, self._reference, module)
        if unlike:
            return _Weights(scheme, parts, stored, None, None, None)
        weight = _whole(self._reference.weight(module))
        if factors is not None:
            weight = weight * factors.rows.unsqueeze(1) * factors.columns
        exact = scheme.to_round(weight, _with_inverses(parts))
        return _Weights(scheme, parts, stored, exact, _cut(scheme, parts, exact), factors)

    def _report(self, module: str, weights: _Weights, found: _Found) -> TraceReport:
        stored = self._served.modules[module]

        def level(name: str) -> float | None:
            sums = found.errors.get(name)
            return None if sums is None else round(decibels(found.signal.total, sums.total), 3)

        names = [EARLIER]
        for side in (WEIGHTS, INPUTS):
            names += [side, *(f"{side}: {part}" for part in _PARTS)]
        levels = {name: level(name) for name in names}
        return TraceReport(
            module=module,
            label=stored.layout.label,
            numerics=str(weights.scheme.numerics),
            edited=None if weights.factors is None else text_of(weights.factors),
            tokens=found.tokens,
            input_db=found.input_db,
            output_db=level("all"),
            alone_db=level("alone"),
            sources=[SourceReport(name, db) for name, db in levels.items() if db is not None],
            worst_outputs=found.worst_outputs(),
            worst_inputs=found.worst_inputs(weights),
            worst_tokens=found.worst_tokens(self._corpus, self._texts),
        )


@dataclass
class _Found:
    """Sums over all batches."""

    tokens: int = 0
    same_tokens: bool = True
    signal: _Sums = field(default_factory=_Sums)
    errors: dict[str, _Sums] = field(default_factory=dict)
    by_token: list[Tensor] = field(default_factory=list)  # float64 [2, tokens]: signal, error
    incoming: list[float] = field(default_factory=lambda: [0.0, 0.0])
    square: Tensor | None = None  # of float inputs by channel, float64 [k]

    def add(self, weights: _Weights, x: Tensor, x_own: Tensor, bias: Tensor | None) -> None:
        """Inputs of a batch in the other model and in the checkpoint: [tokens, k] each."""
        scheme, parts, stored = weights.scheme, weights.parts, weights.stored
        if weights.factors is not None:
            x = x.float() / weights.factors.columns
        self.tokens += len(x)
        self.same_tokens &= x.shape == x_own.shape
        read = scheme.as_read(x, parts)
        squares = read.double().square().sum(0)
        self.square = squares if self.square is None else self.square + squares
        product = F.linear(read, stored, bias)
        alone = scheme.forward(x, parts, bias).float()
        inputs = alone - product
        self._add(INPUTS, inputs)
        limits = input_limits(scheme, parts, read)
        if limits is not None:
            clipped = F.linear(read.clamp(*limits) - read, stored)
            self._add(f"{INPUTS}: clipping", clipped)
            self._add(f"{INPUTS}: rounding", inputs - clipped)
        if weights.exact is None:
            self.signal.add(product)
            return
        exact = F.linear(read, weights.exact, bias)
        self.signal.add(exact)
        self._add("alone", alone - exact)
        self._add(WEIGHTS, F.linear(read, stored - weights.exact))
        if weights.cut is not None:
            self._add(f"{WEIGHTS}: clipping", F.linear(read, weights.cut - weights.exact))
            self._add(f"{WEIGHTS}: rounding", F.linear(read, stored - weights.cut))
        if not self.same_tokens:
            return
        arrived = scheme.as_read(x_own, parts) - read
        self.incoming[0] += float(squares.sum())
        self.incoming[1] += float(arrived.double().square().sum())
        self._add(EARLIER, F.linear(arrived, weights.exact))
        everything = scheme.forward(x_own, parts, bias).float() - exact
        self._add("all", everything)
        sides = [each.double().square().sum(1) for each in (exact, everything)]
        self.by_token.append(torch.stack(sides))

    def _add(self, name: str, error: Tensor) -> None:
        self.errors.setdefault(name, _Sums()).add(error)

    @property
    def input_db(self) -> float | None:
        """SQNR of the inputs; None if the models read other tokens."""
        if not self.same_tokens or EARLIER not in self.errors:
            return None
        return round(decibels(*self.incoming), 3)

    def worst_outputs(self) -> list[WorstReport]:
        """Channels with the largest error, on the other model's inputs."""
        sums = self.errors.get("alone")
        if sums is None or sums.channels is None or self.signal.channels is None:
            return []
        return _worst(self.signal.channels, sums.channels)

    def worst_inputs(self, weights: _Weights) -> list[WorstReport]:
        """Channels whose weights bring in the largest error, as if channels went alone."""
        if weights.exact is None or self.square is None:
            return []
        columns = [
            weight.double().square().sum(0)
            for weight in (weights.exact, weights.stored - weights.exact)
        ]
        return _worst(self.square * columns[0], self.square * columns[1])

    def worst_tokens(self, corpus: Corpus, texts: Texts) -> list[WorstReport]:
        """Tokens with the largest error, if the module reads every token once."""
        ids = torch.cat([batch.input_ids.flatten() for batch in corpus.batches])
        signal, error = torch.cat(self.by_token, 1) if self.by_token else torch.zeros(2, 0)
        if not self.same_tokens or len(error) != len(ids):
            return []
        worst = _worst(signal, error)
        words = texts([[int(ids[each.number])] for each in worst])
        length = corpus.batches[0].input_ids.shape[1]
        return [
            WorstReport(each.number, each.sqnr_db, each.share, text[:80], each.number // length)
            for each, text in zip(worst, words, strict=True)
        ]


def _worst(signal: Tensor, error: Tensor) -> list[WorstReport]:
    """The numbers with the largest errors, largest first; equal ones in their order."""
    order = torch.sort(error, descending=True, stable=True).indices[:_WORST].tolist()
    total = float(error.sum())
    return [
        WorstReport(
            place,
            round(decibels(float(signal[place]), float(error[place])), 3),
            round(float(error[place]) / total, 6),
        )
        for place in order
        if total and float(error[place]) > 0
    ]


def _dequantized(scheme: Scheme, parts: Parts) -> Tensor:
    """Codes times scales: float32 [n, k], transformed if inputs are."""
    if isinstance(scheme, Transformed):
        return super(Transformed, scheme).dequantize(parts)
    return scheme.dequantize(parts)


def _with_inverses(parts: Parts) -> dict[str, Tensor]:
    """Parts, and the inverses of transforms among them, as `to_round` takes them."""
    inverses = {
        f"{side}_inverse": kronecker.inverse(parts[f"{side}_trans"], f"{side}_trans")
        for side in ("left", "right")
        if f"{side}_trans" in parts
    }
    return {**parts, **inverses}


def _cut(scheme: Scheme, parts: Parts, exact: Tensor) -> Tensor | None:
    """The float weight without what the codes of its groups do not reach."""
    element, codes = scheme.numerics.weight.element, parts["weight"]
    ends = []
    for number in (element.least, element.largest):
        if element.per_byte > 1:
            whole = elements.encode(torch.full(exact.shape, number), element)
        else:
            whole = torch.full(codes.shape, number).to(codes.dtype)
        ends.append(_dequantized(scheme, {**parts, "weight": whole}))
    low, high = torch.minimum(*ends), torch.maximum(*ends)  # a scale may be negative
    return torch.minimum(torch.maximum(exact, low), high)


def input_limits(scheme: Scheme, parts: Parts, read: Tensor) -> tuple[Any, Any] | None:
    """The smallest and the largest input that is not clipped, numbers or float32 [tokens, 1].

    None if the scheme's way to clip is not known. read: [tokens, k], as codes meet it.
    """
    operand = scheme.numerics.input
    if operand is None or "float_inputs" in parts:
        return -math.inf, math.inf
    element = operand.element
    if "input_scale" in parts and not operand.dynamic:
        if element.family == "int":
            offset = float(parts.get("input_offset", torch.zeros(1)))
            steps = float(multiplier(parts["input_scale"]))
            return (element.least - offset) / steps, (element.largest - offset) / steps
        scale = float(parts["input_scale"])
        return element.least * scale, element.largest * scale
    if "input_global_scale" in parts:
        largest = LARGEST_FP4 * _E4M3 * float(parts["input_global_scale"])
        return -largest, largest
    amax = read.abs().amax(-1, keepdim=True)
    if "clip_ratio" in parts:
        amax = amax * parts["clip_ratio"].float()
        return -amax, amax
    return None if operand.scale == "e8m0" else (-amax, amax)


def _edits(served: Served, reference: Reference, module: str) -> tuple[FittedFactors | None, bool]:
    """How the weight of a module was multiplied; None if it was not. And whether it is another weight
    than the other model's, even so."""
    tensors, others = served.checkpoint.tensors, reference.checkpoint.tensors
    layer = layer_of(f"{module}.weight")
    changed = {}
    for name in tensors:
        if layer is None or not name.startswith(f"{layer}.") or not name.endswith(_NORMS):
            continue
        before, after = others.get(name), tensors[name]
        if before is None or len(after.spec.shape) != 1:
            continue
        if {before.spec.dtype, after.spec.dtype} <= FLOATS:
            pair = read_tensor(before), read_tensor(after)
            if pair[0].shape == pair[1].shape and not torch.equal(pair[0].float(), pair[1].float()):
                changed[name] = pair
    pair_of = Pair.of(reference.weight(module), served.modules[module])
    plain = compare(pair_of).sqnr_db
    fitted = fit(pair_of, choose([pair_of], candidates(changed)))
    if not fitted.trivial:
        better = compare(pair_of, fitted).sqnr_db
        if better > plain and (changed or plain < UNLIKE):
            return fitted, better < UNLIKE
    return None, plain < UNLIKE


def _whole(weight: Weight) -> Tensor:
    """A stored weight of the other model: float32 [n, k]."""
    with opener(weight)() as rows:
        return rows.weight(0, shape_of(weight)[0]).float()
