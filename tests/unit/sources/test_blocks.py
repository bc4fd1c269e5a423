"""Sources whose codes share scales in blocks: each code and each scale, in each order of storage."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch

from quantcli.checkpoint import columns
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.errors import InputError
from quantcli.sources.decode import decoded
from tests import quantized
from tests.builders import make_model, tensor
from tests.unit.sources.test_sources import NORM, check, opened

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], "f4")


def fp5_number(code):
    """What an e5m2 code stands for: sign, 5 bits of exponent with bias 15, 2 bits."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, fraction = (code >> 2) & 31, code & 3
    if exponent == 31:
        return sign * np.inf if fraction == 0 else np.nan
    return sign * (
        fraction / 4 * 2.0**-14 if exponent == 0 else (1 + fraction / 4) * 2.0 ** (exponent - 15)
    )


E5M2 = np.array([fp5_number(code) for code in range(256)], "f4")


def every_byte(n, width, seed=0):
    """Bytes [n, width], each value as often as the others, in no order."""
    flat = np.arange(n * width) % 256
    np.random.default_rng(seed).shuffle(flat)
    return flat.astype("u1").reshape(n, width)


def halves(octets, high_first=False):
    """The numbers of two codes in each byte: [n, w] -> [n, 2 w]."""
    out = np.empty((len(octets), 2 * octets.shape[1]), "f4")
    first, second = (octets >> 4, octets & 15) if high_first else (octets & 15, octets >> 4)
    out[:, 0::2], out[:, 1::2] = FP4[first], FP4[second]
    return out


