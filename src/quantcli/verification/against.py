"""A checkpoint against its source, or against another quantized checkpoint, tensor by tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from quantcli.checkpoint.spec import FLOATS
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.errors import named
from quantcli.core.events import Progress
from quantcli.core.findings import Finding, failed, noted
from quantcli.sources.stacked import split_experts
from quantcli.targets.layouts import StoredModule
from quantcli.targets.vllm_family import fused_name, fused_siblings
from quantcli.verification.compare import (
    FLOAT_BOUNDS,
    UNLIKE,
    Bounds,
    Comparison,
    FittedFactors,
    Pair,
    bounds_of,
    compare,
    shape_of,
)
from quantcli.verification.edits import (
    Candidate,
    Edited,
    answers_of,
    block_of,
    candidates,
    check_layer,
    choose,
    fit,
    hidden_columns,
    text_of,
)
from quantcli.verification.limits import Limits
from quantcli.verification.outcome import CONVERT, ModuleReport, TensorCounts
from quantcli.verification.reference import (
    Reference,
    compare_cache,
    compare_codes,
    compare_files,
    compare_names,
    difference,
    other_model,
)
from quantcli.verification.rotation.source import TURNED_BOUNDS, RotatedSource, fault_of, is_rotated
from quantcli.verification.rotation.turned import Constant, Turned
from quantcli.verification.spread.pool import Pool
from quantcli.verification.structure import Structure, faults_of_model, layer_of

# Ends of names of a norm's weight; older checkpoints of BERT and its kin have `gamma` and `beta`.
_OF_NORMS = (".weight", ".gamma")
_LARGE = 1000  # modules: in a larger model, only the worst keep their histograms in the report


def verify_against(
    structure: Structure,
    reference: Reference,
    pool: Pool,
    progress: Progress,
    *,
    trust: bool = False,
) -> Reference:
    """Compare every tensor; findings and modules go to the report. trust: the model's own code may run,
    which tells what its stream is if that was rotated.

    Returns the other model in the basis of the checkpoint: if that was rotated, the same function with
    other weights.

    Each quantized weight must reach the limit `min_sqnr`, or the bound of its codes if there is none.
    Memory: a few row blocks for each worker.
    """
    stored, report = structure.stored, structure.report
    assert stored is not None
    report.depths.append("against")
    report.against = named(str(reference.checkpoint.path))
    if (different := other_model(stored.checkpoint, reference.checkpoint)) is not None:
        report.add([different])
        report.count("source", 1)
        return reference
    report.excuse(faults_of_model(reference, str(stored.checkpoint.path)))
    ours = Reference(split_experts(stored.checkpoint), None, stored)  # experts may be stored together
    if is_rotated(ours.checkpoint, reference.checkpoint):
        source = RotatedSource(ours, reference, trust_remote_code=trust)
        report.add(source.findings)
        reference = source.reference
        report.count("rotation", source.count)
    report.add(compare_names(ours, reference))
    report.add(compare_cache(ours.cache, reference.cache))
    report.add(compare_files(stored.checkpoint, reference.checkpoint))
    layers: dict[str, list[str]] = defaultdict(list)
    reference_names = reference.names()
    unread = {f"{module}.weight" for module in [*ours.unchecked, *reference.unchecked]}
    if unread:
        what = f"{len(unread)} modules were not compared, whose formats this version cannot read"
        report.add([noted("sqnr", what)])
    for name in sorted(ours.names() & reference_names - unread):
        layers[layer_of(name) or name].append(name)
    progress.begin(sum(map(reference.nbytes, reference_names)), len(layers))
    counts = report.tensors = TensorCounts()
    nbytes = [sum(map(reference.nbytes, names)) for names in layers.values()]
    common = ours, reference, structure.limits
    for findings, modules, tensors in pool.each(
        _compared, common, [*layers.values()], nbytes, progress
    ):
        report.add(findings)
        report.modules += modules
        counts.add(tensors)
    for module in sorted(report.modules, key=lambda module: module.margin_db)[_LARGE:]:
        module.histogram, module.worst_rows, module.outlier_channels = None, [], []
    report.count("source", len(reference_names))
    report.count("copies", counts.equal + counts.edited)
    report.count("edits", counts.edited)
    report.count("sqnr", len(report.modules))
    return reference


_Compared: TypeAlias = tuple[list[Finding], list[ModuleReport], TensorCounts]


def _compared(
    common: tuple[Reference, Reference, Limits], names: Sequence[str], progress: Progress
) -> _Compared:
    """The comparison of all tensors of a layer."""
    return _Layer(*common, progress).compare(names)


@dataclass
class _Layer:
    """One layer of both models while it is compared.

    bounds:  of each matrix, by the types of its codes and scales; of floats if it was edited.
    vectors: edited ones by name, before and after.
    unlike:  some matrix is not a rounding of the other model's.
    """

    ours: Reference
    reference: Reference
    limits: Limits
    progress: Progress
    bounds: dict[str, Bounds] = field(default_factory=dict)
    vectors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    edited: list[Edited] = field(default_factory=list)
    damage: dict[str, str] = field(default_factory=dict)  # what alone made a fit necessary
    unlike: bool = False
    modules: list[ModuleReport] = field(default_factory=list)
    counts: TensorCounts = field(default_factory=TensorCounts)

    def compare(self, names: Sequence[str]) -> _Compared:
        """The comparison of all tensors of the layer."""
        return list(self._findings(names)), self.modules, self.counts

    def _findings(self, names: Iterable[str]) -> Iterator[Finding]:
        """Compare all tensors: first those that are copied, then matrices, then edits of both."""
        for name in names:
            yield from self._sort(name)
        norms = {name: pair for name, pair in self.vectors.items() if name.endswith(_OF_NORMS)}
        options = candidates(norms)
        for group in _siblings(self.bounds):
            # of norms that were divided alike, each group takes one that no other group has
            taken = {matrix.producer for matrix in self.edited}
            yield from self._compare(group, sorted(options, key=lambda c: c.producer in taken))
        if self.unlike:
            return  # edits of a weight that is not in the model are unknown
        self._find_readers()
        yield from _vectors(self.vectors, self.edited)
        fused_names = {matrix.module: fused_name(matrix.module) for matrix in self.edited}
        for finding in check_layer(list(norms), self.edited, fused_names):
            yield finding
            if what := self.damage.get(str(finding.where).strip("`")):
                yield failed("sqnr", what, finding.where, _DAMAGE)

    def _sort(self, name: str) -> Iterator[Finding]:
        """Compare a tensor that is copied or edited; list a matrix, which is compared later."""
        reference, counts = self.reference, self.counts
        module = name.removesuffix(".weight")
        if (ours := self.ours.quantized(name)) is not None:
            self.bounds[module] = bounds_of(ours.layout.operand)
            counts.quantized += 1
            return
        if (other := reference.quantized(name)) is not None:
            self.bounds[module] = bounds_of(other.layout.operand)
            return
        before, after = reference.checkpoint.tensors[name], self.ours.checkpoint.tensors[name]
        rotated = isinstance(before, Turned | Constant)
        what = fault_of(before, after) if rotated else difference(before, after)
        floats = not {before.spec.dtype, after.spec.dtype} - FLOATS
        editable = floats and before.spec.shape == after.spec.shape and layer_of(name) is not None
        if what is None:
            counts.equal += not rotated
            counts.edited += rotated
        elif editable and len(before.spec.shape) == 2 and name.endswith(".weight"):
            self.bounds[module] = TURNED_BOUNDS if rotated else FLOAT_BOUNDS
            counts.edited += 1
            return
        elif editable and len(before.spec.shape) == 1:
            self.vectors[name] = read_tensor(before), read_tensor(after)
            counts.edited += 1
        else:
            yield failed("rotation" if rotated else "copies", what, f"`{name}`", CONVERT)
        self.progress.advance(reference.nbytes(name))

    def _compare(self, group: Sequence[str], norms: Sequence[Candidate]) -> Iterator[Finding]:
        """Compare matrices that read one tensor."""
        pairs: dict[str, Pair] = {}
        for module in group:
            reference, ours = self.reference.weight(module), self.ours.weight(module)
            if shape_of(reference) != shape_of(ours):
                what = f"is {list(shape_of(ours))}, in the other model {list(shape_of(reference))}"
                yield failed("source", what, f"`{module}`", CONVERT)
                continue
            pairs[module] = Pair.of(reference, ours)
        comparisons = {module: compare(pair) for module, pair in pairs.items()}
        limits = {module: self._limit(module) for module in pairs}
        factors: dict[str, FittedFactors] = {}
        poor = any(
            comparison.sqnr_db < limits[module] or self.bounds[module].damage(comparison)
            for module, comparison in comparisons.items()
        )
        if (norms or poor) and pairs and all(c.finite for c in comparisons.values()):
            alike = len({pair.k for pair in pairs.values()}) == 1
            columns = choose(list(pairs.values()), norms) if alike else None
            for module, pair in pairs.items():
                fitted = fit(pair, columns)
                if not fitted.trivial:
                    better = compare(pair, fitted)
                    if better.sqnr_db > comparisons[module].sqnr_db:
                        fault = self.bounds[module].damage(comparisons[module])
                        if fault and not norms and comparisons[module].sqnr_db >= limits[module]:
                            self.damage[module] = fault
                        comparisons[module], factors[module] = better, fitted
                        producer = columns.producer if columns else None
                        self.edited.append(Edited(module, fitted, producer))
        for module, comparison in comparisons.items():
            self.unlike |= comparison.sqnr_db < UNLIKE
            yield from self._report(module, comparison, limits[module], factors.get(module))

    def _find_readers(self) -> None:
        """Add the matrices whose columns undo edited rows, if no fit has shown that they do."""
        fitted = {matrix.module for matrix in self.edited}
        for matrix in list(self.edited):
            rows = matrix.factors.rows
            if bool((rows == 1).all()) or answers_of(matrix, self.edited):
                continue
            block = block_of(matrix.module)
            for module in (name for name in self.bounds if name not in fitted):
                weights = self.reference.weight(module), self.ours.weight(module)
                if module.startswith(f"{block}.") and shape_of(weights[0]) == shape_of(weights[1]):
                    pair = Pair.of(*weights)
                    if (columns := hidden_columns(pair, rows)) is not None:
                        factors = FittedFactors(torch.ones(pair.n), columns)
                        self.edited.append(Edited(module, factors, matrix.module))

    def _limit(self, module: str) -> float:
        """dB that a matrix must reach: of two quantized weights, the coarser one decides."""
        bounds, reference = self.bounds[module], self.reference.weight(module)
        default = bounds.sqnr_db
        if isinstance(reference, StoredModule):
            default = min(default, bounds_of(reference.layout.operand).sqnr_db)
        return (
            default
            if bounds in {FLOAT_BOUNDS, TURNED_BOUNDS}
            else self.limits.least("min_sqnr", default)
        )

    def _report(
        self, module: str, comparison: Comparison, limit: float, factors: FittedFactors | None
    ) -> Iterator[Finding]:
        """Report one matrix, and its fault if it has one."""
        reference, ours = self.reference.weight(module), self.ours.weight(module)
        bounds = self.bounds[module]
        quantized = bounds not in {FLOAT_BOUNDS, TURNED_BOUNDS}
        codes_differ, scale_ratio = compare_codes(reference, ours)
        report = ModuleReport(
            module=module,
            label=ours.layout.label if isinstance(ours, StoredModule) else "FLOAT",
            shape=list(shape_of(ours)),
            sqnr_db=round(comparison.sqnr_db, 3),
            cosine=round(comparison.cosine, 8),
            max_rel_error=round(comparison.max_rel_error, 8),
            worst_rows=comparison.worst_rows,
            outlier_channels=comparison.outlier_channels,
            histogram=comparison.histogram,
            limit_db=limit,
            edited=text_of(factors) if factors else None,
            codes_differ=codes_differ,
            scale_ratio=scale_ratio,
        )
        self.progress.advance(self.reference.nbytes(f"{module}.weight"))
        if quantized:
            self.modules.append(report)
        if what := bounds.fault(report):
            report.ok = False
            row = f", worst row {report.worst_rows[0].row}" if report.worst_rows else ""
            rounding = report.sqnr_db > UNLIKE and not bounds.damage(report)
            fix = _FLOAT if not quantized else _FINER if rounding else _DAMAGE
            fix += "" if isinstance(reference, StoredModule) else _DECODED
            if quantized and report.margin_db < 0:
                fix += self.limits.hint("min_sqnr", lambda limit: report.sqnr_db >= limit)
            yield failed("sqnr", what, f"`{module}`{row}", fix)


def _siblings(modules: Iterable[str]) -> list[list[str]]:
    """Modules in groups that read one tensor, as far as their names show it: q, k, v; gate, up."""
    groups: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        groups[fused_siblings(module) or module].append(module)
    return list(groups.values())


def _vectors(
    vectors: Mapping[str, tuple[Tensor, Tensor]], edited: Sequence[Edited]
) -> Iterator[Finding]:
    """Findings for biases that were not multiplied like their module: rows of a matrix, or a norm."""
    rows = {matrix.module: matrix.factors.rows for matrix in edited}
    for name, (before, after) in vectors.items():
        if name.endswith(_OF_NORMS):
            continue
        module = name.rpartition(".")[0]
        factors = rows.get(module, torch.ones(1))
        weight = next((module + end for end in _OF_NORMS if module + end in vectors), None)
        if module not in rows and weight is not None:
            old, new = vectors[weight]
            factors = torch.where(old != 0, new.float() / old.float(), 1.0)
        if not torch.allclose(after.float(), before.float() * factors, rtol=2.0**-6, atol=1e-30):
            what = "changed in another way than the weight of its module"
            yield failed("edits", what, f"`{name}`", CONVERT)


_DAMAGE = "this is damage, not rounding: copy the checkpoint again, or convert the model again"
_FLOAT = "floats are copied or multiplied, never rounded to codes: convert the model again"
_FINER = "keep this module float or in a finer scheme, or lower the limit if that is what you want"
_DECODED = "; or, if it was made from a quantized model, compare with that one"
