"""Outliers of float weights, which make them hard to quantize, streamed by blocks of rows."""

from __future__ import annotations

import glob
import itertools
import json
import math
import statistics
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.inspection import fold
from quantcli.checkpoint.spec import FLOATS, TensorSpec, torch_dtype
from quantcli.core.errors import InputError, named
from quantcli.core.events import SILENT, Progress
from quantcli.core.registry import discover
from quantcli.core.text import count
from quantcli.core.threads import default_workers, thread_pool
from quantcli.planning.matching import refuse_transposed
from quantcli.planning.planner import serving_dtype
from quantcli.schemes.base import Scheme
from quantcli.schemes.integer import Int4Weights
from quantcli.sources.decode import decoded
from quantcli.targets.base import Target
from quantcli.targets.vllm_family import EXPERT, fused_name

BLOCK_ELEMENTS = 256 * 1024  # of a row block: its float64 copy, 2 MB, stays in the cache of a core
_MOST_DB = 200.0  # SQNR if no weight changes; -200 if a scale overflows


def inspect_outliers(
    checkpoint: Checkpoint,
    target: Target,
    *,
    workers: int | None = None,
    progress: Progress = SILENT,
    block_elements: int = BLOCK_ELEMENTS,
) -> dict[str, Any]:
    """Statistics of every float matrix, worst first: JSON-able, without NaN or Inf.

    path:      the checkpoint's folder.
    ranked_by: the operand by whose SQNR modules are ranked.
    operands:  how weights are stored, such as "int8 per channel" -> the schemes that store them so.
    modules:   one dict a matrix:
        module         its name, without `.weight`.
        shape          as stored. Stacked experts, 3-D, are taken as rows of the last dimension.
        amax_over_rms  largest |w| over the root mean square of all; None where all are 0.
        kurtosis       excess kurtosis about the mean, 0 for normal weights; None where all are equal.
        channel_ratio  rms of the largest column (input channel) over the median of the columns that
                       are not all 0; None where all are.
        channel        which column that is, from 0.
        sqnr_db        by operand: 10 log10(sum w^2 / sum (v - w)^2) with v the dequantized
                       weight; 200 if nothing is lost, -200 if a scale overflows.
        not_finite     None, or {"value": "nan", "index": [row, column]} for the first NaN or Inf: then
                       all numbers above are None, in sqnr_db too.
    left_out:  tensors that are not float matrices: {"why", "tensors" (how many), "names" (folded)}.
    verdict:   {"hard", "what"}: whether the weights are hard to quantize, and why, in one sentence.
    advice:    see `keep_advice`.

    Reads every weight once. Memory is a block of `block_elements` per worker in its several forms, or
    one row where that is wider; numbers are the same for any number of workers. A quantized checkpoint
    is decoded. Raises InputError for what cannot be, and for one that stores its weights transposed.
    """
    checkpoint = decoded(checkpoint)
    refuse_transposed(checkpoint)
    matrices, left_out = _choose(checkpoint)
    methods, operands = _methods(target, serving_dtype(checkpoint, target.served_in)[0])
    files = {file: list(group) for file, group in itertools.groupby(matrices, lambda m: m.file.name)}
    progress.begin(sum(stored.nbytes for stored in matrices), len(files))
    stop = threading.Event()
    found = []
    with thread_pool(workers or default_workers()) as pool:
        try:
            futures = {
                file: [pool.submit(_measure, m, methods, progress, stop, block_elements) for m in group]
                for file, group in files.items()
            }
            for file, group in files.items():
                found += [future.result() for future in futures[file]]
                progress.shard(file, sum(stored.nbytes for stored in group), reused=False)
        except BaseException:
            stop.set()
            raise
    modules = rank(found)
    advice = keep_advice(modules)
    return {
        "path": named(str(checkpoint.path)),
        "ranked_by": RANKED_BY,
        "operands": operands,
        "modules": modules,
        "left_out": left_out,
        "verdict": verdict(modules, advice),
        "advice": advice,
    }


