"""One decoder layer's part of a calibration: the methods in their order, see `methods/base`.

The layer is run several times: on a few tokens, to see which matrix reads which channels; on all
samples for what methods need, their observers together; and, if later layers are given quantized
inputs, on all samples with the engine's arithmetic. If they are given float inputs, these are outputs
of the stored weights, before any edit.

So recipes with `inputs: float` see the same inputs in every layer, and work on it together: those that
edit nothing are measured while the layer's outputs are made; those with the same edits in one pass.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor

from quantcli.calibration.channels import LayerLayout
from quantcli.calibration.flow import Flow, norms_followed
from quantcli.calibration.loaded import CalibrationRun, LoadedLayer, Question, ask
from quantcli.calibration.methods.base import LayerWork, Measurement
from quantcli.calibration.replay.replay import Sink
from quantcli.calibration.replay.taps import Matrix
from quantcli.calibration.report import LayerReport, ModuleReport
from quantcli.calibration.shown import running
from quantcli.calibration.store import pack_edits
from quantcli.calibration.watch import Lookers, Watch, joined
from quantcli.core.errors import InputError
from quantcli.core.numerics import NO_STATS
from quantcli.core.threads import one_thread
from quantcli.planning.measured import EditFactors

Save = Callable[["LayerRun", dict[str, Tensor]], None]


def measure_layer(layer: LoadedLayer, runs: Sequence[LayerRun], sink: Sink | None, save: Save) -> None:
    """Measure a layer for some recipes. `save` takes each of them once it is finished, with its
    statistics and edits by their names in the store; all outputs of the layer were put before.

    runs: of this layer and its inputs; with `inputs: quantized` or `running` just one, else any number.
    sink: takes the outputs: those of the stored weights, or of the engine's arithmetic.

    Raises InputError for NaN or Inf, for siblings with different inputs that the engine gives one
    scale, and for modules without tokens if a recipe says so.
    """
    as_stored = layer.run.policy.inputs == "float"
    assert as_stored or len(runs) == 1
    with ExitStack() as stack:
        layer.run.progress.phase("loading", passes=0)
        stack.enter_context(layer.loaded({}))
        if runs:
            layout = _look(layer)
            for run in runs:
                run.begin(layout)
        groups: dict[str | None, list[LayerRun]] = defaultdict(list)  # by what they edit
        for run in runs:
            groups[run.run.edits if run.edits or not as_stored else None].append(run)
        if as_stored:
            firsts = [alike[0] for edits, alike in groups.items() if edits is not None]
            _measure_as_stored(layer, groups.pop(None, []), firsts, sink, save)
        edited = False
        for alike in groups.values():
            if edited:
                stack.close()
                stack.enter_context(layer.loaded({}))
            edited = alike[0].edit(stack)
            for other in alike[1:]:
                other.edit_as(alike[0])
            _measure(alike, None if as_stored else sink, save)


def _measure_as_stored(
    layer: LoadedLayer,
    runs: Sequence[LayerRun],
    editing: Sequence[LayerRun],
    sink: Sink | None,
    save: Save,
) -> None:
    """The passes before any edit: of `runs`, which edit nothing, of what the edits of others look at,
    and of the outputs."""
    leaders = editing[0].work.layout.leaders() if editing else {}
    extra = ask([(run.layer, run.asked()) for run in editing], leaders)
    if runs:
        _measure(runs, sink, save, extra)
    elif extra or sink is not None:
        layer.run.progress.phase("running")
        layer.watch(Watch(extra), sink)


def _measure(
    runs: Sequence[LayerRun], sink: Sink | None, save: Save, extra: Lookers | None = None
) -> None:
    """Measure and finish some recipes on the loaded weights, in one pass if they can share it; `sink`
    and `extra` lookers get the first one."""
    for run in runs:
        run.prepare()
    own = [run for run in runs[1:] if run.alone]
    together = [run for run in runs if run not in own]
    for sharing in (together, *([run] for run in own)):
        sharing[0].pass_samples(sharing, sink, extra or {})
        sink = extra = None
        for run in sharing:
            run.finish()
            save(run, run.tensors())


def _look(layer: LoadedLayer) -> LayerLayout:
    """Run a few tokens and follow their tensors."""
    run, ids = layer.run, layer.run.probe.input_ids
    flow = Flow(layer.matrices(), None, ids.numel())
    probe = [len(run.batches)]
    with norms_followed(layer.name, layer.module):
        run.replay.run(
            layer.index, layer.module, layer.states, tap=lambda _: flow, only=probe, check=False
        )
    together = [block for block in layer.experts_everywhere if block.together]
    return LayerLayout(layer.segments, flow, [block.parameters for block in together])


@dataclass(eq=False)  # one is not another with equal options
class LayerRun:
    """A layer, its inputs, and its statistics for one recipe."""

    layer: LoadedLayer

    def __post_init__(self) -> None:
        self.report = LayerReport(self.layer.name)
        self.work: LayerWork
        self._measurements: list[Measurement] = []
        self._watch = Watch({})
        self._sink: Sink | None = None  # of quantized outputs

    @property
    def run(self) -> CalibrationRun:
        """The calibration that the layer is part of."""
        return self.layer.run

    def measure(self, sink: Sink | None) -> dict[str, Tensor]:
        """The same as `measure_layer` for this recipe alone: its statistics and edits."""
        found: dict[str, Tensor] = {}
        measure_layer(self.layer, [self], sink, lambda _, tensors: found.update(tensors))
        return found

    @property
    def edits(self) -> bool:
        """Whether a method may edit weights of this layer."""
        policy, modules = self.run.policy, self.layer.modules
        return any(method.edits and method.has_work(modules, policy) for method in self.run.methods)

    @property
    def alone(self) -> bool:
        """Whether it needs a pass of its own: what is entered around one can be entered once."""
        return any(measurement.hooks() for measurement in self._measurements)

    def begin(self, layout: LayerLayout) -> None:
        """The layer is loaded, and its data flow is known."""
        self._check_siblings(layout)
        self.work = LayerWork(self.layer, layout, {}, {}, self.report)

    def asked(self) -> list[Question]:
        """What the first method that edits will look at, before it does."""
        first = next(method for method in self.run.methods if method.edits)
        return [*first.asked(self.work)]

    def edit(self, stack: ExitStack) -> bool:
        """Let all methods edit; whether there are edits. `stack` holds the loaded layer."""
        work, edited = self.work, False
        for method in self.run.methods:
            before = dict(work.edits)
            method.edit(work)
            if _changed(before, work.edits):
                edited = True
                self.layer.seen.clear()
                stack.close()
                stack.enter_context(self.layer.loaded(work.edits))
        return edited

    def edit_as(self, other: LayerRun) -> None:
        """Take the edits of a recipe that makes the same, and the stats that came with them."""
        self.work.edits |= other.work.edits
        self.work.stats |= other.work.stats
        self.report.results |= copy.deepcopy(other.report.results)
        self.report.note = other.report.note

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

    def prepare(self) -> None:
        """All edits are made: ask methods what they measure."""
        found = (method.measure(self.work) for method in self.run.methods)
        self._measurements = [measurement for measurement in found if measurement is not None]

    def pass_samples(self, runs: Sequence[LayerRun], sink: Sink | None, extra: Lookers) -> None:
        """One pass over the samples for this recipe and others. `sink` takes the outputs that later
        layers are given; `extra` lookers see inputs, too."""
        measurements = [m for run in runs for m in run._measurements]
        lookers = joined([*(m.observers() for m in measurements), extra])
        engine = None
        if self.run.policy.inputs == "running":
            engine = self.layer.engine(running(self.run.policy, self.layer.whole(self.work.edits)))
        hooks = [hook for measurement in measurements for hook in measurement.hooks()]
        watch = Watch(lookers, engine, counts=True, hooks=hooks)
        self.run.progress.phase("measuring")
        self.layer.watch(watch, None if self.run.policy.inputs == "quantized" else sink)
        for run in runs:
            run._watch = watch
        if self.run.policy.inputs == "quantized":
            self._sink = sink

    def finish(self) -> None:
        """All samples have passed: statistics and the report."""
        work, watch = self.work, self._watch
        with one_thread():  # of small tensors, which several threads would only wait for
            for measurement in self._measurements:
                measurement.settle()
        everywhere = {name for block in self.layer.experts_everywhere for name in block.parameters}
        for matrix, segments in work.layout.matrices():
            for module in (segment.module for segment in segments):
                tensors = work.stats.get(module, NO_STATS).items()
                numbers = {name: float(tensor) for name, tensor in tensors if tensor.shape == (1,)}
                routed = watch.routed[matrix] if matrix.parameter in everywhere else None
                self.report.modules[module] = ModuleReport(watch.tokens[matrix], numbers, routed=routed)
        for measurement in self._measurements:
            measurement.choose()
        for measurement in self._measurements:
            measurement.review()
        if self._sink is not None:
            self._run_quantized(self._sink)

    def tensors(self) -> dict[str, Tensor]:
        """Statistics and edits by their names in the store; the report gets the places of edits."""
        stored = self.run.skeleton.checkpoint.tensors
        edits = {name: factors for name, factors in self.work.edits.items() if name in stored}
        vectors, self.report.edits = pack_edits(edits)
        return vectors | {
            f"stats.{module}.{name}": tensor
            for module, module_stats in self.work.stats.items()
            for name, tensor in module_stats.items()
        }

    def _run_quantized(self, sink: Sink) -> None:
        self.run.progress.phase("running quantized")
        self.layer.run_quantized(self.work.stats, self.work.edits, sink)


def _changed(before: Mapping[str, EditFactors], after: Mapping[str, EditFactors]) -> bool:
    return any(before.get(name) is not factors for name, factors in after.items())
