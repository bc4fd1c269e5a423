"""Conversions as a user runs them, next to other producers that need no model code either.

quantcli and each peer convert the same model of 1 GB in turns, round after round: whole processes with
all imports, both cores free, the source in the page cache. Medians of CPU seconds, wall seconds and
peak memory; the bars are on quantcli's CPU seconds over llm-compressor's `model_free_ptq`. AMD Quark's
file-to-file conversion, which has its own format, is for information.

Each peer lives in an environment of its own, which is made the first time (a few minutes, 2 GB each;
--environments says where it is kept); its versions are printed. Before anything is measured, each
producer converts the model once, which also compiles what is compiled once. That output must hold every
linear of the decoder in the expected codes, and the first rows of each, decoded here, must be near the
model's.
"""

from __future__ import annotations

import math
import random
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common import (
    QUANTCLI,
    ROOT,
    Line,
    Usage,
    conversion,
    finish,
    measure,
    parser,
    qwen3,
    spread,
    workplace,
    write_model,
)
from environments import ENVIRONMENTS, PEERS, Stages
from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.checkpoint.header import StoredTensor

Array = NDArray[np.float64]
ROWS = 8  # of each linear, that are decoded and compared with the model's
# dtype of codes, codes in one element, largest relative error of a linear
KINDS = {"fp8": ("F8_E4M3", 1, 0.05), "int8": ("I8", 1, 0.02), "int4": ("I32", 8, 0.2)}


@dataclass(frozen=True)
class Producer:
    """A command that converts a model; environment None: quantcli, with `what` as its recipe."""

    kind: str
    what: str
    environment: str | None = None
    script: str = ""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.environment or 'quantcli'} {self.what}"

    def command(self, model: Path, out: Path, stages: Stages) -> Sequence[str | Path]:
        """What runs it."""
        if self.environment is None:
            return (*QUANTCLI, *conversion(self.what, model, out))
        return stages.environment(self.environment), PEERS / self.script, model, out, self.what


def llm_compressor(kind: str, scheme: str) -> Producer:
    """The peer that the bars are on."""
    return Producer(kind, scheme, "llm-compressor", "model_free.py")


# ours, the peer, the most CPU seconds over the peer's
PAIRS: tuple[tuple[Producer, Producer, float | None], ...] = (
    (Producer("fp8", "vllm_fp8_dynamic"), llm_compressor("fp8", "FP8_DYNAMIC"), 0.2),
    (Producer("int8", "vllm_int8_dynamic"), llm_compressor("int8", "W8A8"), 0.24),
    (Producer("int4", "vllm_w4a16"), llm_compressor("int4", "W4A16"), 0.4),
    (
        Producer("fp8", "vllm_fp8_dynamic"),
        Producer("fp8", "ptpc_fp8", "quark", "with_quark.py"),
        None,
    ),
)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--layers", type=int, default=9, help="101 MB each [default: 9]")
    arguments.add_argument(
        "--environments", type=Path, default=ROOT / "build" / "pretrained", metavar="DIR"
    )
    options = arguments.parse_args()
    stages = Stages(options.environments.resolve())
    producers = list(dict.fromkeys(producer for ours, peer, _ in PAIRS for producer in (ours, peer)))
    used: dict[Producer, list[Usage]] = {producer: [] for producer in producers}
    with workplace(options.dir) as folder:
        model, out = folder / "model", folder / "out"
        specs = qwen3(options.layers)
        nbytes = write_model(model, specs)
        errors = {}
        for producer in producers:
            measure(*producer.command(model, out, stages))
            errors[producer] = check(open_checkpoint(model), open_checkpoint(out), producer)
            shutil.rmtree(out)
        order = random.Random(0)
        for _ in range(options.rounds):
            for producer in order.sample(producers, len(producers)):
                used[producer].append(measure(*producer.command(model, out, stages)))
                shutil.rmtree(out)
    lines = [ratio(used[ours], used[peer], (ours, peer), bar) for ours, peer, bar in PAIRS]
    lines += [
        summary(producer, used[producer], nbytes / 1e9, errors[producer]) for producer in producers
    ]
    finish(lines, as_json=options.json)