def _choose(checkpoint: Checkpoint) -> tuple[list[StoredTensor], list[dict[str, Any]]]:
    """The tensors to measure, in the order of the files, and an account of the others."""
    chosen = []
    others: dict[str, list[TensorSpec]] = defaultdict(list)
    for name, stored in checkpoint.tensors.items():
        spec = stored.spec
        stacked = len(spec.shape) == 3 and "experts" in name.split(".")
        if not stacked and (len(spec.shape) != 2 or not name.endswith(".weight")):
            others["no weight matrix"].append(spec)
        elif spec.dtype not in FLOATS:
            others["not bfloat16, float16 or float32"].append(spec)
        elif spec.numel == 0:
            others["empty"].append(spec)
        else:
            chosen.append(stored)
    return chosen, [
        {"why": why, "tensors": len(specs), "names": [group.name for group in fold(specs)]}
        for why, specs in sorted(others.items())
    ]


@dataclass(frozen=True)
class _Method:
    """A scheme that quantizes weights without data, for the operand that it makes."""

    scheme: Scheme
    engine_dtype: torch.dtype  # of weight_scale in the engine

    def squared_error(self, rows: Tensor, exact: Tensor) -> float:
        """Sum of (dequantized - exact)^2. rows: [n, k] as stored; exact: the same in float64."""
        found = self.scheme.dequantize(self.scheme.quantize(rows, self.engine_dtype))
        error = found[:, : rows.shape[1]].double() - exact  # two codes in a byte may be one too many
        return float(torch.dot(error.view(-1), error.view(-1)))


def _methods(target: Target, serving: str) -> tuple[dict[str, _Method], dict[str, list[str]]]:
    """By operand of the weight: what quantizes rows, and the names of all schemes that have it.

    Of schemes that need no data, the first stands for all others with its operand: their weights
    differ only by what data tells of inputs. Int4 is clipped where the squared error, of which SQNR
    tells, is least.
    """
    methods: dict[str, _Method] = {}
    operands: dict[str, list[str]] = {}
    for name, scheme_class in discover(Scheme).items():
        scheme = scheme_class()
        if scheme.numerics.transform:
            continue  # stores other weights than those that are looked at here
        if isinstance(scheme, Int4Weights):
            scheme = scheme.model_copy(update={"clip": "mse"})
        operand = scheme.numerics.weight
        scales = f" {operand.scale}" if operand.scale else ""
        label = f"{operand.dtype}{scales} per {operand.per}"
        operands.setdefault(label, []).append(name)
        if label not in methods and _by_rows_alone(scheme):
            try:
                engine_dtype = target.engine_dtype(scheme.numerics, "weight_scale", serving)
            except InputError:  # the target has no such weights
                continue
            methods[label] = _Method(scheme, torch_dtype(engine_dtype))
    return methods, {label: operands[label] for label in methods}


