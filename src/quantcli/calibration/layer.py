"""One decoder layer's part of a calibration: the methods in their order, see `methods/base`.

The layer is run several times: on a few tokens, to see which matrix reads which channels; on all
samples for what methods need, their observers together; and, if later layers are given quantized
inputs, on all samples with the engine's arithmetic. If they are given float inputs, these are outputs
of the layer before any edit, from the first time that all samples pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor

from quantcli.calibration.channels import LayerLayout
from quantcli.calibration.flow import Flow, norms_followed
from quantcli.calibration.loaded import CalibrationRun, LoadedLayer
from quantcli.calibration.methods.base import LayerWork
from quantcli.calibration.replay.replay import Sink
from quantcli.calibration.replay.taps import Matrix, Tap
from quantcli.calibration.report import LayerReport, ModuleReport
from quantcli.calibration.shown import quantized, running
from quantcli.calibration.store import pack_edits
from quantcli.calibration.watch import Looker, Watch
from quantcli.core.errors import InputError
from quantcli.core.numerics import NO_STATS
from quantcli.planning.measured import EditFactors


@dataclass
class LayerRun:
    """A layer, its inputs, and its statistics."""

    layer: LoadedLayer

    def __post_init__(self) -> None:
        self.report = LayerReport(self.layer.name)

    @property
    def run(self) -> CalibrationRun:
        """The calibration that the layer is part of."""
        return self.layer.run

    def measure(self, sink: Sink | None) -> dict[str, Tensor]:
        """Statistics and edits by their names in the store; `sink` takes the layer's outputs: those of
        the stored weights, or by `inputs: quantized` and `running` those of the engine's arithmetic.

        Raises InputError for NaN or Inf, for siblings with different inputs that the engine gives one
        scale, and for modules without tokens if the recipe says so.
        """
        as_stored = self.run.policy.inputs == "float"
        if as_stored:
            self.layer.outputs.sink = sink
        with ExitStack() as stack:
            self.run.progress.phase("loading", passes=0)
            stack.enter_context(self.layer.loaded({}))
            layout = self._look()
            self._check_siblings(layout)
            work = LayerWork(self.layer, layout, {}, {}, self.report)
            for method in self.run.methods:
                before = dict(work.edits)
                method.edit(work)
                if _changed(before, work.edits):
                    if self.layer.outputs.sink is not None:
                        self.layer.watch(Watch({}), None)
                    stack.close()
                    stack.enter_context(self.layer.loaded(work.edits))
            self._measure(work, None if as_stored else sink)
        stored = self.run.skeleton.checkpoint.tensors
        edits = {name: factors for name, factors in work.edits.items() if name in stored}
        vectors, self.report.edits = pack_edits(edits)
        return vectors | {
            f"stats.{module}.{name}": tensor
            for module, module_stats in work.stats.items()
            for name, tensor in module_stats.items()
        }

    def _look(self) -> LayerLayout:
        """Run a few tokens and follow their tensors."""
        layer, ids = self.layer, self.run.probe.input_ids
        flow = Flow(layer.matrices(), None, ids.numel())
        probe = [len(self.run.batches)]
        with norms_followed(layer.name, layer.module):
            self.run.replay.run(
                layer.index, layer.module, layer.states, tap=lambda _: flow, only=probe, check=False
            )
        together = [block for block in layer.experts_everywhere if block.together]
        return LayerLayout(layer.segments, flow, [block.parameters for block in together])

    def _check_siblings(self, layout: LayerLayout) -> None:
        leaders = layout.leaders()
        first: dict[str, tuple[str, Matrix]] = {}
        for matrix, segments in layout.matrices():
            for module in (s.module for s in segments):
                policy = self.run.policy
                group = policy.siblings.group(module)
                if group is None or matrix not in leaders or not policy.measures(module):
                    continue
                other, leader = first.setdefault(group, (module, leaders[matrix]))
                if leader != leaders[matrix] and not policy.joins(module):
                    given = policy.siblings.given_to(module)
                    raise InputError(
                        f"{'`siblings` groups' if given else 'the engine merges'} `{module}` and "
                        f"`{other}`, with one input scale or transform for both, and they have "
                        "different inputs",
                        where=policy.quantized[module].rule,
                        fix="give them a scheme with dynamic inputs, such as w8a8_dynamic",
                    )

    def _measure(self, work: LayerWork, sink: Sink | None) -> None:
        """All that methods do after edits. `sink` takes the outputs that later layers are given."""
        measurements = [m for method in self.run.methods if (m := method.measure(work)) is not None]
        lookers: dict[Matrix, list[Looker]] = defaultdict(list)
        for measurement in measurements:
            for matrix, its_observers in measurement.observers().items():
                lookers[matrix] += its_observers
        inputs, engine = self.run.policy.inputs, None
        if inputs == "running":
            engine = self.layer.engine(running(self.run.policy, self.layer.whole(work.edits)))
        watch = Watch(lookers, engine, counts=True)
        as_quantized = inputs == "quantized" and sink is not None
        self.run.progress.phase("measuring")
        with ExitStack() as stack:
            for measurement in measurements:
                stack.enter_context(measurement.passing())
            self.layer.watch(watch, None if as_quantized else sink)
        for measurement in measurements:
            measurement.settle()
        everywhere = {name for block in self.layer.experts_everywhere for name in block.parameters}
        for matrix, segments in work.layout.matrices():
            for module in (segment.module for segment in segments):
                tensors = work.stats.get(module, NO_STATS).items()
                numbers = {name: float(tensor) for name, tensor in tensors if tensor.shape == (1,)}
                routed = watch.routed[matrix] if matrix.parameter in everywhere else None
                self.report.modules[module] = ModuleReport(watch.tokens[matrix], numbers, routed=routed)
        for measurement in measurements:
            measurement.choose()
        for measurement in measurements:
            measurement.review()
        if as_quantized:
            self._run_quantized(work, sink)

    def _run_quantized(self, work: LayerWork, sink: Sink | None) -> None:
        self.run.progress.phase("running quantized")
        whole = self.layer.whole(work.edits)
        engine = self.layer.engine(quantized(self.run.policy, work.stats, whole))
        matrices = self.layer.matrices()
        self.layer.forward(sink, lambda _: Tap(matrices, engine))


def _changed(before: Mapping[str, EditFactors], after: Mapping[str, EditFactors]) -> bool:
    return any(before.get(name) is not factors for name, factors in after.items())