def check(model: Checkpoint, found: Checkpoint, producer: Producer) -> float:
    """The largest relative error of a linear's first rows. SystemExit if a linear is missing, stored
    in another way than expected, or too far from the model's."""
    element, packed, limit = KINDS[producer.kind]
    linears = [name for name in model.tensors if name.endswith("_proj.weight")]
    assert linears
    worst = 0.0
    for name in linears:
        n, k = model.tensors[name].spec.shape
        codes = found.tensors.get(name if packed == 1 else f"{name}_packed")
        scale = found.tensors.get(f"{name}_scale")
        if codes is None or scale is None:
            raise SystemExit(f"{producer.name} has not quantized {name}")
        expected = (element, (n, k // packed))
        if (codes.spec.dtype, codes.spec.shape) != expected:
            raise SystemExit(f"{producer.name} has stored {name} as {codes.spec}, not as {expected}")
        groups = scale.spec.numel // n
        values = rows_of(model.tensors[name], k)
        held = rows_of(codes, k).reshape(ROWS, groups, -1) * rows_of(scale, groups)[..., None]
        error = np.linalg.norm(held.reshape(values.shape) - values) / np.linalg.norm(values)
        worst = max(worst, float(error))
    if worst > limit:
        raise SystemExit(f"{producer.name}: a linear has a relative error of {worst:.3f}, over {limit}")
    return worst


def rows_of(stored: StoredTensor, columns: int) -> Array:
    """The first rows of a stored tensor as numbers, [ROWS, columns]."""
    dtype = {"BF16": "<u2", "F32": "<f4", "I8": "<i1", "I32": "<u4", "F8_E4M3": "<u1"}[
        stored.spec.dtype
    ]
    count = ROWS * math.prod(stored.spec.shape[1:])
    raw = np.fromfile(stored.file, dtype, count, offset=stored.offset)
    if stored.spec.dtype == "BF16":
        raw = (raw.astype("<u4") << 16).view("<f4")
    elif stored.spec.dtype == "F8_E4M3":
        raw = fp8(raw.astype(np.int64))
    elif stored.spec.dtype == "I32":  # eight codes, the first in the lowest bits, each plus 8
        raw = (raw[:, None] >> np.arange(0, 32, 4, dtype="<u4") & 15).astype(np.int64) - 8
    return raw.astype(np.float64).reshape(ROWS, columns)


def fp8(codes: NDArray[np.int64]) -> Array:
    """The numbers of float8_e4m3fn codes: a sign, four bits of exponent, three of mantissa."""
    exponent, mantissa = codes >> 3 & 15, codes & 7
    numbers = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    return np.where(codes >> 7 > 0, -numbers, numbers)


def ratio(
    ours: list[Usage], theirs: list[Usage], pair: tuple[Producer, Producer], bar: float | None
) -> Line:
    """Our CPU seconds over theirs; the other ratios are in the detail."""
    mine, other = (statistics.median(u.cpu for u in runs) for runs in (ours, theirs))
    walls = [statistics.median(u.wall for u in runs) for runs in (ours, theirs)]
    peaks = [statistics.median(u.peak for u in runs) for runs in (ours, theirs)]
    detail = f"wall {walls[0] / walls[1]:.2f} x, peak memory {peaks[0] / peaks[1]:.2f} x"
    return Line(f"CPU: {pair[0].name} / {pair[1].name}", mine / other, "", bar, detail)


def summary(producer: Producer, runs: list[Usage], size: float, error: float) -> Line:
    """What one of them takes."""
    cpu, wall = [u.cpu for u in runs], [u.wall for u in runs]
    peak = statistics.median(u.peak for u in runs) / 2**20
    versions = ", ".join(ENVIRONMENTS.get(producer.environment or "", ()))
    detail = f"{spread(cpu)} CPU s; {spread(wall)} s wall; peak {peak:.0f} MiB; {size:.2f} GB; "
    detail += f"relative error {error:.4f}; {versions}"
    return Line(producer.name, statistics.median(cpu), "CPU s", None, detail.removesuffix("; "))


if __name__ == "__main__":
    main()