class _Sums:
    """Sums over the rows of one matrix, in float64.

    Moments are sums of powers of w - shift, with the first block's mean for `shift`: about 0 they would
    cancel in matrices whose mean is far from it.
    """

    def __init__(self, columns: int, methods: Mapping[str, _Method]) -> None:
        self._methods = methods
        self._errors = dict.fromkeys(methods, 0.0)
        self._squares = torch.zeros(columns, dtype=torch.float64)  # sum of w^2 of each column
        self._powers = torch.zeros(4, dtype=torch.float64)
        self._shift = 0.0
        self._count = 0
        self._amax = 0.0

    def add(self, rows: Tensor) -> bool:
        """Count rows [n, k], as stored. False, and nothing is counted, if a value is NaN or Inf."""
        exact = rows.double()
        shift = self._shift if self._count else float(exact.mean())
        d = (exact - shift).view(-1)
        d2 = d * d
        powers = torch.stack([d.sum(), d2.sum(), torch.dot(d, d2), torch.dot(d2, d2)])
        if not bool(torch.isfinite(powers).all()):  # powers of a float32 fit float64
            return False
        low, high = rows.aminmax()
        self._amax = max(self._amax, -float(low), float(high))
        self._shift = shift
        self._count += rows.numel()
        self._powers += powers
        self._squares += torch.linalg.vecdot(exact, exact, dim=0)
        for label, method in self._methods.items():
            self._errors[label] += method.squared_error(rows, exact)
        return True

    def to_json(self) -> dict[str, Any]:
        """The numbers of one module."""
        signal = float(self._squares.sum())
        ratio, channel = self._largest_channel()
        return {
            "amax_over_rms": self._amax / math.sqrt(signal / self._count) if signal else None,
            "kurtosis": self._kurtosis(),
            "channel_ratio": ratio,
            "channel": channel,
            "sqnr_db": {label: _decibels(signal, error) for label, error in self._errors.items()},
            "not_finite": None,
        }

    def _kurtosis(self) -> float | None:
        m1, s2, s3, s4 = (self._powers / self._count).tolist()
        variance = s2 - m1**2
        if variance <= 0:
            return None
        fourth = s4 - 4 * m1 * s3 + 6 * m1**2 * s2 - 3 * m1**4
        return float(fourth / variance**2 - 3)

    def _largest_channel(self) -> tuple[float | None, int | None]:
        rms = self._squares.sqrt()
        alive = rms[rms > 0].sort().values
        if not len(alive):
            return None, None
        median = (alive[(len(alive) - 1) // 2] + alive[len(alive) // 2]) / 2
        channel = int(rms.argmax())
        return float(rms[channel] / median), channel


def _decibels(signal: float, error: float) -> float:
    if error == 0:
        return _MOST_DB
    if not math.isfinite(error):
        return -_MOST_DB
    return 10 * math.log10(signal / error)


def _measure(
    stored: StoredTensor,
    methods: Mapping[str, _Method],
    progress: Progress,
    stop: threading.Event,
    block_elements: int,
) -> dict[str, Any]:
    """One module, block by block; cut short, with what was seen until then, by `stop`."""
    shape = stored.spec.shape
    named = {"module": stored.spec.name.removesuffix(".weight"), "shape": list(shape)}
    height, width = math.prod(shape[:-1]), shape[-1]
    matrix = replace(stored, spec=replace(stored.spec, shape=(height, width)))
    sums = _Sums(width, methods)
    step = max(1, block_elements // width)
    with matrix.open() as reader:
        for start in range(0, height, step):
            if stop.is_set():
                break
            rows = reader.weight(start, step)
            if not sums.add(rows):
                progress.advance(stored.nbytes - stored.nbytes * start // height)
                return named | _not_finite(rows, start, shape, methods)
            stop_row = start + len(rows)
            progress.advance(stored.nbytes * stop_row // height - stored.nbytes * start // height)
    return named | sums.to_json()


def _by_rows_alone(scheme: Scheme) -> bool:
    """Whether blocks of rows can be quantized without knowing more than them."""
    surveyed = scheme.needs_weight_amax or scheme.needs_column_amax
    return not (scheme.needs_data or surveyed or scheme.row_multiple > 1)


def _not_finite(
    rows: Tensor, start: int, shape: tuple[int, ...], methods: Mapping[str, _Method]
) -> dict[str, Any]:
    """The account of a matrix whose rows, from `start` on, hold a NaN or Inf."""
    row, column = (~torch.isfinite(rows)).nonzero()[0].tolist()
    index = [*divmod(start + row, shape[1])] if len(shape) == 3 else [start + row]
    return {
        **dict.fromkeys(("amax_over_rms", "kurtosis", "channel_ratio", "channel")),
        "sqnr_db": dict.fromkeys(methods),
        "not_finite": {"value": str(float(rows[row, column])), "index": [*index, column]},
    }


RANKED_BY = "int8 per channel"  # fp8 has a scale in every code, and hardly sees outliers

LEAST_DB = 20.0  # what `verify` expects of int8 if nobody sets a limit
MARGIN_DB = 6.0  # an error of twice the size: one bit


def rank(modules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Modules of `outliers.inspect_outliers`, those with NaN or Inf first, then by lowest SQNR."""
    return sorted(modules, key=lambda m: (m["not_finite"] is None, m["sqnr_db"][RANKED_BY] or 0.0))


def keep_advice(modules: list[dict[str, Any]]) -> dict[str, Any] | None:
    """A rule that keeps float what int8 costs far more than others of its kind; None for nobody.

    A kind is modules whose names differ only in numbers. Far is MARGIN_DB below the kind's median.
    What the engine merges with such a module must have one scheme, and so must the experts of a layer:
    the rule takes them along.

    margin_db: MARGIN_DB.
    far_below: {"module", "sqnr_db", "kind", "median_db"} each, worst first.
    modules:   names of all that the rule keeps.
    match:     its patterns.
    yaml:      the rule as lines of a recipe, to stand before the others.
    """
    kinds: dict[str, list[float]] = defaultdict(list)
    for module in modules:
        if module["not_finite"] is None:
            kinds[_kind(module["module"])].append(module["sqnr_db"][RANKED_BY])
    medians = {kind: statistics.median(values) for kind, values in kinds.items()}
    far = []
    for module in modules:
        name, sqnr = module["module"], module["sqnr_db"][RANKED_BY]
        kind = _kind(name)
        if sqnr is not None and sqnr < medians[kind] - MARGIN_DB:
            median = medians[kind]
            far.append({"module": name, "sqnr_db": sqnr, "kind": kind, "median_db": median})
    if not far:
        return None
    together: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        together[_unit(module["module"])].append(module["module"])
    units = dict.fromkeys(_unit(entry["module"]) for entry in far)
    match = [pattern for unit in units for pattern in _patterns(together[unit])]
    quoted = (json.dumps(pattern, ensure_ascii=False) for pattern in match)
    lines = ["- match:", *(f"    - {pattern}" for pattern in quoted), "  scheme: keep"]
    return {
        "margin_db": MARGIN_DB,
        "far_below": far,
        "modules": sorted(name for unit in units for name in together[unit]),
        "match": match,
        "yaml": "".join(f"  {line}\n" for line in lines),
    }


def verdict(modules: list[dict[str, Any]], advice: dict[str, Any] | None) -> dict[str, Any]:
    """Whether weights are hard to quantize: {"hard", "what"}. modules, advice: see above."""
    levels = [m["sqnr_db"][RANKED_BY] for m in modules if m["not_finite"] is None]
    damaged, low = len(modules) - len(levels), sum(level < LEAST_DB for level in levels)
    of = f"of {count(modules, 'weight')}"
    if damaged:
        hold = "holds" if damaged == 1 else "hold"
        return {"hard": True, "what": f"damaged: {damaged} {of} {hold} NaN or Inf"}
    if low:
        keep = "keeps" if low == 1 else "keep"
        what = f"hard to quantize: {low} {of} {keep} less than {LEAST_DB:g} dB in {RANKED_BY}"
        return {"hard": True, "what": what}
    if advice is not None:
        far = len(advice["far_below"])
        lose, their = ("loses", "its") if far == 1 else ("lose", "their")
        what = f"hard in places: {far} {of} {lose} far more in {RANKED_BY} than others of {their} kind"
        return {"hard": True, "what": what}
    if not levels:
        return {"hard": False, "what": "there are no weights to quantize"}
    what = f"not hard to quantize: {of} the worst keeps {min(levels):.1f} dB in {RANKED_BY}"
    return {"hard": False, "what": what}


def _kind(module: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def _unit(module: str) -> str:
    """The name for all modules that must have one scheme with this module."""
    expert = EXPERT.fullmatch(module)
    return expert["experts"] if expert else fused_name(module) or module


def _patterns(modules: list[str]) -> list[str]:
    expert = EXPERT.fullmatch(modules[0])
    return [f"{glob.escape(expert['experts'])}.*"] if expert else sorted(map(glob.escape, modules))
