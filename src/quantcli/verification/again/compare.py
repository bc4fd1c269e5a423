"""A conversion made again from its source: every number that the recipe fixes, bit by bit."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quantcli.checkpoint.checkpoint import read_json_file
from quantcli.checkpoint.spec import TensorSpec, torch_dtype
from quantcli.checkpoint.tensors import read_span
from quantcli.core.errors import InputError
from quantcli.core.events import Progress
from quantcli.core.findings import Finding, failed
from quantcli.core.numerics import Parts
from quantcli.planning.block import (
    Calibrated,
    Computed,
    Job,
    Surveys,
    compute,
    jobs_of,
    read_calibrated,
    row_blocks,
)
from quantcli.planning.plan import CacheScale, Copy, Item, Plan, Quantize, Repack, Work
from quantcli.planning.recode import recode
from quantcli.schemes.base import ClippedWeights
from quantcli.targets.base import StoredCheckpoint, Target
from quantcli.targets.layouts import Output
from quantcli.targets.module_rows import ModuleReader
from quantcli.verification.again.difference import CHECK, Difference, StoredParts, merge
from quantcli.verification.outcome import CONVERT, Report
from quantcli.verification.spread.pool import Pool
from quantcli.verification.structure import layer_of

_CLIPS = "input_square"  # the statistic that clips by inputs need
_CHOSEN = {"codes": "weight", "scales": "weight_scale"}  # by data, and the parts that have them
NOT_RECOMPUTED = "codes and scales were not recomputed"
GIVE_CALIBRATION = "give --calibration DIR, the folder that `quantize` kept"


@dataclass(frozen=True)
class Recomputation:
    """A conversion that can be made again.

    plan:       of the conversion, or of packing.
    stored:     the checkpoint that is verified.
    packed:     its format, if the plan's numbers were packed into it afterwards.
    calibrated: the plan has the results of calibration, if the recipe asks for any.
    same_version: this version of quantcli made the checkpoint.
    """

    plan: Work
    stored: StoredCheckpoint
    packed: Target | None = None
    calibrated: bool = False
    same_version: bool = True
    surveys: Surveys = field(default_factory=Surveys)

    def run(self, report: Report, pool: Pool, progress: Progress) -> None:
        """Make it again and compare; findings go to the report.

        Memory: a row block, and the stored one, for each worker.
        """
        items = [self._aligned(item) for shard in self.plan.shards for item in shard.items]
        certain = [item for item in items if self._edits_are_certain(item)]
        if uncertain := len(items) - len(certain):
            what = f"{NOT_RECOMPUTED} for {uncertain} of {len(items)} tensors of the source"
            report.not_checked.append(
                f"{what}, which {self._editors} may have edited: {GIVE_CALIBRATION}"
            )
        report.add(self._unplanned(items))
        faults = {item.source.spec.name: list(self._unlike(item)) for item in certain}
        report.add(finding for findings in faults.values() for finding in findings)
        comparable = [i for i in certain if not faults[i.source.spec.name] and not _unmeasured(i)]
        report.not_checked += self._taken_over(comparable)
        if unmeasured := sum(map(_unmeasured, items)):
            what = f"scales of the cache were not recomputed ({unmeasured} tensors)"
            report.not_checked.append(f"{what}: {GIVE_CALIBRATION}")
        progress.begin(sum(item.source.nbytes for item in comparable), len(self.plan.shards))
        differences: dict[str, Difference] = {}
        jobs = [(index, job) for index, item in enumerate(comparable) for job in jobs_of([item])]
        requests = [(index, job.start, job.stop) for index, job in jobs]
        nbytes = [job.nbytes for _, job in jobs]
        for result in pool.each(_compared_again, (self, comparable), requests, nbytes, progress):
            if isinstance(result, InputError):
                report.add([failed(CHECK, result.what, result.where, result.fix or CONVERT)])
            else:
                merge(differences, result)
        report.add(difference.finding() for difference in differences.values())
        report.add(self._sidecars())
        report.count(CHECK, sum(len(self._compared(item)) for item in comparable))

    def _aligned(self, item: Item) -> Item:
        """An item whose row blocks also fit the tensors of the format that it was packed into."""
        if self.packed is None or not isinstance(item, Quantize):
            return item
        multiple = self.packed.layout(item.scheme.numerics).row_multiple
        return replace(item, row_multiple=math.lcm(item.row_multiple, multiple))

    def _sidecars(self) -> Iterator[Finding]:
        """Generated JSON files with other keys or values than the conversion writes.

        Not those of a format that the numbers were packed into afterwards, nor of another version.
        """
        if self.packed is not None or not self.same_version:
            return
        for name, content in self.plan.sidecars.items():
            path = self.stored.checkpoint.path / name
            if not name.endswith(".json") or not path.is_file():
                continue
            try:
                change = change_of(read_json_file(path), json.loads(content))
            except (InputError, RecursionError):
                change = "cannot be read"
            if change:
                yield failed(CHECK, change, name, CONVERT)

    # -- the tensors that there should be ------------------------------------------------------------

    def _edits_are_certain(self, item: Item) -> bool:
        """Whether all edits of an item are known: without calibration, none in a decoder layer are, and
        no transform."""
        if self.calibrated or not isinstance(self.plan, Plan):
            return True
        edits = {method.name for method in self.plan.methods if method.edited_as}
        if isinstance(item, Quantize) and not edits.isdisjoint(item.scheme.methods):
            return False
        return not edits or layer_of(item.source.spec.name) is None

    @property
    def _editors(self) -> str:
        """What may have edited tensors, as text."""
        methods = self.plan.methods if isinstance(self.plan, Plan) else ()
        return " or ".join(result for m in methods if m.edited_as for result in m.results)

    def _taken(self, item: Item) -> frozenset[str]:
        """The names of statistics and codes that are taken from the checkpoint itself."""
        return item.asked if isinstance(item, Quantize) and not item.stats else frozenset()

    def _specs(self, item: Item) -> tuple[TensorSpec, ...]:
        """The tensors that an item becomes."""
        if self.packed is None:
            return tuple(output.spec for output in item.outputs)
        if isinstance(item, Quantize):
            tensors = self.stored.modules[item.module].tensors
            return tuple(tensor.spec for suffix, tensor in tensors.items() if suffix != "bias")
        spec = item.outputs[0].spec
        if isinstance(item, CacheScale) and isinstance(self.plan, Plan) and self.plan.cache:
            layer = self.plan.cache.layers[item.layer]
            kinds = self.packed.cache_tensors(self.plan.cache.cache)
            kind = next(kind for kind in kinds if kind.part == item.part)
            return (TensorSpec(kind.name(layer.name), spec.dtype, kind.shape_of(layer)),)
        owner, _, suffix = spec.name.rpartition(".")
        module = self.stored.modules.get(owner)
        if suffix != "bias" or module is None or module.numerics is None:
            return (spec,)
        return (replace(spec, dtype=self.packed.bias_dtype(module.numerics) or spec.dtype),)

    def _compared(self, item: Item) -> list[TensorSpec]:
        """Those that the source determines."""
        specs, taken = self._specs(item), self._taken(item)
        if not taken or not isinstance(item, Quantize):
            return list(specs)
        module = self.stored.modules[item.module]
        if _CLIPS in taken:
            codes = f"{item.module}.{module.layout.weight.suffix}"
            return [spec for spec in specs if spec.name == codes and "codes" not in taken]
        suffixes = [param.suffix for param in module.constants if param.suffix.startswith("input_")]
        suffixes += [module.layout.weight.suffix] if "codes" in taken else []
        if "scales" in taken:
            params = module.layout.params
            suffixes += [p.suffix for p in params if (p.part or p.suffix) == "weight_scale"]
        return [spec for spec in specs if spec.name.removeprefix(f"{item.module}.") not in suffixes]

    def _unlike(self, item: Item) -> Iterator[Finding]:
        """Findings for tensors that are missing, or of another type, dtype or shape."""
        if isinstance(item, Quantize):
            module = self.stored.modules.get(item.module)
            label = (self.packed or self.plan.target).label(item.scheme.numerics)
            if module is None or module.layout.label != label:
                here = "float, or damaged" if module is None else module.layout.label
                what = f"the recipe makes this module {label}; it is {here}"
                yield failed(CHECK, what, f"`{item.module}`", CONVERT)
                return
            if module.shape != item.source.spec.shape:
                what = f"the weight is {list(item.source.spec.shape)}; the codes are for "
                yield failed(CHECK, what + f"{list(module.shape)}", f"`{item.module}`", CONVERT)
                return
        for spec in self._specs(item):
            stored = self.stored.checkpoint.tensors.get(spec.name)
            if stored is None or stored.spec != spec:
                here = "no file holds it" if stored is None else f"it is {stored.spec}"
                yield failed(CHECK, f"the recipe makes {spec} of it; {here}", f"`{spec.name}`", CONVERT)

    def _unplanned(self, items: list[Item]) -> Iterator[Finding]:
        """Findings for modules that are quantized, and that the recipe keeps float."""
        planned = {
            item.module if isinstance(item, Quantize) else item.module.name
            for item in items
            if not isinstance(item, Copy)
        }
        for name in sorted(self.stored.modules.keys() - planned):
            label = self.stored.modules[name].layout.label
            what = f"the recipe keeps this module float; it is {label}"
            yield failed(CHECK, what, f"`{name}`", CONVERT)
        scales = {s.name for i in items if isinstance(i, CacheScale) for s in self._specs(i)}
        for stored in self.stored.cache.tensors if self.stored.cache else ():
            if stored.spec.name not in scales:
                what = "the recipe makes no such scale of the cache"
                yield failed(CHECK, what, f"`{stored.spec.name}`", CONVERT)

    def _taken_over(self, items: list[Item]) -> Iterator[str]:
        """For the report: numbers that were taken from the checkpoint itself."""
        counts = Counter[str]()
        for item in items:
            taken = self._taken(item)
            counts["codes that data chose"] += "codes" in taken
            counts["scales that data chose"] += "scales" in taken
            counts["ranges of inputs"] += bool(taken - {*_CHOSEN, _CLIPS})
            counts["clips by inputs"] += _CLIPS in taken
        for what, modules in counts.items():
            if modules:
                yield f"{what} were not recomputed in {modules} modules: {GIVE_CALIBRATION}"

    # -- one job -------------------------------------------------------------------------------------

    def compare(self, job: Job, progress: Progress) -> dict[str, Difference]:
        """The differences in some rows of an item, by the name of the tensor."""
        item = job.item
        calibrated = self._calibrated(item)
        compared = {spec.name for spec in self._compared(item)}
        differences: dict[str, Difference] = {}
        given = _CLIPS in self._taken(item)
        with ExitStack() as stack:
            stored = StoredParts(self.stored.checkpoint.tensors, stack)
            for rows in self._nearest(job) if given else compute(job, self.plan.target, calibrated):
                blocks = [
                    stored.block(output, first, expected)
                    for output, first, expected in self._in_its_format(item, rows)
                ]
                unlike = (block.difference() for block in blocks if block.output.spec.name in compared)
                merge(differences, {each.name: each for each in unlike if each})
                progress.advance(rows.nbytes)
        return differences

    def _calibrated(self, item: Item) -> Calibrated:
        """The results of calibration for an item; without calibration, those that are stored."""
        calibrated, taken = read_calibrated(item, self.surveys), self._taken(item)
        if not taken or not isinstance(item, Quantize):
            return calibrated
        module, target, numerics = (
            self.stored.modules[item.module],
            self.plan.target,
            item.scheme.numerics,
        )

        def parts(start: int, count: int) -> Parts:
            with ModuleReader(module) as reader:
                unpacked = target.unpack(numerics, reader.rows(start, count))
                return {
                    name: tensor.clone() for name, tensor in unpacked.items()
                }  # the next reader overwrites them

        constants = calibrated.constants
        if taken - {*_CHOSEN, _CLIPS}:
            some = parts(0, item.row_multiple)
            some[_CLIPS] = torch.ones(0)
            try:
                stored = item.scheme.constants(some, torch_dtype(item.engine_dtypes.input_scale))
            except InputError as error:
                raise InputError(error.what, where=f"`{item.module}`", fix=CONVERT) from None
            constants = {**stored, **constants}
        row_stats = {
            name: lambda start, count, part=part: parts(start, count)[part]
            for name, part in _CHOSEN.items()
            if name in taken
        }
        return replace(calibrated, constants=constants, row_stats=row_stats)

    def _nearest(self, job: Job) -> Iterator[Computed]:
        """Row blocks of a weight with the scales that are stored, and the codes nearest to them."""
        item, target = job.item, self.plan.target
        assert isinstance(item, Quantize)
        scheme, shape = item.scheme, item.source.spec.shape
        assert isinstance(scheme, ClippedWeights)
        dtype = torch_dtype(item.engine_dtypes.weight_scale)
        with ModuleReader(self.stored.modules[item.module]) as reader:
            for start, stop in row_blocks(job):
                parts = target.unpack(scheme.numerics, reader.rows(start, stop - start))
                rows = read_span(item.source, start, stop - start)
                zero = parts.get("weight_zero_point")
                codes = scheme.nearest_codes(rows, parts["weight_scale"].float(), zero)
                parts |= {"weight": codes, "weight_scale": parts["weight_scale"].to(dtype)}
                sides = shape[0], shape[1]
                packed = target.pack_module(item.module, scheme.numerics, parts, sides)
                named = {f"{item.module}.{suffix}": tensor for suffix, tensor in packed.items()}
                compared = {spec.name for spec in self._compared(item)}
                outputs = [
                    (output, output.first(start), named[output.spec.name])
                    for output in item.outputs
                    if output.spec.name in compared
                ]
                yield Computed(start, stop - start, outputs, rows.nbytes)

    def _in_its_format(self, item: Item, rows: Computed) -> Iterator[tuple[Output, int, Tensor]]:
        """Computed tensors as they are after packing, if there was one."""
        if self.packed is None:
            yield from rows.written
        elif isinstance(item, Quantize):
            yield from self._repacked(item, rows, self.packed)
        else:
            (spec,) = self._specs(item)
            for _, row, tensor in rows.outputs:
                shape = spec.shape if isinstance(item, CacheScale) else tensor.shape
                yield Output(spec), row, tensor.to(torch_dtype(spec.dtype)).view(shape)

    def _repacked(
        self, item: Quantize, rows: Computed, packed: Target
    ) -> Iterator[tuple[Output, int, Tensor]]:
        module = self.stored.modules[item.module]
        before = replace(module, serving_dtype=self.plan.serving_dtype, numerics=item.scheme.numerics)
        repack = Repack(module.codes, before, self.plan.target, ())
        tensors = {out.spec.name.removeprefix(f"{item.module}."): t for out, _, t in rows.outputs}
        bias = None if item.bias is None else read_span(item.bias, rows.start, rows.count)
        params = {param.suffix: param for param in module.layout.params}
        for suffix, tensor in recode(repack, packed, tensors, rows.start, bias).items():
            if suffix not in module.tensors:  # which the engine does not need
                continue
            output = Output(module.tensors[suffix].spec, params[suffix].axis, params[suffix].rows)
            if rows.start == 0 or output.rows:
                yield output, output.first(rows.start), tensor


def _compared_again(
    common: tuple[Recomputation, list[Item]], request: tuple[int, int, int], progress: Progress
) -> dict[str, Difference] | InputError:
    """The differences in some rows of an item; the error if they cannot be computed. request: the
    index of the item, and its rows."""
    recomputation, items = common
    index, start, stop = request
    try:
        return recomputation.compare(Job(items[index], start, stop), progress)
    except InputError as error:
        return error


def _unmeasured(item: Item) -> bool:
    """Whether an item is a scale of the cache that calibration would give."""
    return isinstance(item, CacheScale) and not item.ready


def change_of(stored: Any, planned: Any, place: str = "") -> str | None:
    """The first value of a JSON document that is not the planned one, as text."""
    if isinstance(stored, dict) and isinstance(planned, dict):
        for key in sorted({*stored, *planned}):
            inner = f"{place}.{key}" if place else key
            if key not in planned:
                return f"`{inner:.120}` is {stored[key]!r:.60}; the recipe makes no such key"
            if key not in stored:
                return f"`{inner:.120}` is missing; the recipe makes {planned[key]!r:.60}"
            if change := change_of(stored[key], planned[key], inner):
                return change
        return None
    if isinstance(stored, list) and isinstance(planned, list) and len(stored) == len(planned):
        pairs = enumerate(zip(stored, planned, strict=True))
        return next((c for i, (a, b) in pairs if (c := change_of(a, b, f"{place}[{i}]"))), None)
    if type(stored) is type(planned) and (stored == planned or stored != stored):
        return None
    return f"`{place:.120}` is {stored!r:.60}; the recipe makes {planned!r:.60}"
