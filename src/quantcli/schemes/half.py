"""Products for learning: in bfloat16 where the hardware is faster with it, summed in float32.

Learning looks at errors of 4 bits, next to which the rounding of factors and results to bfloat16 is
nothing: 1e-6 of a result's square against 1e-2. Gradients are rounded likewise.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})  # of /proc/cpuinfo
_HIDING = frozenset({"ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"})  # variables that hide instructions


@cache
def is_faster(kind: str) -> bool:
    """Whether devices of a kind, such as cpu, are faster with bfloat16: other CPUs only emulate it."""
    if kind != "cpu":
        return kind != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return not _FLAGS.isdisjoint(flags) and _HIDING.isdisjoint(os.environ)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x, weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight).float()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].to(torch.bfloat16)
        to_x = (grad @ weight).float() if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_x, None
        return to_x, (grad.flatten(0, -2).mT @ x.flatten(0, -2)).float()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., k] times weight [n, k], transposed: float32 [..., n], with gradients for both."""
    if not is_faster(x.device.type):
        return F.linear(x.float(), weight.float())
    result: Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
    return result
