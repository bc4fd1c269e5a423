"""Ranges of inputs, by the observers of schemes, and mean squares of inputs for clips.

Siblings with one scheme that read the same input share one observer; those that a recipe groups share
stats, whatever they read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch

from quantcli.calibration.methods.base import LayerWork, Measurement, Method
from quantcli.calibration.methods.donors import donors_of
from quantcli.calibration.policy import Policy, not_finite, unreached
from quantcli.calibration.replay.taps import Matrix
from quantcli.checkpoint.spec import torch_dtype
from quantcli.core.numerics import NO_STATS
from quantcli.schemes.arithmetic.observers import ChannelSquare, Observer
from quantcli.schemes.base import Scheme


class Ranges(Method):
    """The stats of a scheme's observer, and `input_square`, if the scheme clips by inputs."""

    name: ClassVar[str] = "ranges"
    for_schemes: ClassVar[bool] = True
    results: ClassVar[tuple[str, ...]] = ("ranges", "clips")
    divisible: ClassVar[bool] = True

    def uses(self, scheme: Scheme) -> Collection[str]:
        """Either or both."""
        clips = ["clips"] if scheme.clips_by_inputs else []
        return ["ranges", *clips] if _observes(scheme) else clips

    def must_be_reached(self, scheme: Scheme) -> bool:
        """Only clips can do without tokens."""
        return _observes(scheme)

    def measured(self, scheme: Scheme, weight_dtype: str, input_dtype: str) -> Any:
        """What its observer measures, and whether clips need more."""
        observes = scheme.observed(torch_dtype(input_dtype)) if _observes(scheme) else None
        return {"observer": observes, "clips": scheme.clips_by_inputs}

    def measure(self, work: LayerWork) -> Measurement:
        """One pass over the samples."""
        return RangesPass(work)


def _observes(scheme: Scheme) -> bool:
    return scheme.observer(torch.bfloat16) is not None


class RangesPass(Measurement):
    """The observers of a layer."""

    def __init__(self, work: LayerWork) -> None:
        self._work = work
        self._shared: dict[Matrix, dict[Scheme, Observer]] = defaultdict(dict)
        self._observers: dict[str, Observer] = {}
        self._squares: dict[Matrix, Observer] = {}
        self._squares_of: dict[str, Observer] = {}
        policy, leaders = work.run.policy, work.layout.leaders()
        for matrix, segments in work.layout.matrices():
            leader = leaders.get(matrix, matrix)
            for module in (segment.module for segment in segments):
                observer = policy.observer(module)
                if observer is not None:  # siblings with one scheme share one observer
                    scheme = policy.quantized[module].scheme
                    self._observers[module] = self._shared[leader].setdefault(scheme, observer)
                if policy.weighs_inputs(module):
                    square = self._squares.setdefault(leader, Observer(ChannelSquare()))
                    self._squares_of[module] = square

    def observers(self) -> Mapping[Matrix, Sequence[Observer]]:
        """One or two for each input."""
        observers: dict[Matrix, list[Observer]] = defaultdict(list)
        for matrix, by_scheme in self._shared.items():
            observers[matrix] += by_scheme.values()
        for matrix, square in self._squares.items():
            observers[matrix].append(square)
        return observers

    def settle(self) -> None:
        """Add the stats of all modules. InputError for NaN or Inf, and for modules that no token
        reached, if the recipe says so."""
        self._finite(self._observers)
        fill_in(self._work, join(self._work.run.policy, self._observers))
        self._finite(self._squares_of)
        stats, squares = self._work.stats, dict(self._squares_of)
        reached = {module for module, square in squares.items() if square.tokens}
        for module, others in donors_of(self._work, squares.keys() - reached, reached).items():
            squares[module] = Observer(ChannelSquare())
            for other in dict.fromkeys(self._squares_of[name] for name in others):
                squares[module].absorb(other)
        for module, square in squares.items():
            if square.tokens:
                stats[module] = {**stats.get(module, NO_STATS), **square.stats()}

    def _finite(self, observers: Mapping[str, Observer]) -> None:
        for module, observer in observers.items():
            if not observer.finite:
                raise not_finite(module, str(self._work.run.skeleton.checkpoint.path))


def join(policy: Policy, observers: Mapping[str, Observer]) -> dict[str, Observer]:
    """The observers of modules, one for each group of siblings that a recipe makes: it has seen the
    inputs of all of them."""
    groups: dict[str, list[str]] = defaultdict(list)
    for module in observers:
        name = policy.siblings.group(module)
        if name is not None and policy.joins(module):
            groups[name].append(module)
    joined = dict(observers)
    for modules in groups.values():
        union = policy.observer(modules[0])
        assert union is not None
        for other in dict.fromkeys(observers[module] for module in modules):
            union.absorb(other)
        joined |= dict.fromkeys(modules, union)
    return joined


def fill_in(work: LayerWork, observers: Mapping[str, Observer]) -> None:
    """Add the stats of every module's observer; modules that saw no token follow the recipe's policy.

    InputError if that is `error`, or if none of its like has seen one.
    """
    policy = work.run.policy
    stats_of = {o: o.stats() for o in dict.fromkeys(observers.values()) if o.tokens}  # once if shared
    stats = {module: stats_of[o] for module, o in observers.items() if o in stats_of}
    empty = sorted(observers.keys() - stats.keys())
    work.report.uncalibrated = empty
    donors = donors_of(work, empty, stats.keys())
    missing = [module for module in empty if module not in donors]
    if missing and policy.uncalibrated != "dynamic":
        raise unreached(missing, policy.quantized[missing[0]].rule)
    for module, others in donors.items():
        union = policy.observer(module)
        assert union is not None
        for other in dict.fromkeys(observers[name] for name in others):
            union.absorb(other)
        stats[module] = union.stats()
    work.stats |= stats
