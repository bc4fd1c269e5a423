"""Operators that vLLM's CPU build lacks without AMX, in torch, so that its loader goes on to the end.

They compute what the names say and are noted in `used` when they do: what an answer is worth that
needed one is that vLLM took every tensor to its place, not that a CPU serves the format. Formats with
scales of eight bits are computed by vLLM's own emulation, which it has in torch and does not list for a
CPU; of what that lacks here, stand-ins are noted, too.
"""

import importlib.machinery
import sys
import types

import torch
from vllm import _custom_ops
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.mxfp4 import emulation as mxfp4_emulation
from vllm.model_executor.kernels.linear.mxfp4.emulation import EmulationMxfp4LinearKernel
from vllm.model_executor.kernels.linear.mxfp8.emulation import EmulationMxfp8LinearKernel
from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import (
    Fp8BlockScaledMMLinearKernel,
)
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils import nvfp4_emulation_utils
from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp4Dynamic
from vllm.model_executor.models import registry
from vllm.platforms import PlatformEnum

used: set = set()
FP8 = torch.float8_e4m3fn


def scaled_fp8_quant(input, scale=None, *args, **kwargs):
    """e4m3 codes of a matrix by one given scale, as the operator for accelerators makes them."""
    assert scale is not None, "dynamic scales have a torch path of vLLM's own"
    assert scale.numel() == 1, "only scales of whole tensors"
    used.add("static_scaled_fp8_quant")
    limit = torch.finfo(FP8).max
    return (input.float() / scale.float()).clamp(-limit, limit).to(FP8), scale


class BlockScaledMM(Fp8BlockScaledMMLinearKernel):
    """Blocks of 128 x 128, inputs in groups of 128: dequantized, multiplied in float32."""

    @classmethod
    def is_supported(cls, compute_capability=None):
        """Everywhere."""
        return True, None

    def apply_block_scaled_mm(self, A, B, As, Bs):
        """A [m, k], As [m, k / 128]; B [n, k], Bs [n / 128, k / 128], the last blocks cut short."""
        used.add("block_scaled_mm")
        n, k = B.shape
        rows, columns = self.weight_group_shape
        weight = Bs.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k] * B.float()
        x = As.repeat_interleave(columns, 1)[:, :k] * A.float()
        return x @ weight.mT


class NvFp4FloatInputs(EmulationNvFp4LinearKernel):
    """Weights decoded by vLLM's own function, float inputs: for the kernel that it insists on."""

    def apply_weights(self, layer, x, bias=None):
        """weight uint8 [n, k / 2], weight_scale e4m3 [n, k / 16], weight_global_scale []."""
        used.add("nvfp4_float_inputs")
        parts = layer.weight.data, layer.weight_scale.data, layer.weight_global_scale
        weight = nvfp4_emulation_utils.dequantize_to_dtype(*parts, x.dtype, swizzle=False)
        return torch.nn.functional.linear(x, weight, bias)


def dequant_mxfp4(codes, exponents, dtype):
    """uint8 [n, k / 2], the even column in the low bits, and [n, k / 32] -> [n, k]: what amd-quark does
    for vLLM's emulation."""
    used.add("dequant_mxfp4")
    numbers = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = numbers[torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()]
    scale = torch.ldexp(torch.ones(()), exponents.float() - 127)
    return (values * scale.repeat_interleave(32, -1)).to(dtype)


def quant_dequant_mxfp4(x):
    """Inputs in groups of 32, rounded to e2m1; the scale is the power of two under the largest one,
    after that is rounded to one bit of mantissa, over 4. As vLLM's code for GPUs, in mxfp4_utils."""
    used.add("quant_dequant_mxfp4")
    groups = x.float().unflatten(-1, (-1, 32))
    amax = groups.abs().amax(-1, keepdim=True)
    power = ((amax.view(torch.int32) + 0x200000) & 0x7F800000).view(torch.float32)
    scale = (power / 4).clamp_min(2.0**-127)
    codes = nvfp4_emulation_utils.cast_to_fp4(groups / scale)
    return (codes * scale).flatten(-2).to(x.dtype)


