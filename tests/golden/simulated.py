"""The reference producer's calibration written down once more, with transformers and torch alone.

Every linear keeps the range of its inputs so far and simulates int8 with it at once, in the model's own
dtype; the whole model runs sample by sample. Nothing that quantcli computes takes part, so that ranges
can be compared to the last bit on the very CPU on which both are made.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from quantcli.calibration.text.tokenizer import quiet
from tests.replaying import one_thread


class Simulated(nn.Module):
    """A linear with inputs and weights in int8, simulated."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        step = (linear.weight.abs().amax(1, keepdim=True) / 127).clamp_min(2.0**-23)
        self.weight = (linear.weight / step).round().clamp(-128, 127) * step
        self.bias = linear.bias
        self.low = self.high = linear.weight.new_zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.low, self.high = torch.minimum(self.low, x.min()), torch.maximum(self.high, x.max())
        scale, offset = scale_and_offset(self.low, self.high)
        x = ((x / scale + offset).round().clamp(-128, 127) - offset) * scale
        return nn.functional.linear(x, self.weight, self.bias)


def scale_and_offset(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Its formula, every step rounded to the dtype of the range."""
    scale = high / 255 - low / 255
    return scale, (-low / scale).round() - 128


def ranges(model: Path, samples: Iterable[Tensor]) -> dict[str, tuple[float, float]]:
    """input_min and input_max of every linear called *_proj; samples: token ids [1, t]."""
    import transformers

    with quiet(), one_thread(), torch.no_grad():
        net = transformers.AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.bfloat16)
        linears = [(n, m) for n, m in net.eval().named_modules() if n.endswith("_proj")]
        made = {}
        for name, linear in linears:
            parent, _, last = name.rpartition(".")
            made[name] = Simulated(linear)
            setattr(net.get_submodule(parent), last, made[name])
        for ids in samples:
            net(input_ids=ids, use_cache=False)
    return {name: (float(module.low), float(module.high)) for name, module in made.items()}
