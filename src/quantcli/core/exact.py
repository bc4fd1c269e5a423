"""Devices without float64: what needs its digits is computed on the CPU instead.

On an NPU, matrix products, sorting, multiplication, division and comparisons take no float64.
Sources: Ascend Extension for PyTorch at 9e73e708, docs/zh/api/native_api/pytorch_2-13-0/torch.md (mm,
bmm, addmm, sort, mul, div, gt); op-plugin at 517f2e7d, op_plugin/ops/opapi/SortKernelNpuOpApi.cpp:91.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WITHOUT_FLOAT64 = frozenset({"npu"})


def exact_device(device: torch.device) -> torch.device:
    """Where float64 is computed: on `device`, or on the CPU."""
    return torch.device("cpu") if device.type in _WITHOUT_FLOAT64 else device


def exact(tensor: Tensor) -> Tensor:
    """The tensor on the exact device of its own."""
    return tensor.to(exact_device(tensor.device))