def swizzled(scales):
    """As tensor cores read scales: of each 128 x 4, [r, c] at place 16 (r % 32) + 4 (r // 32) + c."""
    rows, groups = scales.shape
    height, width = rows + -rows % 128, groups + -groups % 4
    out = np.full(height * width, 0x38, scales.dtype)
    for r in range(rows):
        for c in range(groups):
            tile = (r // 128) * (width // 4) + c // 4
            out[tile * 512 + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] = scales[r, c]
    return out.reshape(height, width)


def e4m3_scales(n, groups):
    """Bytes of all numbers that are not negative, [n, groups]."""
    return (np.arange(n * groups) * 5 % 127).astype("u1").reshape(n, groups)


def exponents(n, groups, least=40, most=200):
    return (least + np.arange(n * groups) * 7 % (most - least)).astype("u1").reshape(n, groups)


def u8(values):
    return "U8", values.shape, np.ascontiguousarray(values, "u1").tobytes()


def of(dtype, values):
    return dtype, values.shape, np.ascontiguousarray(values, "u1").tobytes()


def mark(module, **settings):
    """ComfyUI's JSON next to a weight."""
    data = json.dumps(settings).encode()
    return {f"{module}.comfy_quant": ("U8", (len(data),), data)}


def comfy_nvfp4(n, k, dtype="F8_E4M3"):
    octets, scales = every_byte(n, k // 2), e4m3_scales(n, k // 16)
    weight = halves(octets, high_first=True) * np.repeat(quantized.FP8[scales], 16, 1)
    return {
        "a.weight": u8(octets),
        "a.weight_scale": of(dtype, swizzled(scales)),
        "a.weight_scale_2": quantized.f32(np.float32(0.011).reshape(())),
        "a.input_scale": quantized.f32(np.float32(0.5).reshape(())),
    }, weight * np.float32(0.011)


# -- ComfyUI -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(128, 64), (16, 16), (130, 80), (300, 192), (256, 16)])
@pytest.mark.parametrize("dtype", ["F8_E4M3", "U8"])
def test_nvfp4_of_comfyui(tmp_path, n, k, dtype):
    """The high nibble first, swizzled scales with padding."""
    tensors, weight = comfy_nvfp4(n, k, dtype)
    found = opened(tmp_path, tensors | mark("a", format="nvfp4"), None)
    stored = check(found, "a", weight)
    assert stored.kind == "comfyui nvfp4"
    assert list(found.tensors) == ["model.norm.weight", "a.weight"]
    assert found.notes == ["decoded from comfyui nvfp4: 1 module"]


@pytest.mark.parametrize(("n", "k"), [(128, 128), (10, 32), (130, 160)])
@pytest.mark.parametrize("dtype", ["F8_E8M0", "U8"])
def test_mxfp8_of_comfyui(tmp_path, n, k, dtype):
    codes, scales = quantized.fp8_codes(n, k), exponents(n, k // 32)
    powers = np.exp2(scales.astype("f4") - 127)
    tensors = {"a.weight": of("F8_E4M3", codes), "a.weight_scale": of(dtype, swizzled(scales))}
    found = opened(tmp_path, tensors | mark("a", format="mxfp8"), None)
    check(found, "a", quantized.FP8[codes] * np.repeat(powers, 32, 1))


@pytest.mark.parametrize(
    ("name", "dtype", "table"),
    [("float8_e4m3fn", "F8_E4M3", quantized.FP8), ("float8_e5m2", "F8_E5M2", E5M2)],
)
@pytest.mark.parametrize("shape", [(), (24, 1)])
def test_fp8_of_comfyui_with_its_formats_in_the_header(tmp_path, name, dtype, table, shape):
    codes = quantized.fp8_codes(24, 40) & 0xBF  # no number that is not finite in either type
    scale = np.random.default_rng(1).uniform(0.01, 1, shape).astype("f4")
    tensors = {
        "a.weight": of(dtype, codes),
        "a.weight_scale": quantized.f32(np.asarray(scale)),
        "model.norm.weight": tensor("BF16", 8),
    }
    folder = make_model(tmp_path, {"model.safetensors": tensors}, config={"model_type": "llama"})
    with_metadata(folder / "model.safetensors", {"layers": {"a": {"format": name}}})
    found = decoded(open_checkpoint(folder))
    stored = check(found, "a", table[codes] * np.asarray(scale).reshape(-1, 1))
    assert stored.kind == f"comfyui {name} per {'channel' if shape else 'tensor'}"


def with_metadata(file, table):
    """Give a file metadata as ComfyUI's converters write it."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = {"_quantization_metadata": json.dumps(table)}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def test_int8_of_comfyui(tmp_path):
    tensors, weight = quantized.int8_rows("a", 24, 40)
    check(opened(tmp_path, tensors | mark("a", format="int8_tensorwise"), None), "a", weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (mark("a", format="int4_awq"), "has the format 'int4_awq': this version decodes float8_e4m3fn"),
        (mark("a", format=None), "has the format None"),
        (mark("a", format="nvfp4", convrot=True), "is rotated (convrot), which is not decoded"),
        (mark("a", format="nvfp4", params={"convrot": True}), "is rotated (convrot)"),
        (mark("a", format="mxfp8"), "is U8 [16, 8]; mxfp8 has codes in F8_E4M3"),
        ({"a.comfy_quant": ("U8", (3,), b"{1}")}, "not valid JSON"),
        ({"a.comfy_quant": ("U8", (0,), b"")}, "it is a short JSON in U8"),
        ({"a.comfy_quant": ("F32", (1,), bytes(4))}, "it is a short JSON in U8"),
        ({"a.weight_scale": tensor("F8_E4M3", 16, 1)}, "swizzled scales of 16 x 1 blocks are [128, 4]"),
        ({"a.weight_scale": tensor("F32", 128, 4)}, "nvfp4 has scales in F8_E4M3 or U8"),
        ({"a.weight_scale_2": tensor("F32", 2)}, "a scale of a whole weight is one float"),
        ({"a.weight_scale_2": None}, "`a.weight_scale_2` is missing"),
        ({"a.weight": None}, "names a format, and `a.weight` is missing"),
        ({"a.pre_quant_scale": tensor("F32", 16)}, "has a `a.pre_quant_scale` for its inputs"),
    ],
)
def test_damage_of_comfyui_is_named(tmp_path, change, said):
    tensors = comfy_nvfp4(16, 16)[0] | mark("a", format="nvfp4") | change
    with pytest.raises(InputError) as caught:
        opened(tmp_path, {name: t for name, t in tensors.items() if t is not None}, None)
    assert said in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_of_a_whole_weight_is_a_positive_number(tmp_path, value):
    tensors = comfy_nvfp4(16, 16)[0] | mark("a", format="nvfp4")
    tensors["a.weight_scale_2"] = quantized.f32(np.float32(value).reshape(1))
    found = opened(tmp_path, tensors, None)
    with pytest.raises(InputError, match="a scale is a positive number"):
        read_tensor(found.tensors["a.weight"])


# -- e5m2, DeepSeek-V4 ---------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [None, "e5m2"])
@pytest.mark.parametrize("block", [None, [16, 8]])
def test_every_e5m2_code(tmp_path, fmt, block):
    codes = every_byte(48, 40)
    codes[codes & 0x7C == 0x7C] = 0x3C
    shape = (3, 5) if block else (1,)
    scale = np.random.default_rng(2).uniform(0.1, 1, shape).astype("f4")
    wide = np.kron(scale, np.ones((16, 8), "f4")) if block else scale
    tensors = {"a.weight": of("F8_E5M2", codes), "a.weight_scale": quantized.f32(scale)}
    settings = {"quant_method": "fp8", "weight_block_size": block} | ({"fmt": fmt} if fmt else {})
    found = opened(tmp_path, tensors, settings)
    stored = check(found, "a", E5M2[codes] * wide)
    assert stored.kind == ("fp8 e5m2 blocks of 16 x 8" if block else "fp8 e5m2 per tensor")
    if block is None:
        check(opened(tmp_path / "plain", tensors, None), "a", E5M2[codes] * wide)


@pytest.mark.parametrize("dtype", ["F8_E8M0", "U8"])
@pytest.mark.parametrize(("n", "k"), [(32, 64), (7, 96)])
def test_experts_of_deepseek_v4(tmp_path, dtype, n, k):
    """Four bits in int8 next to fp8 blocks, both with a `scale`."""
    octets, scales = every_byte(n, k // 2), exponents(n, k // 32)
    codes, blocks = quantized.fp8_codes(130, 200), np.array([[120, 125], [127, 130]], "u1")
    power = lambda bytes_: np.exp2(bytes_.astype("f4") - 127)  # noqa: E731
    tensors = {
        "layers.0.ffn.experts.0.w1.weight": ("I8", octets.shape, octets.tobytes()),
        "layers.0.ffn.experts.0.w1.scale": of(dtype, scales),
        "layers.0.attn.wo_b.weight": of("F8_E4M3", codes),
        "layers.0.attn.wo_b.scale": of(dtype, blocks),
    }
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    found = opened(tmp_path, tensors, settings)
    expected = halves(octets) * np.repeat(power(scales), 32, 1)
    stored = check(found, "layers.0.ffn.experts.0.w1", expected)
    assert stored.kind == "mxfp4 in groups of 32"
    wide = np.kron(power(blocks), np.ones((128, 128), "f4"))[:130, :200]
    check(found, "layers.0.attn.wo_b", quantized.FP8[codes] * wide)


# -- Quark ---------------------------------------------------------------------------------------


def quark(weight, **more):
    """The settings of a checkpoint with one kind of weights."""
    return {
        "quant_method": "quark",
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
        "global_quant_config": {"weight": weight, "input_tensors": None},
        "layer_type_quant_config": {},
        "layer_quant_config": {},
        "exclude": ["lm_head"],
    } | more


FP4_GROUPS = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
INT4_GROUPS = {"dtype": "int4", "qscheme": "per_group", "group_size": 16, "symmetric": True}


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(("n", "k"), [(32, 64), (7, 96)])
def test_mxfp4_of_quark(tmp_path, listed, n, k):
    octets, scales = every_byte(n, k // 2), exponents(n, k // 32, 1, 255 - 3)
    weight = halves(octets) * np.repeat(np.exp2(scales.astype("f4") - 127), 32, 1)
    tensors = {"a.weight": u8(octets), "a.weight_scale": u8(scales)}
    found = opened(tmp_path, tensors, quark([FP4_GROUPS] if listed else FP4_GROUPS))
    assert check(found, "a", weight).kind == "quark mxfp4 in groups of 32"


@pytest.mark.parametrize(("n", "k"), [(32, 64), (7, 80)])
def test_nvfp4_of_quark(tmp_path, n, k):
    octets, scales = every_byte(n, k // 2), e4m3_scales(n, k // 16)
    weight = halves(octets) * np.repeat(quantized.FP8[scales], 16, 1) * np.float32(0.003)
    tensors = {
        "a.weight": u8(octets),
        "a.weight_scale": of("F8_E4M3", scales),
        "a.weight_scale_2": quantized.f32(np.float32(0.003).reshape(1)),
        "a.input_scale_2": quantized.f32(np.float32(0.5).reshape(1)),
    }
    pair = [FP4_GROUPS | {"group_size": 16}, {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}]
    found = opened(tmp_path, tensors, quark(pair))
    assert check(found, "a", weight).kind == "quark nvfp4 in groups of 16"
    assert list(found.tensors) == ["model.norm.weight", "a.weight"]


@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("n", "k"), [(40, 96), (8, 80), (2048, 64)])
def test_int4_of_quark(tmp_path, monkeypatch, reordered, signed, n, k):
    """Words of eight output channels, in AWQ's order or in their own; signed nibbles or not."""
    monkeypatch.setattr(columns, "STRIP_BYTES", 4 * k * 3)
    random = np.random.default_rng(5)
    groups = k // 16
    codes, zeros = random.integers(0, 16, (n, k)), random.integers(0, 16, (n, groups))
    scales = random.uniform(1e-3, 1e-2, (n, groups)).astype("f2")
    order = quantized.AWQ_CHANNELS if reordered else range(8)

    def packed(values):
        words = np.zeros((values.shape[1], n // 8), "u4")
        for place, channel in enumerate(order):
            words |= values[channel::8].T.astype("u4") << np.uint32(4 * place)
        return quantized.i32(words)

    number = (lambda nibble: np.where(nibble > 7, nibble - 16, nibble)) if signed else np.asarray
    steps = number(codes) - np.repeat(number(zeros), 16, 1)
    weight = steps.astype("f4") * np.repeat(scales.astype("f4"), 16, 1)
    tensors = {
        "a.weight": packed(codes),
        "a.weight_zero_point": packed(zeros),
        "a.weight_scale": quantized.f16(scales.T),
    }
    entry = INT4_GROUPS | {"dtype": "int4" if signed else "uint4"}
    export = {"kv_cache_group": [], "pack_method": "reorder" if reordered else "order"}
    check(opened(tmp_path, tensors, quark(entry, export=export)), "a", weight)
    if signed:
        del tensors["a.weight_zero_point"]
        plain = number(codes).astype("f4") * np.repeat(scales.astype("f4"), 16, 1)
        check(opened(tmp_path / "plain", tensors, quark(entry, export=export)), "a", plain)


@pytest.mark.parametrize(
    ("entry", "shape", "rows", "columns"),
    [
        ({"qscheme": "per_tensor"}, (), 24, 64),
        ({"qscheme": "per_channel", "ch_axis": 0}, (24,), 1, 64),
        ({"qscheme": "per_block", "block_size": [8, 16]}, (3, 4), 8, 16),
    ],
)
@pytest.mark.parametrize("element", ["fp8_e4m3", "int8"])
def test_fp8_and_int8_of_quark(tmp_path, entry, shape, rows, columns, element):
    codes = quantized.fp8_codes(24, 64)
    scale = np.random.default_rng(3).uniform(1e-3, 1e-2, shape).astype("f4")
    wide = np.kron(np.asarray(scale).reshape(24 // rows, 64 // columns), np.ones((rows, columns), "f4"))
    values = quantized.FP8[codes] if element == "fp8_e4m3" else codes.view("i1").astype("f4")
    dtype = "F8_E4M3" if element == "fp8_e4m3" else "I8"
    tensors = {
        "a.weight": of(dtype, codes),
        "a.weight_scale": quantized.f32(np.asarray(scale)),
        "a.input_scale": quantized.f32(np.ones(1)),
        "a.input_zero_point": ("I8", (1,), bytes(1)),
    }
    settings = quark({"dtype": element, "symmetric": True} | entry)
    check(opened(tmp_path, tensors, settings), "a", values * wide)


def test_mxfp8_of_quark_and_exceptions_by_name(tmp_path):
    codes, scales = quantized.fp8_codes(24, 64), exponents(24, 2)
    octets, groups = every_byte(24, 32), exponents(24, 2)
    tensors = {
        "l.a_proj.weight": of("F8_E4M3", codes),
        "l.a_proj.weight_scale": of("F8_E8M0", scales),
        "l.b_proj.weight": u8(octets),
        "l.b_proj.weight_scale": u8(groups),
        "l.c_proj.weight": tensor("BF16", 4, 4),
    }
    entry = {"weight": FP4_GROUPS | {"dtype": "fp8_e4m3"}}
    found = opened(tmp_path, tensors, quark(FP4_GROUPS, layer_quant_config={"*.a_proj": entry}))
    power = lambda bytes_: np.repeat(np.exp2(bytes_.astype("f4") - 127), 32, 1)  # noqa: E731
    check(found, "l.a_proj", quantized.FP8[codes] * power(scales))
    check(found, "l.b_proj", halves(octets) * power(groups))
    assert found.tensors["l.c_proj.weight"].spec.dtype == "BF16"


MXFP4 = {"a.weight": tensor("U8", 8, 16), "a.weight_scale": tensor("U8", 8, 1)}


@pytest.mark.parametrize(
    ("tensors", "settings", "said"),
    [
        (MXFP4, quark(None), "says nothing of the weight of `a`"),
        (MXFP4, quark([]), "says nothing of the weight of `a`"),
        (MXFP4, quark(FP4_GROUPS | {"group_size": 16}), "fp4 in groups of 16: this version decodes"),
        (MXFP4, quark(FP4_GROUPS | {"group_size": "32"}), "`group_size` is '32'"),
        (MXFP4, quark({"dtype": "fp6_e3m2"}), "has weights of 'fp6_e3m2': this version decodes"),
        (
            MXFP4,
            quark(FP4_GROUPS, layer_quant_config=3),
            "should be an object, not the number 3",
        ),
        (MXFP4 | {"a.weight": tensor("I8", 8, 16)}, quark(FP4_GROUPS), "fp4 has two codes in each U8"),
        (MXFP4 | {"a.weight": tensor("U8", 8, 8)}, quark(FP4_GROUPS), "groups of 32 columns do not"),
        (
            MXFP4 | {"a.weight_scale": tensor("F32", 8, 1)},
            quark(FP4_GROUPS),
            "has U8 or F8_E8M0 [8, 1]",
        ),
        (
            MXFP4,
            quark({"dtype": "fp8_e4m3", "qscheme": "per_tensor"}),
            "weights are fp8_e4m3; `a.weight`",
        ),
        (
            {"a.weight": tensor("I8", 8, 16), "a.weight_scale": tensor("F32", 8)},
            quark({"dtype": "int8", "qscheme": "per_channel", "symmetric": False}),
            "asymmetric int8",
        ),
        (
            {"a.weight": tensor("I32", 16, 1), "a.weight_scale": tensor("F16", 1, 8)},
            quark(INT4_GROUPS | {"qscheme": "per_channel"}),
            "this version decodes int4 and uint4 in groups",
        ),
        (
            {"a.weight": tensor("I32", 16, 1), "a.weight_scale": tensor("F16", 1, 8)},
            quark(INT4_GROUPS | {"dtype": "uint4"}),
            "`a.weight_zero_point` is missing",
        ),
        (
            {"a.weight": tensor("I32", 16, 1), "a.weight_scale": tensor("F16", 1, 8)},
            quark(INT4_GROUPS, export={"pack_method": "other"}),
            "`export.pack_method` is 'other'",
        ),
    ],
)
def test_damage_of_quark_is_named(tmp_path, tensors, settings, said):
    with pytest.raises(InputError) as caught:
        opened(tmp_path, tensors, settings)
    assert said in caught.value.what
    assert caught.value.fix


# -- auto-round ----------------------------------------------------------------------------------

ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "int"}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("form", "v2"),
    [
        ("auto_round:auto_gptq", False),
        (None, False),
        ("auto_round", True),
        ("auto_round:gptqmodel", True),
    ],
)
def test_gptq_of_auto_round(tmp_path, form, v2, symmetric):
    tensors, weight = quantized.gptq("a", 40, 96, v2=v2, symmetric=symmetric)
    del tensors["a.g_idx"]
    settings = ROUND | {"sym": symmetric} | ({"packing_format": form} if form else {})
    found = opened(tmp_path, tensors, settings)
    assert check(found, "a", weight).kind == "gptq int4 in groups of 32" + " (v2)" * v2
    if symmetric:  # the default
        settings.pop("sym")
        check(opened(tmp_path / "default", tensors, settings), "a", weight)


def test_awq_of_auto_round(tmp_path):
    tensors, weight = quantized.awq("a", 40, 96)
    settings = ROUND | {"sym": False, "packing_format": "auto_round:auto_awq"}
    check(opened(tmp_path, tensors, settings), "a", weight)


@pytest.mark.parametrize("key", ["l.b_proj", "b_proj", r".*\.b_proj"])
def test_exceptions_of_auto_round(tmp_path, key):
    """By a name, the end of one, or an expression; bits of 16 are a float module."""
    first, one = quantized.gptq("l.a_proj", 16, 64, symmetric=True)
    second, other = quantized.gptq("l.b_proj", 16, 64, 16, bits=8, symmetric=True, seed=3)
    extra = {key: {"bits": 8, "group_size": 16}, "l.c_proj": {"bits": 16, "data_type": "fp"}}
    tensors = first | second | {"l.c_proj.weight": tensor("BF16", 4, 4)}
    found = opened(tmp_path, tensors, ROUND | {"extra_config": extra})
    check(found, "l.a_proj", one)
    check(found, "l.b_proj", other)


def test_floats_of_auto_round(tmp_path):
    octets, scales = every_byte(24, 32), exponents(24, 2)
    power = np.repeat(np.exp2(scales.astype("f4") - 127), 32, 1)
    tensors = {"a.weight_packed": u8(octets), "a.weight_scale": u8(scales)}
    settings = ROUND | {"packing_format": "auto_round:llm_compressor", "data_type": "mx_fp4"}
    found = opened(tmp_path / "mxfp4", tensors, settings)
    assert check(found, "a", halves(octets) * power).kind == "mxfp4 in groups of 32"
    codes = quantized.fp8_codes(24, 64)
    tensors = {"a.weight": of("F8_E4M3", codes), "a.weight_scale": u8(scales)}
    found = opened(tmp_path / "mxfp8", tensors, settings | {"data_type": "mx_fp", "bits": 8})
    check(found, "a", quantized.FP8[codes] * power)
    scales, whole = e4m3_scales(24, 4), np.float32(6861.67)
    tensors = {
        "a.weight_packed": u8(octets),
        "a.weight_scale": of("F8_E4M3", scales),
        "a.weight_global_scale": quantized.f32(whole.reshape(1)),
        "a.input_global_scale": quantized.f32(whole.reshape(1)),
    }
    found = opened(tmp_path / "nvfp4", tensors, settings | {"data_type": "nv_fp", "group_size": 16})
    check(found, "a", halves(octets) * np.repeat(quantized.FP8[scales], 16, 1) / whole)
    tensors, weight = quantized.fp8_blocks("a", 130, 200)
    settings = ROUND | {"packing_format": "auto_round:fp8", "data_type": "fp", "bits": 8}
    check(opened(tmp_path / "fp8", tensors, settings | {"group_size": [128, 128]}), "a", weight)


GPTQ_TENSORS = quantized.gptq("a", 16, 64, symmetric=True)[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 2}, "`a` has 2 bits: this version decodes 4 and 8 of GPTQ"),
        ({"bits": None}, "has no `bits`"),
        ({"extra_config": {"a": {"bits": 3}}}, "`a` has 3 bits"),
        ({"extra_config": {"a": {"group_size": "x"}}}, "`group_size` is 'x'"),
        ({"extra_config": [1]}, "extra_config"),
        ({"extra_config": {"(": {}}}, "`(` is not a regular expression"),
        ({"extra_config": {"(a{999}){999}": {}}}, "`(a{999}){999}` is too costly"),
        ({"rotation_config": {"x": 1}}, "rotated weights are not decoded"),
        ({"data_type": "fp6"}, "`data_type` is 'fp6', which is not decoded"),
        ({"data_type": "nf4"}, "`data_type` is 'nf4'"),
    ],
)
def test_damage_of_auto_round_is_named(tmp_path, settings, said):
    with pytest.raises(InputError) as caught:
        opened(tmp_path, GPTQ_TENSORS, ROUND | settings)
    assert said in caught.value.what
    assert caught.value.fix


def test_what_only_serving_needs_is_a_part_of_its_module(tmp_path):
    tensors = comfy_nvfp4(16, 16)[0] | mark("a", format="nvfp4")
    stored = opened(tmp_path, tensors, None).tensors["a.weight"]
    assert {part.spec.name for part in stored.parts} == tensors.keys()
    assert stored.parts[0].spec.name == "a.weight"
    assert torch.equal(read_tensor(stored), read_tensor(stored))
    assert NORM.keys() == {"model.norm.weight"}
