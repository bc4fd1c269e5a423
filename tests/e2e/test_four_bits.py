"""Sources of four-bit and eight-bit floats in blocks, converted: every value is that of the formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import quantized
from tests.builders import Tensor, make_model
from tests.e2e.conftest import CONFIG, Box, llama, run_cli
from tests.e2e.test_sources import PLAIN, same, tensors_of
from tests.unit.sources.test_blocks import (
    E5M2,
    FP4_GROUPS,
    e4m3_scales,
    every_byte,
    exponents,
    halves,
    mark,
    of,
    quark,
    swizzled,
    u8,
)
from tests.unit.sources.test_sources import compressed

Made = tuple[dict[str, Tensor], np.ndarray]  # tensors of a module, and its weight
SIDE = 64
GLOBAL = np.float32(0.003).reshape(1)


def _powers(scales: np.ndarray) -> np.ndarray:
    return np.repeat(np.exp2(scales.astype("f4") - 127), 32, 1)


def nvfp4(module: str, n: int, k: int, seed: int) -> Made:
    octets, scales = every_byte(n, k // 2, seed), e4m3_scales(n, k // 16)
    divisor = np.float32(300).reshape(1)
    weight = halves(octets) * np.repeat(quantized.FP8[scales], 16, 1) / divisor
    return {
        f"{module}.weight_packed": u8(octets),
        f"{module}.weight_scale": of("F8_E4M3", scales),
        f"{module}.weight_global_scale": quantized.f32(divisor),
        f"{module}.input_global_scale": quantized.f32(divisor),
    }, weight


def mxfp4(module: str, n: int, k: int, seed: int) -> Made:
    octets, scales = every_byte(n, k // 2, seed), exponents(n, k // 32, 110, 128)
    tensors = {f"{module}.weight_packed": u8(octets), f"{module}.weight_scale": u8(scales)}
    return tensors, halves(octets) * _powers(scales)


def mxfp8(module: str, n: int, k: int, seed: int) -> Made:
    codes, scales = quantized.fp8_codes(n, k, seed), exponents(n, k // 32, 110, 120)
    tensors = {f"{module}.weight": of("F8_E4M3", codes), f"{module}.weight_scale": u8(scales)}
    return tensors, quantized.FP8[codes] * _powers(scales)


def unpacked(module: str, n: int, k: int, seed: int) -> Made:
    """MXFP4 under `weight`, as Ascend and Quark have it."""
    tensors, weight = mxfp4(module, n, k, seed)
    return {name.replace("_packed", ""): tensor for name, tensor in tensors.items()}, weight


def comfyui(module: str, n: int, k: int, seed: int) -> Made:
    octets, scales = every_byte(n, k // 2, seed), e4m3_scales(n, k // 16)
    weight = halves(octets, high_first=True) * np.repeat(quantized.FP8[scales], 16, 1) * GLOBAL
    return {
        f"{module}.weight": u8(octets),
        f"{module}.weight_scale": of("F8_E4M3", swizzled(scales)),
        f"{module}.weight_scale_2": quantized.f32(GLOBAL),
    } | mark(module, format="nvfp4"), weight


def modelopt(module: str, n: int, k: int, seed: int) -> Made:
    octets, scales = every_byte(n, k // 2, seed), e4m3_scales(n, k // 16)
    return {
        f"{module}.weight": u8(octets),
        f"{module}.weight_scale": of("F8_E4M3", scales),
        f"{module}.weight_scale_2": quantized.f32(GLOBAL.reshape(())),
        f"{module}.input_scale": quantized.f32(GLOBAL.reshape(())),
    }, halves(octets) * np.repeat(quantized.FP8[scales], 16, 1) * GLOBAL


def e5m2(module: str, n: int, k: int, seed: int) -> Made:
    codes = quantized.fp8_codes(n, k, seed) & 0xBF
    weight = E5M2[codes] * GLOBAL
    return {
        f"{module}.weight": of("F8_E5M2", codes),
        f"{module}.weight_scale": quantized.f32(GLOBAL),
    }, weight


def asymmetric(module: str, n: int, k: int, seed: int) -> Made:
    return quantized.packed_int4(module, n, k, 32, symmetric=False, wide=False, seed=seed)


def gptq(module: str, n: int, k: int, seed: int) -> Made:
    return quantized.gptq(module, n, k, 32, symmetric=True, seed=seed)


_FP4_16 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
_BLOCKS = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
_ASYMMETRIC = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True}
# how modules are stored, quantization_config, or the label in Ascend's description
KINDS: dict[str, tuple[Callable[[str, int, int, int], Made], dict[str, Any] | str | None]] = {
    "nvfp4": (nvfp4, compressed("nvfp4-pack-quantized", _FP4_16, _FP4_16 | {"dynamic": "local"})),
    "mxfp4": (mxfp4, compressed("mxfp4-pack-quantized", {"num_bits": 4} | _BLOCKS)),
    "mxfp8": (mxfp8, compressed("mxfp8-quantized", {"num_bits": 8} | _BLOCKS)),
    "asymmetric": (asymmetric, compressed("pack-quantized", _ASYMMETRIC)),
    "ascend mxfp4": (unpacked, "W4A4_MXFP4"),
    "ascend mxfp8": (mxfp8, "W8A8_MXFP8"),
    "quark mxfp4": (unpacked, quark(FP4_GROUPS)),
    "auto-round": (gptq, _ROUND),
    "comfyui": (comfyui, None),
    "modelopt nvfp4": (modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": []}),
    "modelopt mxfp8": (mxfp8, {"quant_method": "modelopt", "quant_algo": "MXFP8", "ignore": []}),
    "e5m2": (e5m2, {"quant_method": "fp8"}),
}


def make_source(folder: Path, kind: str) -> tuple[Path, Path]:
    """A llama whose projections are quantized, and the float model that it stands for."""
    make, settings = KINDS[kind]
    tensors: dict[str, Tensor] = {}
    floats: dict[str, Tensor] = {}
    labels: dict[str, str] = {}
    for seed, (name, (dtype, shape, data)) in enumerate(llama(side=SIDE).items()):
        module = name.removesuffix(".weight")
        if module.endswith("_proj"):
            parts, weight = make(module, *shape, seed)
            tensors |= parts
            floats[name] = quantized.f32(weight)
            labels |= dict.fromkeys(parts, settings) if isinstance(settings, str) else {}
        else:
            tensors[name] = floats[name] = dtype, shape, data
            labels[name] = "FLOAT"
    sides = {"hidden_size": SIDE, "intermediate_size": 2 * SIDE}
    config = CONFIG | sides | ({"quantization_config": settings} if isinstance(settings, dict) else {})
    files = {"quant_model_description.json": json.dumps(labels)} if isinstance(settings, str) else {}
    source = make_model(folder / "source", {"model.safetensors": tensors}, config=config, files=files)
    plain = make_model(folder / "float", {"model.safetensors": floats}, config=CONFIG | sides)
    return source, plain


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_that_of_the_formula(box: Box, kind: str) -> None:
    """In bfloat16, and as the float model is quantized."""
    source, plain = make_source(box.root, kind)
    assert run_cli("inspect", source).code == 0
    box.edit_recipe(PLAIN)
    done = run_cli("quantize", box.recipe, "--model", source, "--out", box.out)
    assert done.code == 0, done.err
    found, expected = tensors_of(box.out), tensors_of(plain)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].bfloat16()), name
    for recipe in ("w8a8_dynamic", "vllm_fp8_dynamic"):
        out, other = box.root / recipe, box.root / f"{recipe} of floats"
        assert run_cli("quantize", recipe, "--model", source, "--out", out).code == 0
        assert run_cli("quantize", recipe, "--model", plain, "--out", other).code == 0
        same(out, other)


NVFP4 = 'target: compressed-tensors\nrules:\n  - match: "*_proj"\n    scheme: nvfp4a16\n'


@pytest.mark.parametrize("kind", ["mxfp4", "ascend mxfp4", "quark mxfp4"])
@pytest.mark.parametrize("workers", [1, 3])
def test_mxfp4_becomes_nvfp4_without_any_loss(box: Box, kind: str, workers: int) -> None:
    source, plain = make_source(box.root, kind)
    box.edit_recipe(NVFP4)
    done = run_cli("quantize", box.recipe, "--model", source, "--out", box.out, "--workers", workers)
    assert done.code == 0, done.err
    assert "7 modules such as `model.layers.0.self_attn.q_proj` are MXFP4: no value changes" in done.out
    back = box.root / "back"
    box.edit_recipe(PLAIN)
    assert run_cli("quantize", box.recipe, "--model", box.out, "--out", back).code == 0
    expected = tensors_of(plain)
    for name, tensor in tensors_of(back).items():
        assert torch.equal(tensor.float(), expected[name].float()), name
    compared = run_cli("verify", box.out, "--against", source, "--json")
    assert compared.code == 0, compared.out
    assert all(module["max_rel_error"] == 0 for module in compared.json["modules"])


def test_other_weights_have_a_global_scale_of_their_own(box: Box) -> None:
    """One value that is none of an e2m1 number times a power of two: the note would not be true."""
    source, plain = make_source(box.root, "mxfp8")
    box.edit_recipe(NVFP4)
    done = run_cli("quantize", box.recipe, "--model", source, "--out", box.out)
    assert done.code == 0, done.err
    assert "no value changes" not in done.out
    found, floats = tensors_of(box.out), tensors_of(plain)
    name = "model.layers.0.mlp.down_proj.weight"
    divisor = found[f"{name}_global_scale"]
    assert float(divisor * floats[name].abs().amax()) == pytest.approx(2688, rel=1e-6)
