"""A conversion made again from its source: every number that the recipe fixes, bit by bit.

The recipe is that of the manifest. Both came with the checkpoint and are not trusted: a wrong recipe
makes other numbers, and a missing one is told in the report.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from quantcli import __version__
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.files import MANIFEST, RECIPE_FILE, SOURCE_RECIPE
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import TensorSpec, torch_dtype
from quantcli.checkpoint.tensors import read_span
from quantcli.core.errors import InputError
from quantcli.core.events import Progress
from quantcli.core.findings import Finding, failed, noted, of_error
from quantcli.core.threads import thread_pool
from quantcli.planning.block import Calibrated, Job, WeightAmax, compute, jobs_of, read_calibrated
from quantcli.planning.measured import Measured
from quantcli.planning.plan import Copy, Item, Plan, Quantize, Repack, Work, quantized_items
from quantcli.planning.planner import make_plan
from quantcli.planning.recode import recode
from quantcli.planning.repack import plan_repacking
from quantcli.recipe.recipe import Recipe, load_recipe
from quantcli.schemes.integer import OTHER_SCALES, Int4Weights, least_elsewhere
from quantcli.targets.base import StoredCheckpoint, Target
from quantcli.targets.layouts import StoredModule
from quantcli.targets.module_rows import ModuleReader
from quantcli.verification.outcome import CONVERT, Report
from quantcli.verification.structure import Structure, layer_of

_CHECK = "recomputed"
_NOT = "codes and scales were not recomputed"
_GIVE = "give --calibration DIR, the folder that `quantize` kept"
_DAMAGE = frozenset({"headers", "index"})


class _CannotBe(Exception):
    """Nothing can be recomputed; the reason as text."""


@dataclass(frozen=True)
class Recomputation:
    """A conversion that can be made again.

    plan:    of the conversion, or of packing.
    stored:  the checkpoint that is verified.
    target:  its format, if the plan's numbers were packed into it afterwards; None: the plan's.
    known:   calibration results are given, or the plan has none.
    """

    plan: Work
    stored: StoredCheckpoint
    target: Target | None
    known: bool
    surveys: WeightAmax = field(default_factory=WeightAmax)

    def run(self, report: Report, workers: int, progress: Progress) -> None:
        """Make it again and compare; findings go to the report. Memory: a row block for each worker."""
        items = [item for shard in self.plan.shards for item in shard.items]
        possible = [item for item in items if self._possible(item)]
        if len(possible) < len(items):
            what = f"{_NOT} for {len(items) - len(possible)} of {len(items)} tensors of the source"
            report.not_checked.append(f"{what}, which smoothing or transforms may have edited: {_GIVE}")
        report.add(self._unplanned(items))
        comparable = []
        for item in possible:
            if found := list(self._unlike(item)):
                report.add(found)
            else:
                comparable.append(item)
        self._tell_given(comparable, report)
        progress.begin(sum(item.source.nbytes for item in comparable), len(self.plan.shards))
        differences: dict[str, _Difference] = {}
        with thread_pool(workers) as pool:
            for job in [pool.submit(self._compare, job, progress) for job in jobs_of(comparable)]:
                try:
                    found_here = job.result()
                except InputError as error:
                    report.add([of_error(_CHECK, error)])
                    continue
                for difference in found_here:
                    first = differences.get(difference.name)
                    differences[difference.name] = first.with_more(difference) if first else difference
        report.add(difference.finding() for difference in differences.values())
        report.count(_CHECK, sum(len(self._compared(item)) for item in comparable))

    # -- what can be made again ----------------------------------------------------------------------

    def _possible(self, item: Item) -> bool:
        """Whether all edits of an item are known: without calibration, none in a decoder layer are."""
        if self.known or not isinstance(self.plan, Plan):
            return True
        learns = any(i.scheme.schedule for i in quantized_items(self.plan))
        edits = learns or self.plan.recipe.file.smooth is not None
        return not edits or layer_of(item.source.spec.name) is None

    def _given(self, item: Item) -> frozenset[str]:
        """The names of statistics and codes that come from the checkpoint itself."""
        return item.asked if isinstance(item, Quantize) and not item.stats else frozenset()

    def _specs(self, item: Item) -> tuple[TensorSpec, ...]:
        """The tensors that there should be."""
        if self.target is None or isinstance(item, Repack):
            return item.outputs
        if isinstance(item, Quantize):
            module = self.stored.modules.get(item.module)
            parts = () if module is None else module.tensors.items()
            return tuple(stored.spec for suffix, stored in parts if suffix != "bias")
        (spec,) = item.outputs
        bias = self.stored.modules.get(spec.name.removesuffix(".bias"))
        numerics = bias.numerics if bias else None
        dtype = self.target.bias_dtype(numerics) if numerics and spec.name.endswith(".bias") else None
        return (replace(spec, dtype=dtype or spec.dtype),)

    def _compared(self, item: Item) -> list[TensorSpec]:
        """Those that the source determines: not what was taken from the checkpoint itself."""
        specs, given = self._specs(item), self._given(item)
        if not given or not isinstance(item, Quantize):
            return list(specs)
        module = self.stored.modules[item.module]
        taken = [param.suffix for param in module.constants if param.suffix.startswith("input_")]
        taken += [module.layout.weight.suffix] if "codes" in given else []
        return [spec for spec in specs if spec.name.removeprefix(f"{item.module}.") not in taken]

    def _unlike(self, item: Item) -> Iterator[Finding]:
        """Findings for tensors that are missing, or of another dtype or shape."""
        tensors = self.stored.checkpoint.tensors
        if isinstance(item, Quantize):
            module = self.stored.modules.get(item.module)
            label = (self.target or self.plan.target).label(item.scheme.numerics)
            if module is None or module.layout.label != label:
                here = "float or damaged" if module is None else module.layout.label
                what = f"the recipe makes this module {label}; it is {here}"
                yield failed(_CHECK, what, f"`{item.module}`", CONVERT)
                return
        for spec in self._specs(item):
            stored = tensors.get(spec.name)
            if stored is None or stored.spec != spec:
                here = "there is none" if stored is None else f"it is {stored.spec}"
                yield failed(
                    _CHECK, f"the recipe makes {spec} of it; {here}", f"`{spec.name}`", CONVERT
                )

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
            yield failed(_CHECK, what, f"`{name}`", CONVERT)

    def _tell_given(self, items: list[Item], report: Report) -> None:
        """Say in the report which numbers were taken from the checkpoint itself."""
        counts = Counter[str]()
        for item in items:
            given = self._given(item)
            counts["codes that data chose"] += "codes" in given
            counts["ranges of inputs"] += bool(given - {"codes"})
        for what, modules in counts.items():
            if modules:
                report.not_checked.append(f"{what} were not recomputed in {modules} modules: {_GIVE}")

    # -- one job -------------------------------------------------------------------------------------

    def _compare(self, job: Job, progress: Progress) -> list[_Difference]:
        """The first differences of some rows of an item's tensors."""
        tensors, item = self.stored.checkpoint.tensors, job.item
        compared = {spec.name for spec in self._compared(item)}
        found: dict[str, _Difference] = {}
        calibrated = self._calibrated(item)
        for rows in compute(job, self.plan.target, calibrated):
            outputs = rows.outputs
            if self.target is not None and isinstance(item, Quantize):
                outputs = list(self._packed(item, rows.start, outputs))
            elif self.target is not None:
                (spec,) = self._specs(item)
                outputs = [(spec, row, t.to(torch_dtype(spec.dtype))) for _, row, t in outputs]
            here = {s.name: read_span(tensors[s.name], row, len(made)) for s, row, made in outputs}
            unlike = [
                difference
                for spec, first_row, made in outputs
                if spec.name in compared
                and (difference := _difference(spec, first_row, here[spec.name], made))
            ]
            if unlike and not self._added_otherwise(item, rows.start, here, outputs, calibrated):
                for difference in unlike:
                    first = found.get(difference.name)
                    found[difference.name] = first.with_more(difference) if first else difference
            progress.advance(rows.nbytes)
        return list(found.values())

    def _added_otherwise(
        self,
        item: Item,
        start: int,
        here: Mapping[str, Tensor],
        outputs: list[tuple[TensorSpec, int, Tensor]],
        calibrated: Calibrated,
    ) -> bool:
        """Whether a CPU that adds floats in another order may have made these rows instead.

        Only scales of int4 with `clip: mse` depend on such sums; their codes follow from the scales.
        """
        if not isinstance(item, Quantize) or not isinstance(item.scheme, Int4Weights):
            return False
        if item.scheme.clip != "mse" or self.target is not None:
            return False
        scheme, prefix = item.scheme, len(item.module) + 1
        parts = self.plan.target.unpack(scheme.numerics, {n[prefix:]: t for n, t in here.items()})
        made = self.plan.target.unpack(
            scheme.numerics, {spec.name[prefix:]: tensor for spec, _, tensor in outputs}
        )
        rows = read_span(item.source, start, len(parts["weight"]))
        values = scheme.to_round(calibrated.edited(rows, start), dict(calibrated.constants))
        width = values.shape[1] // parts["weight_scale"].shape[1]
        values, scale = values.view(-1, width), parts["weight_scale"].float().view(-1, 1)
        codes = parts["weight"].reshape(values.shape)
        follow = made["weight"] if "codes" in calibrated.row_stats else scheme.rounded(values, scale)
        if not torch.equal(codes, follow.reshape(values.shape)):
            return False
        dtype = torch_dtype(item.engine_dtypes.weight_scale)
        expected = made["weight_scale"].float().view(-1, 1)
        near = torch.isclose(scale, expected, rtol=OTHER_SCALES, atol=0) & (dtype == torch.float32)
        unlike = (~near & (scale != expected)).flatten().nonzero().flatten()
        return all(least_elsewhere(values[row], scale[row], dtype) for row in unlike.tolist())

    def _calibrated(self, item: Item) -> Calibrated:
        """The results of calibration for an item: those that were given, else the stored ones."""
        calibrated, given = read_calibrated(item, self.surveys), self._given(item)
        if not given or not isinstance(item, Quantize):
            return calibrated
        module, target, numerics = (
            self.stored.modules[item.module],
            self.plan.target,
            item.scheme.numerics,
        )

        def parts(start: int, count: int) -> dict[str, Tensor]:
            with ModuleReader(module) as reader:
                return dict(target.unpack(numerics, reader.rows(start, count)))

        constants = calibrated.constants
        if given - {"codes"}:
            shared = parts(0, item.row_multiple)
            try:
                measured = item.scheme.constants(shared, torch_dtype(item.engine_dtypes.input_scale))
            except InputError as error:
                raise InputError(error.what, where=f"`{item.module}`", fix=CONVERT) from None
            constants = {**measured, **constants}
        codes = {"codes": lambda start, count: parts(start, count)["weight"]}
        return replace(calibrated, constants=constants, row_stats=codes if "codes" in given else {})

    def _packed(
        self, item: Quantize, start: int, outputs: list[tuple[TensorSpec, int, Tensor]]
    ) -> Iterator[tuple[TensorSpec, int, Tensor]]:
        """The tensors of some rows in the format of `target`."""
        assert self.target is not None
        module = self.stored.modules[item.module]
        prefix = len(item.module) + 1
        repack = Repack(
            module.codes,
            StoredModule(
                item.module,
                module.layout,
                module.tensors,
                module.shape,
                self.plan.serving_dtype,
                item.scheme.numerics,
            ),
            self.plan.target,
            (),
        )
        stored = {spec.name[prefix:]: tensor for spec, _, tensor in outputs}
        count = len(next(iter(stored.values())))
        bias = None if item.bias is None else read_span(item.bias, start, count)
        for suffix, tensor in recode(repack, self.target, stored, start, bias).items():
            spec = module.tensors[suffix].spec
            once = any(param.suffix == suffix for param in module.constants)
            if start == 0 or not once:
                yield spec, 0 if once else repack.first_row(spec, start), tensor


