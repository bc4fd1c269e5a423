"""The passes of a layer, shared by processes: each runs some batches, and what has seen them is merged.

The methods work here, with a layer that is loaded here too. Hidden states are files, which all
processes see. What observers keep does not depend on the order of batches, or keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantcli.calibration.loaded import CalibrationRun, LoadedLayer
from quantcli.calibration.spread.crew import Crew, Steps, shares_of
from quantcli.calibration.spread.worker import Pass, make_pass
from quantcli.calibration.watch import Watch
from quantcli.core.numerics import Stats
from quantcli.planning.measured import EditFactors


class SharedPasses:
    """Passes over all samples, by a crew. See `loaded.OtherProcesses`."""

    def __init__(self, crew: Crew) -> None:
        self.edits: Mapping[str, EditFactors] = {}
        self.recipes: Sequence[CalibrationRun] = ()  # in the order in which the crew has their plans
        self._crew = crew

    def watch(self, layer: LoadedLayer, watch: Watch, *, onward: bool) -> bool:
        """Make a pass, unless `watch` cannot be sent to other processes."""
        if watch.part() is None:
            layer.run.progress.detail(
                f"{layer.name}: this pass is made here, since not all that it shows can be sent"
            )
            return False
        for seen in self._pass(layer, watch, {}, self.edits, onward=onward):
            assert seen is not None
            watch.absorb(seen)
        return True

    def run_quantized(
        self, layer: LoadedLayer, stats: Mapping[str, Stats], edits: Mapping[str, EditFactors]
    ) -> None:
        """Write the layer's outputs with the engine's arithmetic."""
        self._pass(layer, None, stats, edits, onward=True)

    def _pass(
        self,
        layer: LoadedLayer,
        watch: Watch | None,
        stats: Mapping[str, Stats],
        edits: Mapping[str, EditFactors],
        *,
        onward: bool,
    ) -> list[Watch | None]:
        samples = len(layer.run.batches)
        recipe = next(n for n, run in enumerate(self.recipes) if run.policy is layer.run.policy)
        # the probe, behind the samples, is run for its outputs
        requests = [
            Pass(layer.index, recipe, batches, edits, watch and watch.part(), stats, onward)
            for batches in shares_of(samples + onward, self._crew)
        ]
        progress = Steps(layer.run.progress, samples)
        return self._crew.run(make_pass, requests, noun="pass", progress=progress)
