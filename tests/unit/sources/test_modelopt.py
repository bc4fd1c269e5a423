"""Sources that Model-Optimizer writes, against their formulas: each code, each scale."""

from __future__ import annotations

import json

import numpy as np
import pytest

from quantcli.core.errors import InputError
from tests import quantized
from tests.builders import tensor
from tests.unit.sources.test_blocks import e4m3_scales, every_byte, exponents, halves, of, u8
from tests.unit.sources.test_sources import check, opened

WHOLE = np.float32(0.0137)


def settings(algorithm, **more):
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], **more}


def nvfp4(module="a", n=34, k=160, group=16, *, inputs=True):
    octets, scales = every_byte(n, k // 2), e4m3_scales(n, k // group)
    tensors = {
        f"{module}.weight": u8(octets),
        f"{module}.weight_scale": of("F8_E4M3", scales),
        f"{module}.weight_scale_2": quantized.f32(WHOLE.reshape(())),
    }
    if inputs:
        tensors[f"{module}.input_scale"] = quantized.f32(np.float32(0.5).reshape(()))
    return tensors, halves(octets) * np.repeat(quantized.FP8[scales], group, 1) * WHOLE


def mxfp8(module="a", n=37, k=96):
    codes, scales = quantized.fp8_codes(n, k), exponents(n, k // 32)
    weight = quantized.FP8[codes] * np.repeat(np.exp2(scales.astype("f4") - 127), 32, 1)
    return {f"{module}.weight": of("F8_E4M3", codes), f"{module}.weight_scale": u8(scales)}, weight


def mxfp4(module="a", n=34, k=96):
    octets, scales = every_byte(n, k // 2), exponents(n, k // 32)
    weight = halves(octets) * np.repeat(np.exp2(scales.astype("f4") - 127), 32, 1)
    return {f"{module}.weight": u8(octets), f"{module}.weight_scale": u8(scales)}, weight


@pytest.mark.parametrize(
    ("algorithm", "made", "kind"),
    [
        ("NVFP4", nvfp4(), "nvfp4 in groups of 16"),
        ("nvfp4", nvfp4(), "nvfp4 in groups of 16"),
        ("W4A16_NVFP4", nvfp4(inputs=False), "nvfp4 in groups of 16"),
        ("W4A8_NVFP4_FP8", nvfp4(), "nvfp4 in groups of 16"),
        ("W4A8_MXFP4_FP8", mxfp4(), "mxfp4 in groups of 32"),
        ("MXFP8", mxfp8(), "mxfp8 in groups of 32"),
    ],
)
@pytest.mark.parametrize("method", ["modelopt", "modelopt_fp4"])
def test_small_scales(tmp_path, algorithm, made, kind, method):
    tensors, weight = made
    found = opened(tmp_path, tensors, settings(algorithm, quant_method=method))
    assert check(found, "a", weight).kind == kind
    assert list(found.tensors) == ["model.norm.weight", "a.weight"]


def test_a_description_alone(tmp_path):
    """The file of its own; scales of the cache are of no weight, and the file is not carried along."""
    tensors, weight = nvfp4()
    tensors["l.self_attn.k_proj.k_scale"] = tensor("F32", 1)
    table = {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": []}}
    found = opened(tmp_path, tensors, None, files={"hf_quant_config.json": json.dumps(table)})
    check(found, "a", weight)
    assert "hf_quant_config.json" not in found.aux
    assert "l.self_attn.k_proj.k_scale" not in found.tensors


def test_the_older_form_within_config_json(tmp_path):
    tensors, weight = mxfp8()
    block = {"quant_method": "modelopt", "quantization": {"quant_algo": "MXFP8"}}
    check(opened(tmp_path, tensors, block), "a", weight)


def test_a_mixture(tmp_path):
    """Modules are told apart by their tensors."""
    blocks, in_blocks = quantized.fp8_blocks("d", 130, 256)
    blocks["d.weight_scale"] = ("F32", (2, 1, 2, 1), blocks.pop("d.weight_scale_inv")[2])
    codes = quantized.fp8_codes(8, 12)
    rows = np.linspace(0.1, 2, 8, dtype="f4")
    channel = {"c.weight": of("F8_E4M3", codes), "c.weight_scale": quantized.f32(rows)}
    made = {"a": nvfp4("a"), "b": mxfp8("b"), "d": (blocks, in_blocks)}
    made["c"] = channel, quantized.FP8[codes] * rows[:, None]
    tensors = {name: t for group, _ in made.values() for name, t in group.items()}
    found = opened(tmp_path, tensors, settings("MIXED_PRECISION", quantized_layers={}))
    for module, (_, weight) in made.items():
        check(found, module, weight)


def without(tensors, suffix):
    return {name: t for name, t in tensors.items() if not name.endswith(suffix)}


SOUND = nvfp4()[0]


@pytest.mark.parametrize(
    ("tensors", "table", "said"),
    [
        (SOUND, settings("NVFP4_AWQ"), "`quant_algo` is 'NVFP4_AWQ': this version decodes FP8, "),
        (SOUND, settings("W4A16_AWQ"), "`quant_algo` is 'W4A16_AWQ'"),
        (SOUND, settings(None), "`quant_algo` is ''"),
        (without(SOUND, "weight_scale_2"), settings("NVFP4"), "`a.weight_scale_2` is missing"),
        (without(SOUND, "weight_scale"), settings("NVFP4"), "`a.weight_scale` is missing"),
        (
            SOUND | {"a.weight_scale": tensor("F8_E4M3", 34, 9)},
            settings("NVFP4"),
            "is F8_E4M3 [34, 9];",
        ),
        (SOUND | {"a.weight_scale": tensor("F32", 34, 10)}, settings("NVFP4"), "is F32 [34, 10];"),
        (
            SOUND | {"a.weight_scale_2": tensor("F32", 2)},
            settings("NVFP4"),
            "a scale of a whole weight",
        ),
        (SOUND, settings("NVFP4", group_size=-1), "NVFP4 in groups of -1"),
        (SOUND | {"a.pre_quant_scale": tensor("BF16", 160)}, settings("NVFP4"), "scaled by columns"),
        (SOUND | {"b.weight_scale_2": tensor("F32")}, settings("NVFP4"), "`b.weight_scale_2`"),
        (mxfp8()[0] | {"a.weight_scale": tensor("U8", 37, 2)}, settings("MXFP8"), "is U8 [37, 2];"),
    ],
)
def test_refused(tmp_path, tensors, table, said):
    with pytest.raises(InputError) as caught:
        opened(tmp_path, tensors, table)
    assert said in f"{caught.value.what} {caught.value.where}"
    assert caught.value.fix


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_global_scale_that_is_not_positive(tmp_path, value):
    tensors = SOUND | {"a.weight_scale_2": quantized.f32(np.float32(value).reshape(()))}
    stored = opened(tmp_path, tensors, settings("NVFP4")).tensors["a.weight"]
    with pytest.raises(InputError, match="a scale is a positive number"), stored.open() as rows:
        rows.weight(0, 1)
