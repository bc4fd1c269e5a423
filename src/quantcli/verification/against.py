"""A checkpoint against the one it was made from, or against another quantized one, tensor by tensor."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import FLOATS
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.events import Progress
from quantcli.core.findings import Finding, failed
from quantcli.core.threads import thread_pool
from quantcli.targets.base import StoredCheckpoint
from quantcli.targets.layouts import StoredModule
from quantcli.targets.vllm_family import fused_name, fused_siblings
from quantcli.verification.compare import Comparison, FittedFactors, Open, compare, opener
from quantcli.verification.edits import Candidate, Edited, candidates, check_layer, choose, fit
from quantcli.verification.limits import LEAST_SQNR, UNLIKE, fault, is_damaged
from quantcli.verification.reference import (
    Reference,
    codes,
    compare_files,
    difference,
    noted_kind,
    other_model,
)
from quantcli.verification.structure import Structure

_LAYER = re.compile(r"(.*?\.(?:layers|h|blocks|block)\.\d+)\..*")
_LARGE = 1000  # modules: from here on, only the worst have their histograms in the report
_AGAIN = "convert the model again"


def verify_against(
    structure: Structure,
    reference: Reference,
    min_sqnr: float | None,
    workers: int,
    progress: Progress,
) -> None:
    """Compare every tensor; findings and modules go to the report.

    min_sqnr: dB that every quantized weight must reach; None: what its kind must, see LEAST_SQNR.
    Memory: a few blocks of rows a worker.
    """
    stored, report = structure.stored, structure.report
    assert stored is not None
    report.depths.append("against")
    report.against = str(reference.checkpoint.path)
    if (different := other_model(stored.checkpoint, reference.checkpoint)) is not None:
        report.add([different])
        report.count("source", 1)
        return
    run = _Run(stored, reference, min_sqnr, progress)
    report.add(run.accounted())
    report.add(noted_kind(reference))
    report.add(compare_files(stored.checkpoint, reference.checkpoint))
    layers: dict[str, list[str]] = defaultdict(list)
    for name in sorted(run.own_names & run.reference_names):
        match = _LAYER.fullmatch(name)
        layers[match[1] if match else name].append(name)
    progress.begin(sum(map(reference.nbytes, run.reference_names)), len(layers))
    with thread_pool(workers) as pool:
        for job in [pool.submit(run.layer, names) for names in layers.values()]:
            report.add(job.result())
    for module in sorted(run.modules, key=lambda m: m["sqnr_db"] - m["limit_db"])[_LARGE:]:
        module |= {"histogram": None, "worst_rows": [], "outlier_channels": []}
    report.modules = run.modules
    report.tensors = dict(sorted(run.tensors.items()))
    report.count("source", len(run.reference_names))
    report.count("copies", sum(run.tensors[kind] for kind in ("equal", "edited")))
    report.count("edits", run.tensors["edited"])
    report.count("sqnr", len(run.modules))


class _Run:
    """What the jobs share."""

    def __init__(
        self, stored: StoredCheckpoint, reference: Reference, min_sqnr: float | None, progress: Progress
    ) -> None:
        self.stored = stored
        self.reference = reference
        self.min_sqnr = min_sqnr
        self.progress = progress
        self.own = Reference(stored.checkpoint, None, stored)
        self.own_names = self.own.names()
        self.reference_names = reference.names()
        self.modules: list[dict[str, Any]] = []
        self.edited: dict[str, str] = {}  # by module, as text
        self.unlike: set[str] = set()  # modules that are not roundings of the other model's
        self.tensors = {"equal": 0, "edited": 0, "quantized": 0}

    def accounted(self) -> Iterator[Finding]:
        """Every tensor of the other model is here, and the other way round."""
        for name in sorted(self.reference_names - self.own_names):
            yield failed("source", f"`{name}` of the other model is missing", None, _AGAIN)
        for name in sorted(self.own_names - self.reference_names):
            yield failed("source", f"`{name}` is not in the other model", None, _AGAIN)

    def layer(self, names: list[str]) -> list[Finding]:
        """Compare the tensors of one layer."""
        return list(self._layer(names))

    def _layer(self, names: list[str]) -> Iterator[Finding]:
        changed: dict[str, tuple[Tensor, Tensor]] = {}
        matrices: dict[str, str] = {}  # module -> kind of its codes
        for name in names:
            module = name.removesuffix(".weight")
            ours = self.stored.modules.get(module) if module != name else None
            if ours is not None:
                matrices[module] = ours.layout.kind
                self.tensors["quantized"] += 1
                continue
            self.progress.advance(self.reference.nbytes(name))
            reference = self.reference.weight(module) if module != name else None
            if isinstance(reference, StoredModule):
                matrices[module] = reference.layout.kind
                continue
            before = self.reference.checkpoint.tensors[name]
            after = self.stored.checkpoint.tensors[name]
            if (found := difference(before, after)) is None:
                self.tensors["equal"] += 1
            elif (
                before.spec.shape != after.spec.shape or {before.spec.dtype, after.spec.dtype} - FLOATS
            ):
                yield failed("copies", found, f"`{name}`", _AGAIN)
            elif len(before.spec.shape) == 2 and _LAYER.fullmatch(name):
                matrices[module] = "float"
                self.tensors["edited"] += 1
            elif len(before.spec.shape) == 1 and _LAYER.fullmatch(name):
                changed[name] = read_tensor(before), read_tensor(after)
                self.tensors["edited"] += 1
            else:
                yield failed("copies", found, f"`{name}`", _AGAIN)
        edited_matrices = candidates({n: v for n, v in changed.items() if n.endswith(".weight")})
        edited: list[Edited] = []
        for group in _siblings(matrices):
            for outcome in self._compare(group, matrices, edited_matrices):
                if isinstance(outcome, Finding):
                    yield outcome
                else:
                    edited.append(outcome)
        if self.unlike & matrices.keys():
            return  # edits of a weight that is not in the model are unknown
        yield from _vectors(changed, edited)
        weights = [name for name in changed if name.endswith(".weight")]
        yield from check_layer(weights, edited, {e.module: fused_name(e.module) for e in edited})

    def _compare(
        self, group: list[str], kinds: Mapping[str, str], edited_matrices: Sequence[Candidate]
    ) -> Iterator[Finding | Edited]:
        """Matrices that read one tensor: what is wrong with them, and by what they were multiplied."""
        pairs: dict[str, tuple[Open, Open]] = {}
        shapes: dict[str, tuple[int, int]] = {}
        for module in group:
            reference, ours = self.reference.weight(module), self.own.weight(module)
            assert reference is not None
            assert ours is not None
            if _shape(reference) != _shape(ours):
                what = f"is {list(_shape(ours))}, in the other model {list(_shape(reference))}"
                yield failed("source", what, f"`{module}`", _AGAIN)
                continue
            pairs[module], shapes[module] = (opener(reference), opener(ours)), _shape(ours)
        compared = {module: compare(*pair, *shapes[module]) for module, pair in pairs.items()}
        limits = {module: self._limit(module, kinds[module]) for module in pairs}
        poor = any(found.sqnr_db < limits[module] for module, found in compared.items())
        finite = all(found.finite for found in compared.values())
        if pairs and finite and (edited_matrices or poor):
            widths = {shapes[module][1] for module in pairs}
            columns = None
            if len(widths) == 1:
                columns = choose(list(pairs.values()), widths.pop(), edited_matrices)
            for module, pair in pairs.items():
                factors = fit(pair, *shapes[module], columns)
                if not factors.trivial:
                    better = compare(*pair, *shapes[module], factors)
                    if better.sqnr_db > compared[module].sqnr_db:
                        compared[module] = better
                        edited = Edited(module, factors, columns.producer if columns else None)
                        yield edited
                        self.edited[module] = _words(factors)
        self.unlike |= {name for name, found in compared.items() if found.sqnr_db < UNLIKE}
        for module, found in compared.items():
            entry = self._entry(module, found, limits[module], kinds[module])
            if kinds[module] != "float":
                self.modules.append(entry)
            if not entry["ok"]:
                worst = entry["worst_rows"][:1]
                row = f", worst row {worst[0]['row']}" if worst else ""
                fix = self._fix(module, kinds[module], entry)
                yield failed("sqnr", fault(entry, kinds[module]) or "", f"`{module}`{row}", fix)

    def _fix(self, module: str, kind: str, entry: Mapping[str, Any]) -> str:
        """What to do about a matrix that is too far from the other model's."""
        if kind == "float":
            fix = _FLOAT
        else:
            rounding = entry["sqnr_db"] > UNLIKE and not is_damaged(entry, kind)
            fix = _ADVICE if rounding else _OTHER
        from_float = not isinstance(self.reference.weight(module), StoredModule)
        return fix + (_DECODED if from_float else "")

    def _limit(self, module: str, kind: str) -> float:
        """Of two quantized weights, the coarser one decides how near they can be."""
        if self.min_sqnr is not None and kind != "float":
            return self.min_sqnr
        reference = self.reference.weight(module)
        other = reference.layout.kind if isinstance(reference, StoredModule) else kind
        return min(LEAST_SQNR[kind], LEAST_SQNR[other])

    def _entry(self, module: str, found: Comparison, limit: float, kind: str) -> dict[str, Any]:
        """One matrix as the report has it."""
        reference, ours = self.reference.weight(module), self.own.weight(module)
        assert reference is not None
        assert ours is not None
        self.progress.advance(self.reference.nbytes(f"{module}.weight"))
        entry = {
            "module": module,
            "label": ours.layout.label if isinstance(ours, StoredModule) else "FLOAT",
            **found.to_json(),
            "limit_db": limit,
            "edited": self.edited.get(module),
            **codes(reference, ours),
        }
        return {**entry, "ok": fault(entry, kind) is None}