@dataclass(frozen=True)
class _Difference:
    """Numbers of a stored tensor that are not those that were made again.

    here, made: the first of them, at `index`. count: how many there are.
    """

    name: str
    index: tuple[int, ...]
    here: str
    made: str
    count: int

    def with_more(self, other: _Difference) -> _Difference:
        """Both, of one tensor."""
        return replace(min(self, other, key=lambda d: d.index), count=self.count + other.count)

    def finding(self) -> Finding:
        """As an error that names the first element."""
        place = f"[{', '.join(map(str, self.index))}]"
        more = f", and {self.count - 1:,} more differ" if self.count > 1 else ""
        what = f"is {self.here}; the recipe makes {self.made} of the source{more}"
        return failed(_CHECK, what, f"`{self.name}`{place}", CONVERT)


def _difference(spec: TensorSpec, first_row: int, here: Tensor, made: Tensor) -> _Difference | None:
    """The difference of some rows of a tensor, from `first_row` on; None if they have the same bits."""
    made = made.reshape(here.shape)
    if torch.equal(_bytes(here), _bytes(made)):
        return None
    unlike = (_bytes(here) != _bytes(made)).view(-1, here.element_size()).any(1)
    place = int(unlike.int().argmax())
    width = max(1, here[0].numel() if here.dim() > 1 else 1)
    index = [first_row + place // width, place % width][: max(1, len(spec.shape))]
    return _Difference(
        spec.name, tuple(index), _text(here, place), _text(made, place), int(unlike.sum())
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _text(tensor: Tensor, place: int) -> str:
    value = tensor.reshape(-1)[place]
    return f"{float(value):.9g}" if value.is_floating_point() else str(int(value))


# -- before it begins ----------------------------------------------------------------------------


def recomputation(structure: Structure, model: Path, calibration: Path | None) -> Recomputation | None:
    """How a checkpoint is made again from `model`; None if it cannot be, which goes to the report.

    calibration: the folder that `quantize` kept. InputError for one of something else.
    """
    report = structure.report
    try:
        return _prepare(structure, model, calibration)
    except _CannotBe as reason:
        if calibration is not None:
            report.add([noted(_CHECK, f"the calibration was not used: {reason}", str(calibration))])
        report.not_checked.append(f"{_NOT}: {reason}")
        return None


def _prepare(structure: Structure, model: Path, calibration: Path | None) -> Recomputation:
    manifest, stored, target = structure.manifest, structure.stored, structure.target
    assert stored is not None
    assert target is not None
    if not structure.whole or any(f.check in _DAMAGE for f in structure.report.errors):
        raise _CannotBe("weight files are missing or damaged")
    if manifest is None:
        raise _CannotBe(f"no sound {MANIFEST} says how they were made")
    source, tool = manifest.get("source"), manifest.get("tool")
    version = tool.get("version") if isinstance(tool, dict) else None
    if version != __version__:
        what = f"made by quantcli {version!s:.40}; this is {__version__}, which may round otherwise"
        structure.report.add([noted(_CHECK, what)])
    checkpoint = open_checkpoint(model)
    same = isinstance(source, dict) and source.get("fingerprint") == checkpoint.fingerprint
    packed = manifest.get("state") == "lossless"
    if packed and same:
        try:
            return Recomputation(plan_repacking(checkpoint, target), stored, None, True)
        except InputError as error:
            raise _CannotBe(f"MODEL cannot be packed as the manifest says: {error.what}") from None
    if not packed and not same:
        raise _CannotBe("the manifest names another source than MODEL, by its headers")
    recipe = _recipe(structure, SOURCE_RECIPE if packed else RECIPE_FILE)
    try:
        plan = make_plan(recipe, checkpoint)
    except InputError as error:
        raise _CannotBe(f"MODEL does not fit the manifest's recipe: {error.what}") from None
    if not packed and plan.target.name != target.name:
        raise _CannotBe(f"the manifest's recipe is for {plan.target.name}, this is {target.name}")
    measured = None
    if plan.needs_calibration and calibration is not None:
        from quantcli.calibration.session import measured_for

        measured = measured_for(plan, calibration)
        plan = make_plan(recipe, checkpoint, measured)
    elif calibration is not None:
        raise InputError(
            "nothing in the checkpoint's recipe needs a calibration",
            where=f"--calibration {calibration}",
            fix="leave --calibration out",
        )
    elif plan.measured and packed:
        raise _CannotBe(f"ranges of inputs are stored in another form since it was packed: {_GIVE}")
    elif plan.measured:
        plan = make_plan(recipe, checkpoint, _claimed(plan, stored))
    return Recomputation(plan, stored, target if packed else None, measured is not None)


def _claimed(plan: Plan, stored: StoredCheckpoint) -> Measured:
    """Modules that were measured, as far as their types tell; no token reached the others."""
    labels = {name: module.layout.label for name, module in stored.modules.items()}
    measured: dict[str, dict[str, StoredTensor]] = {
        item.module: {}
        for item in quantized_items(plan)
        if labels.get(item.module) == plan.target.label(item.scheme.numerics)
    }
    return Measured(stats=measured)


def _recipe(structure: Structure, file: str) -> Recipe:
    """The recipe of the manifest, read like any other."""
    assert structure.manifest is not None
    assert structure.checkpoint is not None
    path, text = structure.checkpoint.path / file, structure.manifest.get("recipe")
    if not isinstance(text, str) or not path.is_file() or path.read_bytes() != text.encode():
        raise _CannotBe(f"the manifest's recipe is not that of {file}")
    try:
        recipe = load_recipe(path)
    except InputError as error:
        raise _CannotBe(f"the manifest's recipe cannot be read: {error.what}") from None
    for rule in (*recipe.rules, *recipe.smooth):
        for pattern in rule.patterns:
            if _may_be_slow(pattern):
                raise _CannotBe(f"a pattern of the recipe may take very long to match: {pattern:.80}")
    return recipe


def _may_be_slow(pattern: str) -> bool:
    """Whether a regular expression might try very many ways to match a name.

    A group that is repeated, or more than a few repetitions and choices. Globs are always fast.
    """
    if not pattern.startswith("re:"):
        return False
    repeated = re.search(r"\)[*+{]", pattern) is not None
    return repeated or len(re.findall(r"[*+{]", pattern)) > 3 or len(re.findall(r"[?(]", pattern)) > 6
