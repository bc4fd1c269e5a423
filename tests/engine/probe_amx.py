"""Whether AMX works here: one int4 product with vLLM's own AMX kernel, in a process that may die of it.

Runs in the engine's environment. Exits with 0 if it computed, else with a sentence that says why not.
"""

import sys

import torch
from vllm import _custom_ops
from vllm.platforms import current_platform

if not torch.cpu._init_amx():
    sys.exit("the system does not grant AMX's tiles to a process")
current_platform.import_kernels()
inputs = torch.ones(32, 128, dtype=torch.bfloat16)
codes = torch.zeros(2, 256, dtype=torch.int32)  # code 0 stands for -8: 32 outputs, 128 inputs
scales = torch.ones(1, 32, dtype=torch.bfloat16)
y = _custom_ops.cpu_gemm_wna16(inputs, codes, scales, None, None, 8, "amx")
if not bool((y == -8 * 128).all()):
    sys.exit("AMX computes 128 x -8 wrongly")