def _siblings(modules: Iterable[str]) -> list[list[str]]:
    """Modules in groups that read one tensor, as far as their names tell: q, k, v; gate, up."""
    groups: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        groups[fused_siblings(module) or module].append(module)
    return list(groups.values())


def _vectors(
    changed: Mapping[str, tuple[Tensor, Tensor]], edited: Sequence[Edited]
) -> Iterator[Finding]:
    """Biases follow what was done to their module: rows of a matrix, channels of a norm."""
    rows = {matrix.module: matrix.factors.rows for matrix in edited}
    for name, (before, after) in changed.items():
        if name.endswith(".weight"):
            continue
        module = name.rpartition(".")[0]
        by = rows.get(module)
        if by is None and f"{module}.weight" in changed:
            old, new = changed[f"{module}.weight"]
            by = torch.where(old != 0, new.float() / old.float(), 1.0)
        scaled = before.float() * (torch.ones(1) if by is None else by)
        if not torch.allclose(after.float(), scaled, rtol=2.0**-6, atol=1e-30):
            what = "has changed in another way than the weight of its module"
            yield failed("edits", what, f"`{name}`", _AGAIN)


def _shape(weight: StoredTensor | StoredModule) -> tuple[int, int]:
    if isinstance(weight, StoredModule):
        return weight.shape
    n, k = weight.spec.shape
    return n, k


def _words(factors: FittedFactors) -> str:
    """What was multiplied, and by how much."""
    texts = []
    for kind, values in (("rows", factors.rows), ("columns", factors.columns)):
        some = values[values != 1]
        if len(some):
            texts.append(f"{len(some)} {kind} x {float(some.min()):.4g}..{float(some.max()):.4g}")
    return ", ".join(texts)


_OTHER = "this is damage and no rounding: copy the checkpoint again, or convert the model again"
_FLOAT = "floats are copied or multiplied, never rounded to codes: convert the model again"
_DECODED = "; or, if it was made from a quantized model, compare with that one"
_ADVICE = "keep this module float or in a finer scheme, or lower the limit if that is what you want"
