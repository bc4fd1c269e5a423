"""Choose the codes of a layer's weights by their inputs, if the recipe says so.

If layers are given quantized inputs, weights are rounded in the order of data flow (q, k, v, then o,
then gate and up, then down), each on the outputs of the rounded ones before it, with the engine's
arithmetic. If they are given float inputs, the order does not matter, and one pass is enough.

If a scheme also rounds inputs (`as_rounded`), their errors count, too: outputs of codes and rounded
inputs are brought near to those of the weight and inputs before rounding.

Memory: the sums of products of as many inputs at a time as fit HESSIANS_NBYTES, at least one, 4 k^2
bytes each; 12 k^2 for the widest while it is factorized; for each worker the inputs of a batch, up to
INPUTS_NBYTES; the codes of a layer; blocks of rows. A layer with more runs over the samples again: 256
experts that read 4096 inputs each take 16 runs, or one if all of them are shown the same tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantcli.calibration.channels import shape_of
from quantcli.calibration.memory import BATCH_TOKENS
from quantcli.calibration.methods import offsets
from quantcli.calibration.methods.base import LayerWork, Measurement, Method
from quantcli.calibration.methods.donors import donors_of
from quantcli.calibration.methods.hessians import (
    HESSIANS_NBYTES,
    INPUTS_NBYTES,
    Hessian,
    InputRounding,
    Inputs,
    add,
    fitting,
    jobs,
)
from quantcli.calibration.methods.offsets import RoundedRows
from quantcli.calibration.policy import Policy, not_finite
from quantcli.calibration.replay.engine import Arithmetic, EngineLinears
from quantcli.calibration.replay.skeleton import Segment
from quantcli.calibration.replay.taps import Matrix
from quantcli.calibration.shown import quantized
from quantcli.calibration.watch import Watch
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import torch_dtype
from quantcli.checkpoint.tensors import read_span
from quantcli.core.errors import InputError
from quantcli.core.exact import exact_device
from quantcli.core.numerics import NO_STATS, Parts
from quantcli.schemes.arithmetic import tiles
from quantcli.schemes.arithmetic.gptq import Descent, Each, Feedback, Rounded, gptq, squares
from quantcli.schemes.base import Scheme
from quantcli.schemes.by_data import Gptq, Learned, RoundedWeights, RoundingOptions

_ROWS = 1024  # that one job rounds
_COLLECTING, _ROUNDING = 1.0, 1.0  # see `Method.passes`
_ALL = -1  # in place of an expert's number: all experts that tokens reached
_UNREACHED = "no token reached it"
_SINGULAR = "its inputs are linearly dependent beyond damping"
# what decides codes, next to options: calibrations of another one are not used
_ALGORITHM = "gptq with sweeps"


@dataclass(frozen=True)
class _Objective:
    """hessian: products of inputs, float32 [k, k]. feedback: None if that cannot be factorized. toward:
    the factor [k, k] that corrects weights for rounded inputs; None if inputs are not rounded.
    options: with which the feedback was made."""

    hessian: Tensor
    feedback: Feedback | None
    toward: Tensor | None
    options: RoundingOptions


def _options(scheme: Scheme) -> RoundingOptions:
    """Those of a scheme; the usual ones, with its own scales, of one that has none."""
    found = scheme.rounding_options if isinstance(scheme, RoundedWeights) else None
    return found or Gptq(name="gptq", ranges="kept")


def _to_scale(scheme: Scheme, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    return scheme.to_scale(dtype) if isinstance(scheme, RoundedWeights) else None


class Rounding(Method):
    """The codes of schemes that are rounded by data (`Scheme.rounded_by_data`)."""

    name: ClassVar[str] = "rounding"
    for_schemes: ClassVar[bool] = True
    results: ClassVar[tuple[str, ...]] = ("codes",)
    hidden_states: ClassVar[int] = 1  # outputs of the float layer, if rounding is learned
    against_running: ClassVar[tuple[str, str] | None] = ("is rounded by data", "weight_rounding")

    def uses(self, scheme: Scheme) -> Collection[str]:
        """Not those of learned transforms, which are one result with their codes."""
        return super().uses(scheme) if scheme.schedule is None else ()

    def measured(self, scheme: Scheme, weight_dtype: str, input_dtype: str) -> Any:
        """Also all options of GPTQ, as they are meant now."""
        options = _options(scheme).model_dump(mode="json")
        return [*super().measured(scheme, weight_dtype, input_dtype), _ALGORITHM, options]

    def nbytes(self, weights: Sequence[tuple[Scheme, int]]) -> int:
        """As the module says. If inputs are rounded, there are two sums, and weights are corrected for
        it: 24 k^2 for the widest in place of 12 k^2."""
        schemes = {scheme for scheme, _ in weights if self.name in scheme.methods}
        squares = [k * k for scheme, k in weights if scheme in schemes]
        widest = max(squares, default=0)
        sums = max(4 * widest, min(HESSIANS_NBYTES, 4 * sum(squares)))
        learned = any(scheme.schedule for scheme in schemes)
        return (24 if learned else 12) * widest + (2 if learned else 1) * sums

    def worker_nbytes(self, weights: Sequence[tuple[Scheme, int]]) -> int:
        """Inputs of a batch."""
        widths = [k for scheme, k in weights if self.name in scheme.methods]
        kept = 4 * BATCH_TOKENS * sum(widths)
        return max(min(kept, INPUTS_NBYTES), 4 * BATCH_TOKENS * max(widths, default=0))

    def passes(self, modules: Sequence[str], policy: Policy) -> float:
        """One for the inputs, and rounding takes about as long."""
        return _COLLECTING + _ROUNDING if self.has_work(modules, policy) else 0.0

    def measure(self, work: LayerWork) -> RoundingPass:
        """Round all modules, once their other stats are there."""
        return RoundingPass(work)


class RoundingPass(Measurement):
    """A loaded layer whose codes are chosen: stats of its modules, and errors in their reports."""

    def __init__(self, work: LayerWork) -> None:
        self.work = work
        self.layer, self.layout, self.run = work.layer, work.layout, work.run
        self.edits, self.stats, self.reports = work.edits, work.stats, work.report.modules
        self._whole = work.layer.whole(work.edits)
        self._left: set[str] = set()  # not rounded yet
        # the matrices whose inputs a leader stands for, if these are others than its own
        self._sources: dict[Matrix, list[Matrix]] = {}

    def choose(self) -> None:
        """Round all modules that are rounded by data; then some learn. InputError for NaN and Inf."""
        self._round_layer()
        self._learn()

    def _round_layer(self) -> None:
        for module in self.layout.modules(m for m, _ in self.layout.matrices()):
            if self._by_data(module) and not self._inputs_seen(module):
                self._rounded_to_nearest(module, _UNREACHED)
        groups = list(self._groups())
        self._left = {m for group in groups for modules in group.values() for m in modules}
        share, progress = 1 / max(1, sum(map(len, groups))), self.run.progress
        with self._jobs() as (adding, each):
            for group in groups:
                engine = self._engine()
                for leaders in fitting(group, self._inputs_of, self._tokens_of):
                    progress.phase("inputs", passes=_COLLECTING * share * len(leaders))
                    hessians = self._collect(group, leaders, engine, adding)
                    progress.phase("rounding", passes=_ROUNDING * share * len(leaders))
                    modules = sum(len(group[leader]) for leader in leaders)
                    done = 0
                    for leader in leaders:
                        self._round_all(group[leader], hessians.pop(leader), each)
                        done += len(group[leader])
                        progress.step(done, modules, noun="module")
                self._left.difference_update(*group.values())

    @contextmanager
    def _jobs(self) -> Iterator[tuple[Each, Each]]:
        """Runners of jobs where layers run, and where float64 is computed."""
        workers, device = self.run.workers, self.run.device
        with jobs(workers, device) as here:
            if exact_device(device) == device:
                yield here, here
                return
            with jobs(workers, exact_device(device)) as there:
                yield here, there

    def _rounded_to_nearest(self, module: str, why: str) -> None:
        self.reports[module].remarks["rounded_to_nearest"] = why

    def review(self) -> None:
        """A message for each reason why weights are rounded to nearest instead of by data."""
        reasons: dict[str, list[str]] = {}
        for module, report in sorted(self.reports.items()):
            if why := report.remarks.get("rounded_to_nearest"):
                reasons.setdefault(why, []).append(module)
        for why, modules in sorted(reasons.items()):
            more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
            names = ", ".join(f"`{module}`" for module in modules[:3])
            self.work.report.messages.append(f"rounded to nearest, as {why}: {names}{more}")

    def _groups(self) -> Iterator[dict[Matrix, list[str]]]:
        """Modules to round by the matrix that stands for their input; groups in data's order."""
        leaders = self.layout.leaders()
        modules_of: dict[Matrix, list[str]] = defaultdict(list)
        stand_ins = self._stand_ins(leaders)
        for matrix, segments in self.layout.matrices():
            for module in dict.fromkeys(s.module for s in segments):
                if self._wants_codes(module):
                    leader = stand_ins.get(module, leaders.get(matrix, matrix))
                    modules_of[leader].append(module)
        options = [_options(self._scheme(m)) for modules in modules_of.values() for m in modules]
        if self.run.policy.inputs == "float" or not any(o.true_sequential for o in options):
            if modules_of:
                yield modules_of
            return
        places: dict[str, int] = {}
        for leader in leaders.values():
            places.setdefault(shape_of(leader.parameter), len(places))
        by_place: dict[int, dict[Matrix, list[str]]] = defaultdict(dict)
        for leader, modules in modules_of.items():
            by_place[places.get(shape_of(leader.parameter), len(places))][leader] = modules
        yield from (by_place[place] for place in sorted(by_place))

    def _stand_ins(self, leaders: Mapping[Matrix, Matrix]) -> dict[str, Matrix]:
        """The leader of each module that no token reached and that is rounded by inputs of others."""
        inputs = {
            module: leaders.get(matrix, matrix)
            for matrix, segments in self.layout.matrices()
            for module in (s.module for s in segments)
            if self._wants_codes(module)
        }
        reached = {module for module in inputs if self.reports[module].tokens}
        stand_ins = {}
        for module, others in donors_of(self.work, inputs.keys() - reached, reached).items():
            sources = sorted({inputs[name] for name in others}, key=lambda m: (m.parameter, m.expert))
            stand_ins[module] = sources[0]
            if len(sources) > 1:
                stand_ins[module] = Matrix(sources[0].parameter, _ALL)
                self._sources[stand_ins[module]] = sources
        return stand_ins

    def _wants_codes(self, module: str) -> bool:
        """Whether a module's codes are chosen here."""
        return self._by_data(module) and self._inputs_seen(module)

    def _by_data(self, module: str) -> bool:
        """Whether a recipe wants a module's codes chosen. If its range is missing, it gets another
        scheme."""
        scheme = self.run.policy.scheme(module)
        measured = module in self.stats or not self.run.policy.measures(module)
        return scheme is not None and scheme.rounded_by_data and measured

    def _inputs_seen(self, module: str) -> bool:
        """Whether a quantized module has all that its scheme's clips need."""
        stats = self.stats.get(module, NO_STATS)
        return self.run.policy.scheme_with(module, stats) is self._scheme(module)

    def _inputs_of(self, modules: Sequence[str]) -> int:
        return self._stored(modules[0]).spec.shape[1]

    def _tokens_of(self, leader: Matrix) -> float:
        """Tokens that are kept of a batch, on average."""
        tokens = 0
        for source in self._sources.get(leader, [leader]):
            modules = self.layout.modules([source])
            tokens += max((self.reports[module].tokens for module in modules), default=0)
        return tokens / len(self.run.batches)

    def _scheme(self, module: str) -> Scheme:
        return self.run.policy.quantized[module].scheme

    def _stored(self, module: str) -> StoredTensor:
        return self.run.skeleton.checkpoint.tensors[f"{module}.weight"]

    # -- inputs ----------------------------------------------------------------------------------

    def _engine(self) -> EngineLinears | None:
        """The engine's arithmetic for all modules but those that are still to be rounded here."""
        if self.run.policy.inputs == "float":
            return None
        base = quantized(self.run.policy, self.stats, self._whole)

        def quantizer(
            module: str, rows: Tensor, bias: Tensor | None
        ) -> tuple[Arithmetic, Parts] | None:
            return None if module in self._left else base(module, rows, bias)

        return self.layer.engine(quantizer)

    def _rounding(self, modules: Sequence[str]) -> InputRounding | None:
        """The rounding of the input that some modules share; None if its errors do not count."""
        scheme = self._scheme(modules[0])
        if scheme.schedule is None or any(self._scheme(module) != scheme for module in modules):
            return None
        input_dtype = self.run.policy.quantized[modules[0]].input_dtype
        constants = scheme.constants(self.stats[modules[0]], input_dtype)

        def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
            quantized = scheme.as_rounded(x, constants)
            read = scheme.as_read(x, constants)
            return read, read if quantized is None else quantized

        return rounded

    def _collect(
        self,
        group: Mapping[Matrix, Sequence[str]],
        leaders: Mapping[Matrix, int],
        engine: EngineLinears | None,
        each: Each,
    ) -> dict[Matrix, Hessian]:
        """Show all batches, as many at a time as there are workers."""
        hessians = {
            leader: Hessian(k, self.run.device, self._rounding(group[leader]))
            for leader, k in leaders.items()
        }
        seen = {leader: Inputs() for leader in leaders}
        lookers: dict[Matrix, list[Inputs]] = defaultdict(list)
        for leader, inputs in seen.items():
            for source in self._sources.get(leader, [leader]):
                lookers[source].append(inputs)
        watch = Watch(lookers, engine)
        count, step = len(self.run.batches), self.run.workers
        for start in range(0, count, step):
            self.layer.watch(watch, None, range(start, min(start + step, count)))
            add(hessians, seen, each)
        for hessian in hessians.values():
            hessian.complete()
        return hessians

    # -- codes -----------------------------------------------------------------------------------

    def _round_all(self, modules: Sequence[str], hessian: Hessian, each: Each) -> None:
        """The modules that read one input."""
        if not hessian.finite:
            raise not_finite(modules[0], str(self.run.skeleton.checkpoint.path))
        objective: _Objective | None = None
        for module in modules:
            module_policy = self.run.policy.quantized[module]
            scheme = module_policy.scheme
            stats = self.stats.get(module, NO_STATS)
            constants = scheme.constants(stats, module_policy.input_dtype)
            read = hessian.sum
            if hessian.rounded is None:
                read = scheme.as_read(scheme.as_read(read, constants).T, constants).T
            options = _options(scheme)
            if (
                objective is None
                or objective.options != options
                or not (read is hessian.sum or torch.equal(read, objective.hessian))
            ):
                feedback = None
                if hessian.tokens:
                    damping, act_order = options.damping, options.act_order
                    feedback = Feedback.of(read, damping=damping, act_order=act_order, each=each)
                if feedback is not None:
                    feedback = replace(feedback, block_size=options.block_size)
                toward = self._toward(hessian, options.damping, each)
                objective = _Objective(read, feedback, toward, options)
            self._round(module, constants, objective, each)
            if objective.feedback is None:
                self._rounded_to_nearest(module, _SINGULAR if hessian.tokens else _UNREACHED)

    def _toward(self, hessian: Hessian, damping: float, each: Each) -> Tensor | None:
        corrections: list[Tensor | None] = []
        # on one thread, as all here
        each(lambda _: corrections.append(hessian.toward(damping)), range(1))
        return corrections[0] if hessian.tokens else None

    def _round(self, module: str, constants: Parts, objective: _Objective, each: Each) -> None:
        stored = self._stored(module)
        n, k = stored.spec.shape
        errors = torch.empty((3, n), dtype=torch.float64)
        scheme, input_dtype = self._scheme(module), self.run.policy.quantized[module].input_dtype
        blank = scheme.blank(k, input_dtype)["codes"]
        codes = blank.new_empty((n, *blank.shape[1:]))
        scales: list[Tensor] = [torch.empty(0)] * -(-n // _ROWS)
        own = scheme.row_stats & self.stats.get(module, NO_STATS).keys()
        constants = {**constants, **self._whole(module)}

        def work(start: int) -> None:
            block = slice(start, min(start + _ROWS, n))
            row_stats = {name: self.stats[module][name][block] for name in own}
            row_constants = {**constants, **row_stats}
            rounded = self._block(module, block, row_constants, objective)
            codes[block] = rounded.codes.cpu()
            errors[:, block] = torch.stack([rounded.error, rounded.nearest, rounded.signal]).cpu()
            if rounded.scale is not None:
                scales[start // _ROWS] = rounded.scale.cpu()

        each(work, range(0, n, _ROWS))
        chosen = {"codes": codes}
        if isinstance(scheme, RoundedWeights) and scheme.fits_scales:
            chosen["scales"] = torch.cat(scales)
        self.stats[module] = {**self.stats.get(module, NO_STATS), **chosen}
        error, nearest, signal = (float(row.sum()) for row in errors)
        if signal:
            relative = {"output_error": error / signal, "output_error_nearest": nearest / signal}
            self.reports[module].numbers |= {key: math.sqrt(value) for key, value in relative.items()}

    def _block(self, module: str, block: slice, row_constants: Parts, objective: _Objective) -> Rounded:
        """Rows of a block, rounded against the scales that `quantize` will find for them."""
        scheme, device = self._scheme(module), objective.hessian.device
        rows, bias = self._rows(module, block)
        row_constants = {name: tensor.to(device) for name, tensor in row_constants.items()}
        rows, bias = rows.to(device), None if bias is None else bias.to(device)
        weight_dtype = self.run.policy.quantized[module].weight_dtype
        parts = scheme.quantize(rows, weight_dtype, row_constants, bias)
        targets = scheme.to_round(rows, row_constants)
        if objective.toward is not None:
            targets = targets @ objective.toward
        options, tile = objective.options, scheme.numerics.weight.block
        descent = Descent(
            options.sweeps,
            tile[1] if tile else rows.shape[1],
            parts["weight_scale"].float(),
            parts.get("weight_global_scale"),
            _to_scale(scheme, weight_dtype),
        )
        step, zero = descent.step(descent.scale, rows.shape[1]), parts.get("weight_zero_point")
        shifted = targets
        if zero is not None:
            # codes less their zero points stand for weights, as do codes for weights that are shifted
            zero = tiles.spread(zero, tile, *rows.shape) if tile else zero
            shifted = torch.addcmul(targets, zero.float().expand_as(targets), step)
        rounded = gptq(
            shifted,
            objective.hessian,
            step,
            parts["weight"],
            scheme.numerics.weight.element,
            objective.feedback,
            descent,
        )
        return rounded if zero is None else rounded._replace(signal=squares(targets, objective.hessian))

    def _rows(self, module: str, block: slice) -> tuple[Tensor, Tensor | None]:
        """Rows of a stored weight and its bias, edited, as `quantize` will read them."""
        count = block.stop - block.start
        stored = self.run.skeleton.checkpoint.tensors
        tensors = []
        for name in (f"{module}.weight", f"{module}.bias"):
            rows = read_span(stored[name], block.start, count) if name in stored else None
            if rows is not None and (factors := self.edits.get(name)) is not None:
                rows = factors.apply(rows, block.start)
            tensors.append(rows)
        weight, bias = tensors
        assert weight is not None
        if self.run.policy.inputs != "float":
            self._check_order(module, weight, block)
        return weight, bias

    # -- learning --------------------------------------------------------------------------------

    def _learn(self) -> None:
        """Codes and scales learn from the outputs of the layer."""
        starts: dict[Matrix, tuple[Learned, list[Segment]]] = {}
        for matrix, segments in self.layout.matrices():
            its = [_options(self._scheme(s.module)) for s in segments if self._rounded(s.module)]
            learned = [each for each in its if isinstance(each, Learned)]
            if learned and len(its) == len(segments):
                starts[matrix] = learned[0], segments
        if starts:
            offsets.learn(self.work, starts, self._start)

    def _rounded(self, module: str) -> bool:
        return self._by_data(module) and "codes" in self.stats.get(module, NO_STATS)

    def _start(self, segments: Sequence[Segment]) -> RoundedRows:
        """The rows of a matrix as GPTQ has rounded them."""
        first, found = segments[0].module, []
        base = quantized(self.run.policy, self.stats, self._whole)
        for segment in segments:
            block = slice(0, segment.stop - segment.start)
            rows, bias = self._rows(segment.module, block)
            self._check_order(segment.module, rows, block)
            rounded = base(segment.module, rows, bias)
            assert rounded is not None
            found.append((rows, rounded[1]))
        scheme, device = self._scheme(first), self.run.device
        to_scale = _to_scale(scheme, self.run.policy.quantized[first].weight_dtype)
        return offsets.together(found, scheme, to_scale, device)

    def _check_order(self, module: str, rows: Tensor, block: slice) -> None:
        """The engine's arithmetic takes rows as they are loaded; codes are in the order of the file."""
        places = [
            (matrix, s)
            for matrix, segments in self.layout.matrices()
            for s in segments
            if s.module == module
        ]
        matrix, segment = places[0]
        loaded = self.layer.weight(matrix)[segment.start + block.start : segment.start + block.stop]
        dtype = self._stored(module).spec.dtype
        same = rows.to(torch_dtype(dtype)).to(loaded.dtype).to(loaded.device)
        if len(places) > 1 or loaded.shape != same.shape or not torch.equal(loaded, same):
            raise InputError(
                "its rows are not computed in the order in which they are stored, which this version "
                "cannot round by data on quantized inputs",
                where=f"`{module}` ({self.run.policy.quantized[module].rule})",
                fix="set calibration.inputs to float, or weight_rounding to nearest",
            )
