"""The items of a plan, computed by row blocks: from source values to stored tensors, or an error that
names an element.

Conversion writes these blocks, and verification compares with them: there is one arithmetic.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import TensorSpec, safetensors_dtype, torch_dtype
from quantcli.checkpoint.tensors import first_not_finite, read_span, read_tensor
from quantcli.core.errors import InputError
from quantcli.core.kernels import machine
from quantcli.core.numerics import NO_STATS, Parts, Stats
from quantcli.planning.measured import EditFactors
from quantcli.planning.plan import Copy, Item, Quantize, Repack
from quantcli.planning.recode import recode
from quantcli.schemes.arithmetic import rounding
from quantcli.schemes.base import Scheme
from quantcli.targets.base import Target
from quantcli.targets.layouts import Output
from quantcli.targets.module_rows import ModuleReader

BLOCK_ELEMENTS = 512 * 1024  # of a row block: its float32 copy, 2 MB, stays in the cache of a core
COMPILED = 4  # times as many if kernels serve: they go row by row, and each block costs some Python
JOB_BYTES = 4 * 2**20  # of source in one job of the pool


@dataclass(frozen=True)
class Calibrated:
    """The results of calibration for an item.

    row_stats: by name, what reads them for `count` rows of the weight from row `start` on.
    """

    constants: Stats = field(default_factory=lambda: NO_STATS)
    row_stats: Mapping[str, Callable[[int, int], Tensor]] = field(default_factory=dict)
    edit: EditFactors | None = None
    bias_edit: EditFactors | None = None

    def edited(self, rows: Tensor, first_row: int) -> Tensor:
        """Rows of the item's source, from `first_row` on, with its edit if it has one."""
        return rows if self.edit is None else self.edit.apply(rows, first_row)


_NOTHING = Calibrated()


def read_calibrated(item: Item, surveys: Surveys) -> Calibrated:
    """Read the results of calibration for an item, and the constants of its scheme.

    InputError for values that make no sense.
    """
    if isinstance(item, Repack):
        return _NOTHING
    edit = item.edit.load() if item.edit else None
    if isinstance(item, Copy):
        return Calibrated(edit=edit) if edit else _NOTHING
    if not (edit or item.stats or item.bias_edit or item.surveyed):
        return _NOTHING
    constants = measured_constants(item) if item.stats else NO_STATS
    constants = {**constants, **surveys.of(item)}
    row_stats = {name: partial(read_span, stored) for name, stored in item.row_stats.items()}
    return Calibrated(constants, row_stats, edit, item.bias_edit.load() if item.bias_edit else None)


