"""The interface of a calibration method: it edits float weights, observes inputs, decides statistics.

A method is one file in this folder, and registered by standing here. `layer.py` runs all methods of a
calibration on one decoder layer at a time, in the order of `methods_of`:

1. `edit` of each method, on weights that have the edits of the methods before it;
2. `measure` of each method, on weights with all edits: its observers see one pass over the samples
   together with those of the others; then `settle`, `choose`, `review`, each of all methods in turn.

All results must be the same bits for any number of workers: threads run batches, in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from quantcli.calibration.channels import LayerLayout
from quantcli.calibration.loaded import CalibrationRun, LoadedLayer
from quantcli.calibration.policy import Policy
from quantcli.calibration.replay.taps import Matrix
from quantcli.calibration.report import LayerReport
from quantcli.calibration.watch import Hooks, Looker
from quantcli.core.numerics import Stats
from quantcli.planning.measured import EditFactors
from quantcli.planning.plan import Plan
from quantcli.recipe.methods import MethodOptions
from quantcli.schemes.arithmetic.observers import Summary
from quantcli.schemes.base import Scheme


@dataclass
class LayerWork:
    """A decoder layer while methods work on it.

    layer:  its module is loaded, with `edits` as they were when the method was called.
    layout: data flow in it: what reads what, and channels that can be scaled.
    edits:  by stored tensor; `LoadedLayer.divide` adds those that keep the layer's function.
    stats:  by module, for its scheme and for the store.
    report: for the store. A method adds to `results`, and in `measure` to `modules`.
    """

    layer: LoadedLayer
    layout: LayerLayout
    edits: dict[str, EditFactors]
    stats: dict[str, Stats]
    report: LayerReport

    @property
    def run(self) -> CalibrationRun:
        """The calibration that the layer is part of."""
        return self.layer.run


class Measurement:
    """What a method does with a layer once all edits are made. Here nothing."""

    def observers(self) -> Mapping[Matrix, Sequence[Looker]]:
        """What is to be shown the inputs of matrices, by matrix."""
        return {}

    def hooks(self) -> Sequence[Hooks]:
        """What is to see more of the layer than the inputs of matrices in this pass."""
        return ()

    def settle(self) -> None:
        """All samples have passed: add stats that the observers give."""

    def choose(self) -> None:
        """The stats of all observers are there, and the reports of modules: add what depends on them.
        May run samples through the layer again."""

    def review(self) -> None:
        """All stats are there: report on them."""


class Method(MethodOptions):
    """A calibration method. Its fields are its options.

    Methods for schemes (`for_schemes`) work on modules whose scheme names them in `Scheme.methods`.

    hidden_states:  how many more copies of a layer's hidden states it holds, within the memory limit.
    divisible:      whether all that it does with samples is passes of `Measurement` and of the layer's
                     `channel_amax` and `channel_square`, which processes can share.
    by_schemes:     whether its edits depend on schemes, and not just on which modules are quantized.
    by_layer:       whether its stats of a module depend on the schemes of others in the layer.
    against_running: why it does not go together with `inputs: running`, after a module's name, and what
                     to change instead; None if it does.
    """

    hidden_states: ClassVar[int] = 0
    divisible: ClassVar[bool] = False
    by_schemes: ClassVar[bool] = True
    by_layer: ClassVar[bool] = False
    against_running: ClassVar[tuple[str, str] | None] = None

    def has_work(self, modules: Sequence[str], policy: Policy) -> bool:
        """Whether it has work in a layer with these modules."""
        schemes = filter(None, map(policy.scheme, modules))
        return any(self.name in scheme.methods or not self.for_schemes for scheme in schemes)

    def passes(self, modules: Sequence[str], policy: Policy) -> float:
        """How often it runs all samples through a layer with these modules, or an equal amount of work,
        next to the one pass of all methods. For the time that is left; need not be exact."""
        return 0.0

    def must_be_reached(self, scheme: Scheme) -> bool:
        """Whether a module whose scheme names this method cannot do without tokens."""
        return True

    def measured(self, scheme: Scheme, weight_dtype: str, input_dtype: str) -> Any:
        """All that decides its stats of a module with this scheme, next to the model, the text and the
        edits: JSON-able. Calibrations serve each recipe that wants no more than they have.

        weight_dtype, input_dtype: in which the engine holds scales, as in "BF16".
        """
        return [scheme.name, scheme.model_dump(mode="json"), weight_dtype, input_dtype]

    def batch_tokens(self, schemes: Sequence[Scheme], length: int) -> int | None:
        """The most tokens that a batch may have, for samples of `length` tokens; None: any number."""
        return None

    def nbytes(self, weights: Sequence[tuple[Scheme, int]]) -> int:
        """Bytes of memory next to a layer and its hidden states, at most.

        weights: the scheme of each quantized weight [n, k], and k.
        """
        return 0

    def worker_nbytes(self, weights: Sequence[tuple[Scheme, int]]) -> int:
        """Bytes of memory for each thread that runs batches of BATCH_TOKENS, at most.

        weights: of one layer, likewise.
        """
        return 0

    @property
    def edits(self) -> bool:
        """Whether it may edit weights."""
        return type(self).edit is not Method.edit

    def asked(self, work: LayerWork) -> Iterable[tuple[Matrix, type[Summary]]]:
        """The channels that `edit` will look at, if no method before it edits: `LoadedLayer` then finds
        them in a pass that serves all methods and recipes, and makes none of its own."""
        return ()

    def edit(self, work: LayerWork) -> None:
        """Add edits of float weights to `work.edits`, and stats that were found on the way.

        The layer is loaded again if there are new ones. May run samples through it.
        """

    def measure(self, work: LayerWork) -> Measurement | None:
        """What there is to do in a layer after all edits; None: nothing."""
        return None


def methods_of(plan: Plan) -> tuple[Method, ...]:
    """The methods of a plan's calibration, in their order."""
    methods = []
    for method in plan.methods:
        assert isinstance(method, Method)
        methods.append(method)
    return tuple(methods)
