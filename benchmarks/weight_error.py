"""Squared weight errors over those of other producers, as a fraction.

msmodelslim: the golden model is converted to W8A8_DYNAMIC here; its checkpoint lies beside it. Both are
dequantized as the engine holds them, with the scale rounded to bfloat16. Left out where there is no
golden folder.

llm-compressor: the linears of examples/tiny-qwen3, rounded by the schemes for engines that hold scales
in float32 (in bfloat16 for int4), and by its arithmetic: scale and division in the weights' bfloat16,
amax / 127.5 for int8, amax / 7.5 for int4, amax / 448 for fp8. That was compared with its checkpoints:
every scale and code of int8 and fp8 was the same.

Errors are summed in float64 over all quantized weights.

Formats of micro-scaled blocks: the error of a weight of 512 x 2048 random numbers over its norm, both
with the scales that the largest weight leads to, and with those that are searched for.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from common import RECIPES, ROOT, Line, finish, parser, quantize_to, workplace
from quantcli.core.registry import discover
from quantcli.schemes.base import Scheme

_SCALE = ".weight_scale"
MODEL = ROOT / "examples" / "tiny-qwen3"
# scheme, options, dtype that the engine holds scales in, largest code, block that shares a scale, bar
OTHERS: tuple[tuple[str, dict[str, Any], torch.dtype, float, tuple[int, int], float], ...] = (
    ("w8a8_dynamic", {}, torch.float32, 127.5, (1, 0), 0.90),
    ("fp8_dynamic", {}, torch.float32, 448.0, (1, 0), 1.0),
    ("fp8_block", {}, torch.float32, 448.0, (128, 128), 1.0),
    ("w4a16", {}, torch.bfloat16, 7.5, (1, 128), 0.90),
    ("w4a16", {"group_size": 32}, torch.bfloat16, 7.5, (1, 32), 0.95),
)
# scheme -> the most relative error, of normal numbers and of Student's t with four degrees of freedom
BLOCKS = {"nvfp4a16": (0.0815, 0.0830), "mxfp4a16": (0.1116, 0.1282), "mxfp8": (0.0266, 0.0266)}


def main() -> None:
    arguments = parser(__doc__)
    golden = ROOT / "tests" / "golden"
    if not (golden / "model").is_dir():
        golden = ROOT.parent / "shared" / "golden"
    arguments.add_argument("--golden", type=Path, default=golden, help="golden folder")
    options = arguments.parse_args()
    lines = [against_msmodelslim(options.golden, options.dir)] if options.golden.is_dir() else []
    weights = {n: t for n, t in load(MODEL).items() if n.endswith("_proj.weight")}
    lines += [against_llm_compressor(weights, *other) for other in OTHERS]
    lines += [line for name, bars in BLOCKS.items() for line in of_blocks(name, bars)]
    finish(lines, as_json=options.json)


def maxima(scheme: Scheme, weight: Tensor) -> dict[str, Tensor]:
    """What a scheme needs to know of a whole weight [n, k]."""
    columns = weight.float().abs().amax(0)
    found = {"column_amax": columns} if scheme.needs_column_amax else {}
    return found | {"weight_amax": columns.amax().view(1)} if scheme.needs_weight_amax else found


def of_blocks(name: str, bars: tuple[float, float]) -> list[Line]:
    """One scheme, of random weights."""
    normal = torch.randn(6, 512, 2048, generator=torch.Generator().manual_seed(0))
    heavy = normal[1] / normal[2:].square().mean(0).sqrt()
    cls = discover(Scheme)[name]
    lines = []
    for what, weight, bar in (("normal", normal[0], bars[0]), ("Student-t(4)", heavy, bars[1])):
        errors = {}
        for scales in ("search", "amax") if "scales" in cls.model_fields else ("",):
            scheme = cls(**({"scales": scales} if scales else {}))
            parts = scheme.quantize(weight, torch.float32, maxima(scheme, weight))
            held = scheme.dequantize(parts).double()
            errors[scales] = math.sqrt(squared(held, weight)) / float(weight.double().norm())
        detail = f"{errors['amax']:.4f} with `scales: amax`" if "amax" in errors else ""
        error = next(iter(errors.values()))
        lines.append(Line(f"relative error: {name}, {what}", error, "", bar, detail))
    return lines


def against_msmodelslim(golden: Path, scratch: Path | None) -> Line:
    """W8A8 dynamic of the golden model."""
    original = load(golden / "model")
    with workplace(scratch) as folder:
        quantize_to(folder / "out", RECIPES / "w8a8_dynamic.yaml", golden / "model")
        ours = load(folder / "out")
    reference = load(golden / "w8a8_dynamic")
    modules = sorted(name.removesuffix(_SCALE) for name in ours if name.endswith(_SCALE))
    expected = sorted(name.removesuffix(_SCALE) for name in reference if name.endswith(_SCALE))
    assert modules == expected, set(modules) ^ set(expected)

    def error(checkpoint: dict[str, Tensor], module: str) -> float:
        scale = checkpoint[module + _SCALE].to(torch.bfloat16).double()
        held = checkpoint[f"{module}.weight"].double() * scale
        return squared(held, original[f"{module}.weight"])

    pairs = {module: (error(ours, module), error(reference, module)) for module in modules}
    return line("w8a8_dynamic / msmodelslim", pairs, 0.94)


def against_llm_compressor(
    weights: dict[str, Tensor],
    name: str,
    options: dict[str, Any],
    held: torch.dtype,
    largest: float,
    block: tuple[int, int],
    bar: float,
) -> Line:
    """One scheme, whole weights at a time."""
    scheme = discover(Scheme)[name](**options)

    def pair(weight: Tensor) -> tuple[float, float]:
        ours = scheme.dequantize(scheme.quantize(weight, held, maxima(scheme, weight)))
        return squared(ours.double(), weight), squared(theirs(weight, largest, block), weight)

    words = ", ".join([name, *(f"{key} {value}" for key, value in options.items())])
    pairs = {name.removesuffix(".weight"): pair(weight) for name, weight in weights.items()}
    return line(f"{words} / llm-compressor", pairs, bar)


def theirs(weight: Tensor, largest: float, block: tuple[int, int]) -> Tensor:
    """What llm-compressor makes of a weight [n, k], dequantized to float64. Blocks divide it."""
    n, k = weight.shape
    rows, columns = block[0], block[1] or k
    tiles = weight.view(n // rows, rows, k // columns, columns)
    scale = tiles.abs().amax((1, 3), keepdim=True) / largest
    codes = tiles / scale
    if largest == 448:
        codes = codes.clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        codes = codes.round().clamp(-largest - 0.5, largest - 0.5)
    return (codes.double() * scale.double()).view(n, k)


def line(what: str, pairs: dict[str, tuple[float, float]], bar: float) -> Line:
    """The sum over modules of (our error, theirs), and the module that compares worst."""
    mine, other = (sum(errors) for errors in zip(*pairs.values(), strict=True))
    worst = max(pairs, key=lambda module: pairs[module][0] / pairs[module][1])
    ratio = pairs[worst][0] / pairs[worst][1]
    detail = f"{len(pairs)} modules: {mine:.5g} / {other:.5g}; worst {ratio:.3f}, `{worst}`"
    return Line(f"squared error: {what}", mine / other, "", bar, detail)


def squared(held: Tensor, original: Tensor) -> float:
    """Sum of squared differences."""
    return float((held - original.double()).square().sum())


def load(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


if __name__ == "__main__":
    main()