@dataclass(frozen=True, slots=True)
class Job:
    """Rows [start, stop) of one item, for one worker."""

    item: Item
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the source, on disk."""
        return _share(self.item, self.stop) - _share(self.item, self.start)


def jobs_of(items: Iterable[Item]) -> Iterator[Job]:
    """All rows of some items; nothing for empty tensors."""
    for item in items:
        spec = item.source.spec
        if spec.nbytes == 0:
            continue
        step = rows_of_job(item) if spec.itemsize >= 1 else item.height
        for start in range(0, item.height, step):
            yield Job(item, start, min(start + step, item.height))


def rows_of_job(item: Item) -> int:
    """Rows of the jobs of an item, except its last."""
    width = max(1, item.source.nbytes // item.height)
    nbytes = max(JOB_BYTES, item.source.buffer_nbytes)  # what a reader of columns holds is used up
    return _multiple(nbytes // width, getattr(item, "row_multiple", 1))


@dataclass(frozen=True, slots=True)
class Computed:
    """Stored tensors of some rows of an item.

    outputs: each with its element along its axis from which on it holds these numbers.
    start:   the first of these rows of the item's source.
    count:   how many there are.
    nbytes:  of the source, on disk.
    """

    start: int
    count: int
    outputs: list[tuple[Output, int, Tensor]]
    nbytes: int

    @property
    def written(self) -> list[tuple[Output, int, Tensor]]:
        """The outputs to write: a tensor that does not depend on rows is written with the first."""
        return [entry for entry in self.outputs if self.start == 0 or entry[0].rows]


def compute(
    job: Job,
    target: Target,
    calibrated: Calibrated = _NOTHING,
    block_elements: int | None = None,
) -> Iterator[Computed]:
    """Row block by row block; block_elements: of each, by default `elements_of` the item.

    calibrated: of the job's item, see `read_calibrated`. InputError for NaN, Inf, and numbers that the
    target cannot hold.
    """
    item = job.item
    if isinstance(item, Copy):
        yield from _copied(job, item, calibrated, block_elements or BLOCK_ELEMENTS)
        return
    reading = item.source.open() if isinstance(item, Quantize) else ModuleReader(item.module)
    with reading as reader:
        for start, stop in row_blocks(job, block_elements):
            bias = None if item.bias is None else read_span(item.bias, start, stop - start)
            if isinstance(item, Quantize):
                rows = reader.weight(start, stop - start)
                packed = quantize_block(target, item, rows, start, bias, calibrated)
            else:
                assert isinstance(reader, ModuleReader)
                packed = recode(item, target, reader.rows(start, stop - start), start, bias)
            outputs = _as_planned(item, target, packed, start, stop)
            yield Computed(start, stop - start, outputs, _share(item, stop) - _share(item, start))
            del packed, outputs  # their memory is that of the next block


def _as_planned(
    item: Quantize | Repack, target: Target, packed: Mapping[str, Tensor], start: int, stop: int
) -> list[tuple[Output, int, Tensor]]:
    """The tensors of rows [start, stop) as outputs of an item.

    The plan is from a dry run: InputError if these numbers made a scheme or a target give other names,
    dtypes or shapes, whose bytes would be written where they do not belong.
    """
    outputs = []
    module = item.module if isinstance(item, Quantize) else item.module.name
    for output in item.outputs:
        spec, shape = output.spec, list(output.spec.shape)
        if output.rows:
            shape[output.axis] = -(-(stop - start) // output.rows)
        tensor = packed.get(spec.name.removeprefix(f"{module}."))
        given = None
        if isinstance(tensor, Tensor):
            given = safetensors_dtype(tensor.dtype), list(tensor.shape)
        if given != (spec.dtype, shape) or len(packed) != len(item.outputs):
            names = ", ".join(map(str, packed))
            got = "{} {}".format(*given) if given and len(packed) == len(item.outputs) else names
            raise InputError(
                f"target `{target.name}` packs other tensors than it did for the plan: it gives {got}, "
                f"not {spec.dtype} {shape}",
                where=f"`{spec.name}`, rows from {start}",
                fix="use another target or scheme, or mend the one of them that is not quantcli's",
            )
        assert isinstance(tensor, Tensor)
        outputs.append((output, output.first(start), tensor))
    return outputs


def elements_of(item: Quantize | Repack) -> int:
    """Elements of a row block of an item. Larger if nothing but compiled loops goes over them."""
    if isinstance(item, Repack) or item.source.kind or item.edit or item.scheme.numerics.transform:
        return BLOCK_ELEMENTS
    if machine.available():
        return COMPILED * BLOCK_ELEMENTS
    return BLOCK_ELEMENTS


def row_blocks(job: Job, elements: int | None = None) -> Iterator[tuple[int, int]]:
    """The first row of each block of a job's matrix, and the row after its last."""
    item = job.item
    assert not isinstance(item, Copy)
    elements = elements or elements_of(item)
    width = item.source.spec.shape[1] if isinstance(item, Quantize) else item.module.shape[1]
    step = _multiple(elements // width, item.row_multiple)
    for start in range(job.start, job.stop, step):
        yield start, min(start + step, job.stop)


def _copied(job: Job, item: Copy, calibrated: Calibrated, block_elements: int) -> Iterator[Computed]:
    (out,), source = item.outputs, item.source
    if source.spec.itemsize < 1:
        yield from _copied_bytes(out, source)
        return
    each = 1
    if len(source.spec.shape) > 2 and item.edit is None:
        # a row of a stack is all of an expert: cut it into the rows of its matrix
        each, shape = source.spec.shape[1], source.spec.shape
        rows = (shape[0] * each, *shape[2:])
        source = replace(source, spec=replace(source.spec, shape=rows))
        out = Output(replace(out.spec, shape=rows))
    spec = source.spec
    step = max(1, int(2 * block_elements * spec.itemsize) // spec.row_nbytes)
    with source.open() as reader:
        for start in range(job.start * each, job.stop * each, step):
            stop = min(start + step, job.stop * each)
            copied = copy_block(item, reader.weight(start, stop - start), start, calibrated)
            nbytes = _share(item, stop, each) - _share(item, start, each)
            yield Computed(start, stop - start, [(out, start, copied)], nbytes)


def _copied_bytes(out: Output, source: StoredTensor) -> Iterator[Computed]:
    """All bytes of a tensor whose elements are smaller than a byte: a row may end within one."""
    spec = TensorSpec(source.spec.name, "U8", (source.spec.nbytes,))
    out, source = Output(spec), replace(source, spec=spec)
    with source.open() as reader:
        for start in range(0, spec.nbytes, BLOCK_ELEMENTS):
            copied = reader.weight(start, BLOCK_ELEMENTS)
            yield Computed(start, len(copied), [(out, start, copied)], len(copied))


def _share(item: Item, rows: int, each: int = 1) -> int:
    """Bytes on disk of an item's first rows; each: of them in a row of the tensor."""
    return item.source.nbytes * rows // (item.height * each)


def _multiple(rows: int, of: int) -> int:
    """The largest multiple of `of` that is at most `rows`; at least `of`."""
    return max(of, rows // of * of)


def copy_block(item: Copy, rows: Tensor, first_row: int, calibrated: Calibrated) -> Tensor:
    """Rows of a tensor that stays float: the same ones, edited, or in another dtype.

    InputError for what that dtype cannot hold.
    """
    edited = calibrated.edited(rows, first_row)
    converted = edited.to(torch_dtype(item.dtype or item.source.spec.dtype))
    if item.dtype is not None and not bool(torch.isfinite(converted).all()):
        name = item.source.spec.name
        error = not_finite(name.rpartition(".")[2], rows, item.source, first_row)
        if error is not None:
            raise error
        raise InputError(
            f"a value overflows {item.dtype}, in which the model is served",
            where=f"`{name}`, rows from {first_row}, in {item.source.file.name}",
            fix="serve in bfloat16 (`dtype` in config.json)",
        )
    return converted


def quantize_block(
    target: Target,
    item: Quantize,
    rows: Tensor,
    first_row: int,
    bias: Tensor | None,
    calibrated: Calibrated,
) -> dict[str, Tensor]:
    """Rows [n, k] of a weight, from `first_row` on, edited, quantized and packed: tensors by suffix.

    bias: of these rows [n]. InputError for NaN and Inf.
    """
    source, source_bias = rows, bias
    rows = calibrated.edited(rows, first_row)
    if calibrated.bias_edit is not None and bias is not None:
        bias = calibrated.bias_edit.apply(bias, first_row)
    constants = calibrated.constants
    if calibrated.row_stats:
        count = len(rows)
        row_stats = {name: read(first_row, count) for name, read in calibrated.row_stats.items()}
        if "codes" in row_stats:
            _check_codes(row_stats["codes"], item)
        if "scales" in row_stats:
            _check_scales(row_stats["scales"], item)
        constants = {**constants, **row_stats}
    parts = item.scheme.quantize(rows, torch_dtype(item.engine_dtypes.weight_scale), constants, bias)
    if not math.isfinite(float(parts["weight_scale"].abs().amax())):  # NaN passes through amax
        raise _not_finite(source, source_bias, first_row, item)
    parts["weight_scale"] = parts["weight_scale"].to(torch_dtype(item.engine_dtypes.weight_scale))
    n, k = item.source.spec.shape
    return target.pack_module(item.module, item.scheme.numerics, parts, (n, k))


def _check_codes(codes: Tensor, item: Quantize) -> None:
    """InputError for stored codes that the type of the item's weights does not have."""
    element = item.scheme.numerics.weight.element
    if element.family == "int":
        least, largest = codes.aminmax()
        sound = element.least <= int(least) and int(largest) <= element.largest
    else:  # of two in a byte, each is a number
        sound = element.per_byte > 1 or bool(torch.isfinite(codes.float()).all())
    if not sound:
        raise InputError(
            f"the calibration has codes that {element.name} does not have",
            where=f"`{item.module}` in {item.row_stats['codes'].file}",
            fix="calibrate again, in another folder",
        )


def _check_scales(scales: Tensor, item: Quantize) -> None:
    """InputError for stored scales that the engine cannot hold as they are."""
    dtype = torch_dtype(item.engine_dtypes.weight_scale)
    rounded = scales.to(dtype).float()
    if not bool((torch.isfinite(scales) & (scales != 0) & (rounded == scales)).all()):
        raise InputError(
            f"the calibration has scales that {str(dtype)[6:]} cannot hold",
            where=f"`{item.module}` in {item.row_stats['scales'].file}",
            fix="calibrate again, in another folder",
        )


def measured_constants(item: Quantize) -> Parts:
    """The scheme's constants from a module's statistics. InputError for values that make no sense."""
    shared = item.stats.keys() - item.scheme.row_stats
    stats = {name: read_tensor(item.stats[name]) for name in shared}
    try:
        return item.scheme.constants(stats, torch_dtype(item.engine_dtypes.input_scale))
    except InputError as error:
        file = next(iter(item.stats.values())).file
        raise InputError(error.what, where=f"`{item.module}` in {file}", fix=error.fix) from None


def _not_finite(rows: Tensor, bias: Tensor | None, first_row: int, item: Quantize) -> InputError:
    """The error for a block whose scale is not finite: which element, or that the scale overflows."""
    error = not_finite("weight", rows, item.source, first_row)
    if error is None and bias is not None and item.bias is not None:
        error = not_finite("bias", bias, item.bias, first_row)
    if error is not None:
        return error
    engine_dtype = item.engine_dtypes.weight_scale
    return InputError(
        f"the scale of a row overflows {engine_dtype}, in which the engine holds it",
        where=f"`{item.source.spec.name}`, rows from {first_row}, in {item.source.file.name}",
        fix="serve in bfloat16 (`dtype` in config.json), or keep this module float",
    )


_KEPT = 64  # results of surveys: those that workers are at, and some before


class Surveys:
    """Maxima of whole weights, from a first pass over them, for schemes that need them for every row.

    Each weight, or group of weights that share a scale, is read once a run, by the first worker that
    needs it. Threads may share it.
    """

    def __init__(self) -> None:
        self._found: OrderedDict[str, Stats] = OrderedDict()
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Surveys], tuple[()]]:
        """Another process finds them anew."""
        return Surveys, ()

    def of(self, item: Quantize) -> Stats:
        """The constants that an item's scheme asks for, as `survey` finds them."""
        if not item.surveyed:
            return NO_STATS
        key = item.surveyed[0][0].spec.name
        with self._lock:
            lock = self._locks[key]
        with lock:
            found = self._found.get(key)
            if found is None:
                weights = [(stored, edit.load() if edit else None) for stored, edit in item.surveyed]
                found = survey(item.scheme, weights)
                with self._lock:
                    self._found[key] = found
                    while len(self._found) > _KEPT:
                        self._locks.pop(self._found.popitem(last=False)[0], None)
        return found


def survey(scheme: Scheme, weights: Iterable[tuple[StoredTensor, EditFactors | None]]) -> Stats:
    """Constants that a scheme asks for, of weights with their edits: `weight_amax` float32 [1] and
    `weight_coarse` bool [1], whether each number is 0, or 1 or 1.5 times a power of two; or else
    `column_amax` float32 [k], of the first.

    InputError for NaN and Inf.
    """
    surveys = [_survey(stored, factors) for stored, factors in weights]
    if not scheme.needs_weight_amax:
        return {"column_amax": surveys[0][0]}
    amax = torch.stack([amax.amax() for amax, _ in surveys]).amax().view(1)
    return {"weight_amax": amax, "weight_coarse": torch.tensor([all(coarse for _, coarse in surveys)])}


def _survey(stored: StoredTensor, factors: EditFactors | None) -> tuple[Tensor, bool]:
    """max |w| of each column of a weight, edited: float32 [k]; whether its numbers are coarse."""
    n, k = stored.spec.shape
    step = max(1, BLOCK_ELEMENTS // k)
    amax = torch.zeros(1, k)
    coarse = True
    for start in range(0, n, step):
        rows = read_span(stored, start, min(step, n - start))
        edited = rows if factors is None else factors.apply(rows, start)
        amax = torch.maximum(amax, rounding.absmax(edited, dim=0))
        if not bool(torch.isfinite(amax).all()):
            raise not_finite("weight", rows, stored, start) or InputError(
                "the calibration's edit makes this weight overflow",
                where=f"`{stored.spec.name}`, rows from {start}, in {stored.file.name}",
                fix="leave it out of `smooth`, or of what else edits it, or keep this module float",
            )
        coarse = coarse and _coarse(edited[:1]) and _coarse(edited)
    return amax.squeeze(0), coarse


def _coarse(rows: Tensor) -> bool:
    """Whether each number is 0, or 1 or 1.5 times a power of two: at most one bit after the first."""
    return not bool((rows.float().view(torch.int32) & 0x3FFFFF).any())


def not_finite(kind: str, rows: Tensor, stored: StoredTensor, first_row: int) -> InputError | None:
    """The error for the first NaN or Inf among rows of a stored tensor; None if all are finite.

    If the rows were decoded, it names the stored tensor that they were decoded from.
    """
    bad = (~torch.isfinite(rows)).nonzero()
    if not len(bad):
        return None
    index, value = bad[0].tolist(), float(rows[tuple(bad[0])])
    index[:1] = [first_row + row for row in index[:1]]
    for part in stored.parts if stored.kind else ():
        if (first := first_not_finite(part)) is not None:
            index, value = first
            stored, kind = part, part.spec.name.rpartition(".")[2]
            break
    place = f"[{', '.join(map(str, index))}]" if index else ""
    return InputError(
        f"{kind} is {value}",
        where=f"`{stored.spec.name}`{place} in {stored.file.name}",
        fix="the model is damaged: fetch it again and run with --fresh, or keep this module float",
    )