class Mxfp4Fp8Inputs(EmulationMxfp4LinearKernel):
    """Inputs in fp8 by vLLM's own function, products in the dtype of x."""

    @classmethod
    def can_implement(cls, config):
        """The inputs that the other emulation has not."""
        key = config.activation_quant_key
        return key is not None and key.dtype == FP8, "only fp8"

    def __init__(self, config):
        self.config = config
        self.quantize = QuantFP8(
            static=False, group_shape=config.activation_quant_key.scale.group_shape
        )

    def apply_weights(self, layer, x, bias=None):
        """weight uint8 [n, k / 2], weight_scale uint8 [n, k / 32]."""
        used.add("mxfp4_fp8_inputs")
        codes, scale = self.quantize.forward_native(x.flatten(0, -2))
        rounded = codes.float() * scale.repeat_interleave(x.shape[-1] // scale.shape[-1], -1)
        weight = dequant_mxfp4(layer.weight, layer.weight_scale, x.dtype)
        return torch.nn.functional.linear(rounded.to(x.dtype).view_as(x), weight, bias)


class Int8Experts(cpu_moe.CPUExpertsInt8):
    """Int8 weights per channel, int8 inputs per token, expert after expert."""

    @staticmethod
    def _supports_current_device():
        return True

    def process_weights_after_loading(self, layer):
        """Nothing: AMX alone wants another layout."""

    def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *args, **kwargs):
        """w1 [experts, 2 i, k], gate above up; w2 [experts, k, i]; scales [experts, rows, 1]."""
        used.add("experts_int8")
        total = torch.zeros(hidden_states.shape, dtype=torch.float32)
        for expert in topk_ids.unique().tolist():
            rows, slots = torch.where(topk_ids == expert)
            both = _linear(hidden_states[rows], w1[expert], self.w1_scale[expert])
            gate, up = both.chunk(2, -1)
            inner = (torch.nn.functional.silu(gate) * up).to(hidden_states.dtype)
            y = _linear(inner, w2[expert], self.w2_scale[expert])
            total.index_add_(0, rows, y * topk_weights[rows, slots, None].float())
        output.copy_(total)


def _linear(x, weight, scale):
    """x [m, k] -> float32 [m, n], with a scale per row of x and per row of the weight [n, k]."""
    step = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    codes = (x.float() / step).round()
    return (codes @ weight.float().mT) * step * scale.float().view(1, -1)


class _Names(types.ModuleType):
    """A module that has any name, of which nothing is called here."""

    __path__: tuple = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _without_torchvision() -> None:
    """Let modules be imported that name torchvision, which has no build for this torch: the language
    models of multimodal families are served here, and no image."""
    for name in ("", ".transforms", ".transforms.v2", ".transforms.v2.functional"):
        module = _Names(f"torchvision{name}")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module


def install() -> None:
    """Where vLLM looks for them; kernels of its own go first."""
    _without_torchvision()
    # vLLM asks a process of its own what a class can do; that would import all of vLLM, and no stand-in
    registry._run_in_subprocess = lambda inspect: inspect()
    if not torch.cpu._is_amx_tile_supported():
        cpu_moe.CPUExpertsInt8 = Int8Experts
    _custom_ops.scaled_fp8_quant = scaled_fp8_quant
    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].append(BlockScaledMM)
    # vLLM's own emulation, which it lists for other platforms
    linear._POSSIBLE_MXFP8_KERNELS.setdefault(PlatformEnum.CPU, []).append(EmulationMxfp8LinearKernel)
    linear._POSSIBLE_NVFP4_KERNELS.setdefault(PlatformEnum.CPU, []).append(EmulationNvFp4LinearKernel)
    linear._POSSIBLE_MXFP4_KERNELS.setdefault(PlatformEnum.CPU, []).extend(
        [EmulationMxfp4LinearKernel, Mxfp4Fp8Inputs]
    )
    linear.MarlinNvFp4LinearKernel = NvFp4FloatInputs
    mxfp4_emulation.has_quark = lambda: True
    mxfp4_emulation.dequant_mxfp4 = dequant_mxfp4
    mxfp4_emulation._ACTIVATION_QUANT_DEQUANT_FUNCS[kMxfp4Dynamic] = quant_dequant_mxfp4
