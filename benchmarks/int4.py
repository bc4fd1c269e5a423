"""Int4's search for scales: how near it comes to trying every scale, and what it takes.

For each group of columns an exhaustive search here, in numpy and float64 and with none of the tool's
arithmetic, tries scales from 0.44 to 1.1 times the smallest one that clips nothing, with the largest
weight of the group at the negative end: those of the tool's own grid, shares in steps of 0.04 and 1.1,
which the tool does not try all; and every bfloat16 number in that range. Given is by how much the
tool's squared error is larger, both summed over all groups, each column as important as `clip` says:
`mse` all alike, `columns` (the default) by the fourth power of its largest weight. The tool's error is
that of its codes and scales as they are stored. It can be smaller, by the tool's last step: the best
scale for given codes, which need not be in the grid, nor in that range.

Weights: Gaussian; Student's t with 3 degrees of freedom, which has heavy tails; and the linears of
trained models: the one in examples/ and any that are named.

The speed is that of one thread that quantizes a bfloat16 row block of the size of a conversion's, in GB
of bfloat16 per CPU second.

Then what signs of scales gain: the relative squared error of Gaussian weights, beside that of
llm-compressor's rule (amax / 7.5) and of auto-round's (signed, without a search) on the same numbers.

Then zero points: the relative error of weights whose rows have a mean of up to half a sigma, by
symmetric codes with searched scales, by the whole range with zero points, by the search for both.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from common import ROOT, Line, finish, parser
from quantcli.core.registry import discover
from quantcli.schemes.base import Scheme
from weight_error import maxima, theirs

Array = NDArray[np.float64]
NEAR = 0.1  # percent above the least squared error, at most
SPEED = 0.4  # GB per CPU second, at least
GAUSSIAN = 0.935e-2  # relative squared error in groups of 128, at most
CLIPS = ("mse", "columns")
ASYMMETRIC = {32: 0.075, 128: 0.0925}  # relative error, at most
LEAST, MOST = 0.44, 1.1  # of the scale that clips nothing
REACH = 7 + 63 / 128  # the largest w / scale that still rounds to 7
BLOCK = (256, 2048)
ROWS = 512  # of a weight, at most: all that the exhaustive search has time for


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--group", type=int, default=128, choices=(32, 64, 128))
    arguments.add_argument("--model", type=Path, nargs="*", default=[], help="float checkpoints")
    arguments.add_argument("--linears", type=int, default=24, help="of each model, at most")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    weights = {
        "Gaussian": [to_bf16(random.standard_normal(BLOCK) * 0.02) for _ in range(2)],
        "heavy tails": [to_bf16(random.standard_t(3, BLOCK) * 0.02) for _ in range(2)],
    }
    for folder in (ROOT / "examples" / "tiny-qwen3", *options.model):
        weights[folder.name] = linears(folder, options.group, options.linears)
    lines = [
        line
        for what, tensors in weights.items()
        for clip in CLIPS
        for line in error(what, tensors, clip, options.group)
    ]
    lines += [speed(weights["Gaussian"][0], clip, options.group) for clip in CLIPS]
    lines += signs(random)
    means = random.uniform(-0.5, 0.5, (BLOCK[0], 1))
    lines += zero_points(to_bf16((random.standard_normal(BLOCK) + means) * 0.02))
    finish(lines, as_json=options.json)


def to_bf16(values: Array) -> Tensor:
    """As a conversion reads them."""
    return torch.from_numpy(values).to(torch.bfloat16)


def linears(folder: Path, group: int, count: int) -> list[Tensor]:
    """The first rows of some of a model's linears, from its first to its last layer."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {n: t for n, t in load_file(file).items() if n.endswith("_proj.weight")}
    fitting = [tensors[name] for name in sorted(tensors) if tensors[name].shape[-1] % group == 0]
    if not fitting:
        raise SystemExit(f"{folder} has no linear whose columns divide by {group}")
    step = max(1, len(fitting) // count)
    return [tensor[:ROWS].to(torch.bfloat16) for tensor in fitting[::step][:count]]


def scheme_of(clip: str, group: int, *, symmetric: bool = True) -> Any:
    """The scheme of the recipes vllm_w4a16 and vllm_w4a16_asym."""
    return discover(Scheme)["w4a16"](group_size=group, clip=clip, symmetric=symmetric)


def signs(random: np.random.Generator) -> Iterator[Line]:
    """Of int4 in groups of 128, and of int8, with scales of both signs and with positive ones."""
    weights = [to_bf16(random.standard_normal((1024, 2048)) * 0.02) for _ in range(4)]

    def error(name: str, **options: Any) -> float:
        scheme = discover(Scheme)[name](**options)
        lost = total = 0.0
        for weight in weights:
            parts = scheme.quantize(weight, torch.bfloat16, maxima(scheme, weight))
            lost += float((scheme.dequantize(parts).double() - weight.double()).square().sum())
            total += float(weight.double().square().sum())
        return lost / total

    found = error("w4a16", clip="mse")
    positive = error("w4a16", clip="mse", signed=False)
    rounded = error("w4a16", clip="none")
    other = sum(
        float((theirs(weight, 7.5, (1, 128)) - weight.double()).square().sum()) for weight in weights
    ) / sum(float(weight.double().square().sum()) for weight in weights)
    detail = f"positive scales {positive:.5f}; both signs, nothing clipped, {rounded:.5f}"
    detail += f"; amax / 7.5, as llm-compressor, {other:.5f}"
    yield Line("relative squared error, Gaussian, groups of 128", found, "", GAUSSIAN, detail)
    for group in (32, 128):
        both, one = (error("w8a16", group_size=group, signed=signed) for signed in (True, False))
        yield Line(f"int8, groups of {group}: error with both signs", both / one, "x", 1.0)


def zero_points(weight: Tensor) -> Iterator[Line]:
    """Relative errors in groups of 32 and 128, and the speed of the search."""
    kinds = {
        "symmetric, searched": ("mse", True),
        "zero points, whole range": ("none", False),
        "zero points, searched": ("mse", False),
    }
    for group in (32, 128):
        for what, (clip, symmetric) in kinds.items():
            scheme = scheme_of(clip, group, symmetric=symmetric)
            parts = scheme.quantize(weight, torch.bfloat16, maxima(scheme, weight))
            error = (scheme.dequantize(parts) - weight.float()).norm() / weight.float().norm()
            bar = ASYMMETRIC[group] if clip == "mse" and not symmetric else None
            yield Line(f"relative error, groups of {group}: {what}", float(error), "", bar, "")
        yield speed(weight, "mse", group, symmetric=False)


def error(what: str, tensors: list[Tensor], clip: str, group: int) -> list[Line]:
    """By how much the tool's squared error is above those of the exhaustive searches."""
    chosen = unclipped = 0.0
    best = np.zeros(2)
    for tensor in tensors:
        values = tensor.double().numpy()
        largest = np.abs(values).max(0)
        importance = (largest / largest.max()) ** 4 if clip == "columns" else np.ones_like(largest)
        chosen += squared(tensor, importance, clip, group)
        unclipped += squared(tensor, importance, "none", group)
        best += exhaustive(values, importance, group)
    grid, every, without = (100 * (float(x) - 1) for x in (*chosen / best, unclipped / best[1]))
    where = f"{what}, clip {clip}, groups of {group}"
    detail = f"{len(tensors)} weights"
    return [
        Line(f"squared error above the least in the grid: {where}", grid, "%", NEAR, detail),
        Line(
            f"squared error above the least of all: {where}",
            every, "%", None, f"{detail}; without a clip {without:.1f} %",
        ),
    ]  # fmt: skip


def squared(weight: Tensor, importance: Array, clip: str, group: int) -> float:
    """The weighted squared error of what the tool makes of a weight [n, k]."""
    scheme = scheme_of(clip, group)
    parts = scheme.quantize(weight, torch.bfloat16, maxima(scheme, weight))
    scale = parts["weight_scale"].double().numpy().repeat(group, -1)
    difference = parts["weight"].double().numpy() * scale - weight.double().numpy()
    return float((difference**2 * importance).sum())


def exhaustive(values: Array, importance: Array, group: int) -> Array:
    """The least weighted squared error of each group over the scales of the grid, and over all scales;
    summed, [2]. values: [n, k]."""
    groups = values.reshape(-1, group)
    weights = np.broadcast_to(importance, values.shape).reshape(-1, group)
    turned = groups * np.where(groups.max(-1) > -groups.min(-1), -1, 1)[:, None]
    widest = np.maximum(-turned.min(-1) / 8, turned.max(-1) / REACH)

    def least(candidates: Iterable[Array]) -> float:
        found = np.full(len(groups), np.inf)
        for scale in candidates:
            column = np.where(scale <= widest * MOST, scale, widest)[:, None]
            codes = np.clip(np.rint(turned / column), -8, 7)
            errors = (weights * (codes * column - turned) ** 2).sum(-1)
            found = np.minimum(found, errors)
        return float(found.sum())

    # positive bfloat16 numbers order like their bits, 128 of them to a power of two
    first = bits(widest * LEAST)
    steps = range(int((bits(widest * MOST) - first).max()) + 1)
    grid = [*np.arange(LEAST, MOST, 0.04), MOST]
    return np.array(
        [
            least(number(bits(widest * share * (1 + 2**-9))) for share in grid),
            least(number(first + step) for step in steps),
        ]
    )


def bits(values: Array) -> NDArray[np.uint32]:
    """Of the bfloat16 number below each positive value, or equal to it."""
    return values.astype(np.float32).view(np.uint32) >> 16


def number(halves: NDArray[np.uint32]) -> Array:
    """The bfloat16 number that has these bits."""
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def speed(block: Tensor, clip: str, group: int, *, symmetric: bool = True) -> Line:
    """The best of some seconds of quantizing one block over and over."""
    scheme = scheme_of(clip, group, symmetric=symmetric)
    constants = maxima(scheme, block)
    scheme.quantize(block, torch.bfloat16, constants)
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < 5:
        started = time.process_time()
        scheme.quantize(block, torch.bfloat16, constants)
        seconds.append(time.process_time() - started)
    size = block.numel() * 2 / 1e9
    median = float(np.median(seconds))
    detail = f"{len(seconds)} blocks of {block.numel() / 2**10:.0f}K, best {size / min(seconds):.3f}"
    what = f"search, clip {clip}"
    if symmetric:
        return Line(what, size / median, "GB/CPU-s", None, detail, SPEED)
    what = f"{what}, zero points, groups of {group}"
    return Line(what, size / median, "GB/CPU-s", None, detail)


if __name__ == "__main__":
    main()
