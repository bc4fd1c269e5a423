"""Squared weight error of quantcli's W8A8_DYNAMIC over that of the reference producer.

The golden model is converted here; the reference's checkpoint of it lies beside it. Both are
dequantized as the engine holds them, with the scale rounded to bfloat16, and compared with the
original in float64: the sum of squared differences over all quantized weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from common import RECIPES, ROOT, Line, finish, parser, quantize_to, workplace

BAR = 0.94
_SCALE = ".weight_scale"


def main() -> None:
    arguments = parser(__doc__)
    golden = ROOT / "tests" / "golden"
    if not (golden / "model").is_dir():
        golden = ROOT.parent / "shared" / "golden"
    arguments.add_argument("--golden", type=Path, default=golden, help="golden folder")
    options = arguments.parse_args()
    original = load(options.golden / "model")
    with workplace(options.dir) as folder:
        quantize_to(folder / "out", RECIPES / "w8a8_dynamic.yaml", options.golden / "model")
        ours = load(folder / "out")
    reference = load(options.golden / "w8a8_dynamic")
    modules = sorted(name.removesuffix(_SCALE) for name in ours if name.endswith(_SCALE))
    expected = sorted(name.removesuffix(_SCALE) for name in reference if name.endswith(_SCALE))
    assert modules == expected, set(modules) ^ set(expected)
    worst = max(modules, key=lambda m: error(ours, original, m) / error(reference, original, m))
    mine = sum(error(ours, original, module) for module in modules)
    theirs = sum(error(reference, original, module) for module in modules)
    ratio = error(ours, original, worst) / error(reference, original, worst)
    detail = f"{len(modules)} modules: {mine:.5g} / {theirs:.5g}; worst {ratio:.3f}, `{worst}`"
    finish([Line("squared error / reference", mine / theirs, "", BAR, detail)], as_json=options.json)


def load(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def error(checkpoint: dict[str, Tensor], original: dict[str, Tensor], module: str) -> float:
    """Sum of squared differences of one dequantized weight."""
    scale = checkpoint[module + _SCALE].to(torch.bfloat16).double()
    held = checkpoint[f"{module}.weight"].double() * scale
    return float((held - original[f"{module}.weight"].double()).square().sum())


if __name__ == "__main__":
    main()
