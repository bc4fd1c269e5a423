"""Quantized checkpoints as sources, against transcriptions of their formats made without this code."""

from __future__ import annotations

import dataclasses
import json
import struct

import numpy as np
import pytest
import torch

from quantcli.checkpoint import columns
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.encoded import Encoded
from quantcli.checkpoint.tensors import first_not_finite, read_rows, read_span, read_tensor
from quantcli.core.codes import fp8_values
from quantcli.core.errors import InputError
from quantcli.sources.decode import decoded
from tests import quantized
from tests.builders import make_model, tensor

BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
NORM = {"model.norm.weight": tensor("BF16", 8)}


def opened(folder, tensors, settings, **more):
    """The decoded checkpoint."""
    shards = {"model.safetensors": {**NORM, **tensors}}
    config = {"model_type": "llama"}
    if settings is not None:
        config["quantization_config"] = settings
    return decoded(open_checkpoint(make_model(folder, shards, config=config, **more)))


def check(checkpoint, name, expected):
    """The weight is the expected one, bit for bit, whole and by any rows."""
    stored = checkpoint.tensors[f"{name}.weight"]
    assert isinstance(stored, Encoded)
    expected = torch.from_numpy(expected)
    n, k = expected.shape
    assert stored.spec.shape == (n, k)
    assert torch.equal(read_tensor(stored), expected)
    for start, count in ((0, 1), (1, 2), (n // 2, n - n // 2), (n - 1, 1), (3, 11)):
        assert torch.equal(read_span(stored, start, count), expected[start : start + count])
    with stored.open() as reader:  # in no order
        for start in (n - 3, 0, 5):
            assert torch.equal(reader.weight(start, 3), expected[start : start + 3])
    assert torch.equal(read_rows(stored, [n - 1, 2]), expected[[n - 1, 2]])
    return stored


# -- codes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["alone", "together"])
def test_fp8_codes_are_what_their_bits_say(where):
    codes = torch.arange(256, dtype=torch.uint8)
    if where == "together":
        values = fp8_values(codes)
    else:  # NaN takes another way
        values = torch.cat([fp8_values(codes[i : i + 1]) for i in range(256)])
    expected = torch.from_numpy(quantized.FP8)
    assert torch.equal(values.isnan(), expected.isnan())
    assert int(expected.isnan().sum()) == 2
    sound = ~expected.isnan()
    assert torch.equal(values[sound].view(torch.int32), expected[sound].view(torch.int32))  # -0 too
    assert torch.equal(fp8_values(codes.view(torch.float8_e4m3fn))[sound], expected[sound])


def test_every_int4_code_and_zero_point(tmp_path):
    """All 16 codes times all 16 zero points, in both layouts."""
    for make, settings in ((quantized.awq, AWQ), (quantized.gptq, GPTQ)):
        tensors, weight = make("a", 64, 96)
        found = opened(tmp_path / settings["quant_method"], tensors, settings)
        stored = found.tensors["a.weight"]
        assert torch.equal(read_tensor(stored), torch.from_numpy(weight))
        scales = np.frombuffer(tensors["a.scales"][2], "<f2").reshape(3, 64).T.astype("f4")
        steps = np.rint(weight / np.repeat(scales, 32, 1))
        assert set(steps.ravel()) == set(range(-15, 16))


# -- fp8 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k", "block"),
    [(256, 256, (128, 128)), (130, 200, (128, 128)), (17, 40, (5, 7)), (20, 64, (1, 32))],
)
def test_fp8_blocks(tmp_path, n, k, block):
    tensors, weight = quantized.fp8_blocks("a", n, k, block)
    settings = BLOCKS | {"weight_block_size": list(block)}
    found = opened(tmp_path, tensors, settings)
    stored = check(found, "a", weight)
    assert stored.nbytes == n * k + 4 * -(-n // block[0]) * -(-k // block[1])
    assert found.notes == [f"decoded from fp8 blocks of {block[0]} x {block[1]}: 1 module"]
    assert list(found.tensors) == ["model.norm.weight", "a.weight"]


def test_the_scale_may_lie_in_another_shard_and_be_of_other_types(tmp_path):
    tensors, _ = quantized.fp8_blocks("a", 130, 200)
    codes = np.frombuffer(tensors["a.weight"][2], "u1").reshape(130, 200)
    exponents = np.array([[120, 125], [127, 130]], "u1")
    weight = np.empty((130, 200), "f4")
    for i in range(130):
        for j in range(200):
            power = 2.0 ** (float(exponents[i // 128, j // 128]) - 127)
            weight[i, j] = quantized.FP8[codes[i, j]] * power
    upper = (np.exp2(exponents.astype("f4") - 127).view("<u4") >> 16).astype("<u2")
    for name, scale in (
        ("e8m0", ("F8_E8M0", (2, 2), exponents.tobytes())),
        ("bf16", ("BF16", (2, 2), upper.tobytes())),
    ):
        shards = {
            "model-00001-of-00002.safetensors": {"a.weight": tensors["a.weight"]},
            "model-00002-of-00002.safetensors": {"a.weight_scale_inv": scale, **NORM},
        }
        folder = make_model(
            tmp_path / name, shards, config={"text_config": {"quantization_config": BLOCKS}}
        )
        check(decoded(open_checkpoint(folder)), "a", weight)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (24,), (24, 1)])
@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8"])
def test_fp8_per_tensor_and_per_channel(tmp_path, shape, method):
    codes = quantized.fp8_codes(24, 40)
    scale = np.random.default_rng(3).uniform(1e-3, 1e-2, shape).astype("f4")
    tensors = {
        "a.weight": ("F8_E4M3", (24, 40), codes.tobytes()),
        "a.weight_scale": quantized.f32(np.asarray(scale)),
        "a.input_scale": quantized.f32(np.ones(1, "f4")),
        "a.bias": tensor("BF16", 24),
    }
    found = opened(tmp_path, tensors, FP8 | {"quant_method": method})
    stored = check(found, "a", quantized.FP8[codes] * np.asarray(scale).reshape(-1, 1))
    assert stored.kind == ("fp8 per channel" if 24 in shape else "fp8 per tensor")
    assert list(found.tensors) == ["model.norm.weight", "a.weight", "a.bias"]
    assert [part.spec.name for part in stored.parts] == ["a.weight", "a.weight_scale", "a.input_scale"]


# -- int4 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "group"), [(40, 96, 32), (8, 64, -1), (24, 80, 32), (2048, 64, 64)])
def test_awq(tmp_path, monkeypatch, n, k, group):
    monkeypatch.setattr(columns, "STRIP_BYTES", 4 * k * 3)  # three words of eight channels
    tensors, weight = quantized.awq("a", n, k, k if group == -1 else group)
    found = opened(tmp_path, tensors, AWQ | {"group_size": group})
    stored = check(found, "a", weight)
    kind = "per channel" if group == -1 else f"in groups of {group}"
    assert found.notes == [f"decoded from awq int4 {kind}: 1 module"]
    assert stored.nbytes == sum(len(data) for _, _, data in tensors.values())
    assert list(found.tensors) == ["model.norm.weight", "a.weight"]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "group", "bits"), [(40, 96, 32, 4), (16, 80, 32, 8), (8, 64, -1, 4)]
)
def test_gptq(tmp_path, monkeypatch, n, k, group, bits, act_order, v2):
    monkeypatch.setattr(columns, "STRIP_BYTES", k * bits // 8 * 5)  # five rows
    columns_ = k if group == -1 else group
    tensors, weight = quantized.gptq("a", n, k, columns_, bits=bits, act_order=act_order, v2=v2)
    settings = GPTQ | {"group_size": group, "bits": bits, "desc_act": act_order}
    if v2:
        settings["checkpoint_format"] = "gptq_v2"
    check(opened(tmp_path, tensors, settings), "a", weight)
    if not act_order:  # then the index says nothing, and may be absent or empty
        index = tensors.pop("a.g_idx")
        check(opened(tmp_path / "without", tensors, settings), "a", weight)
        tensors["a.g_idx"] = (index[0], (0,), b"")
        check(opened(tmp_path / "empty", tensors, settings), "a", weight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("declared", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("v2", [False, True])
def test_symmetric_zero_points_tell_the_version(tmp_path, declared, v2, bits):
    tensors, weight = quantized.gptq("a", 16, 64, bits=bits, v2=v2, symmetric=True)
    settings = (
        GPTQ | {"sym": True, "bits": bits} | ({"checkpoint_format": declared} if declared else {})
    )
    found = opened(tmp_path, tensors, settings)
    check(found, "a", weight)
    stored_as = "gptq_v2" if v2 else "gptq"
    notes = [note for note in found.notes if "zero points are read as" in note]
    if stored_as == (declared or "gptq"):
        assert notes == []
    else:
        value = 2 ** (bits - 1) - (not v2)
        assert notes == [
            f"zero points are read as {stored_as}: config.json declares {declared or 'gptq'} with "
            f"`sym: true`, and `a.qzeros` holds {value}"
        ]


@pytest.mark.parametrize("usual", [True, False])
def test_gptq_modules_that_are_not_all_symmetric(tmp_path, usual):
    """`dynamic` says which of them are."""
    first, one = quantized.gptq("a", 16, 64, symmetric=usual)
    second, other = quantized.gptq("b", 16, 64, symmetric=not usual, bits=8, seed=3)
    settings = GPTQ | {"sym": usual, "dynamic": {"+:b$": {"sym": not usual, "bits": 8}}}
    found = opened(tmp_path, first | second, settings)
    check(found, "a", one)
    check(found, "b", other)


def test_zero_points_that_contradict_sym(tmp_path):
    tensors, _ = quantized.gptq("a", 16, 64)
    with pytest.raises(InputError, match="`sym: true` has one zero point"):
        opened(tmp_path, tensors, GPTQ | {"sym": True})
    first, _ = quantized.gptq("a", 16, 64, symmetric=True)
    found = opened(tmp_path / "second", first | quantized.gptq("b", 16, 64)[0], GPTQ | {"sym": True})
    read_span(found.tensors["a.weight"], 0, 16)
    with pytest.raises(
        InputError, match="zero point of row 0 is 0; with `sym: true` each is 8"
    ) as caught:
        read_span(found.tensors["b.weight"], 0, 16)
    assert "`b.qzeros`" in caught.value.where


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("declared", ["gptq", "gptq_v2"])
def test_asymmetric_weights_that_are_one_step_off_are_noted(tmp_path, declared, v2):
    n, k, group = 64, 256, 32
    random = np.random.default_rng(3)
    values = random.standard_normal((n, k // group, group))
    low, high = values.min(-1, keepdims=True), values.max(-1, keepdims=True)
    scale = (high - low) / 15
    zeros = np.rint(-low / scale)
    codes = np.clip(np.rint(values / scale) + zeros, 0, 15).astype("u4").reshape(n, k)
    stored = (zeros[..., 0].astype("i4") - (not v2)) % 16
    shifts = 4 * np.arange(8, dtype="u4")
    qweight = np.bitwise_or.reduce(codes.reshape(n, k // 8, 8) << shifts, axis=-1).T
    qzeros = np.bitwise_or.reduce(stored.T.astype("u4").reshape(-1, n // 8, 8) << shifts, axis=-1)
    tensors = {
        "a.qweight": quantized.i32(qweight),
        "a.qzeros": quantized.i32(qzeros),
        "a.scales": quantized.f16(scale[..., 0].T),
    }
    found = opened(tmp_path, tensors, GPTQ | {"checkpoint_format": declared})
    right = "gptq_v2" if v2 else "gptq"
    notes = [note for note in found.notes if "looks like" in note]
    if right == declared:
        assert notes == []
    else:
        (note,) = notes
        assert note.startswith(f"`a` looks like {right}: its weights are off by {'-' if v2 else '+'}")
        assert note.endswith(f"set `checkpoint_format: {right}` in config.json")


def test_older_producers_say_it_in_a_file_of_their_own(tmp_path):
    tensors, weight = quantized.awq("a", 8, 64)
    said = {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True}
    found = opened(tmp_path / "awq", tensors, None, files={"quant_config.json": json.dumps(said)})
    check(found, "a", weight)
    assert "quant_config.json" in found.left_out
    tensors, weight = quantized.gptq("a", 8, 64)
    said = {"bits": 4, "group_size": 32, "desc_act": False}
    found = opened(tmp_path / "gptq", tensors, None, files={"quantize_config.json": json.dumps(said)})
    check(found, "a", weight)


# -- formats that targets know -------------------------------------------------------------------


def compressed(format_, weights, inputs=None):
    """quantization_config of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


TOKENS = {"num_bits": 8, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(("n", "k", "group"), [(24, 96, 32), (19, 64, None), (13, 64, 16)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_packed_int4(tmp_path, n, k, group, symmetric, wide):
    name = "l.q_proj"
    tensors, weight = quantized.packed_int4(name, n, k, group, symmetric=symmetric, wide=wide)
    settings = {"num_bits": 4, "type": "int", "symmetric": symmetric}
    settings |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    found = opened(tmp_path, tensors, compressed("pack-quantized", settings))
    stored = check(found, name, weight)
    assert stored.nbytes == sum(len(data) for _, _, data in tensors.values())
    assert list(found.tensors) == ["model.norm.weight", f"{name}.weight"]


def test_int8_and_fp8_of_compressed_tensors(tmp_path):
    tensors, weight = quantized.int8_rows("l.q_proj", 24, 40)
    settings = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    found = opened(tmp_path / "int8", tensors, compressed("int-quantized", settings, TOKENS))
    check(found, "l.q_proj", weight)
    codes = quantized.fp8_codes(24, 40)
    scale = np.random.default_rng(3).uniform(1e-3, 1e-2, (24, 1)).astype("f4")
    stored, held = quantized.bf16(scale)
    tensors = {
        "l.q_proj.weight": ("F8_E4M3", (24, 40), codes.tobytes()),
        "l.q_proj.weight_scale": stored,
    }
    settings = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    inputs = TOKENS | {"type": "float"}
    found = opened(tmp_path / "fp8", tensors, compressed("float-quantized", settings, inputs))
    check(found, "l.q_proj", quantized.FP8[codes] * held)
    tensors, weight = quantized.fp8_blocks("l.q_proj", 130, 200)
    tensors = {name.replace("_inv", ""): stored for name, stored in tensors.items()}
    settings |= {"strategy": "block", "block_structure": [128, 128]}
    inputs |= {"strategy": "group", "group_size": 128}
    found = opened(tmp_path / "block", tensors, compressed("float-quantized", settings, inputs))
    check(found, "l.q_proj", weight)


def described(folder, tensors, kind):
    """The decoded checkpoint of ModelSlim's."""
    table = dict.fromkeys(tensors, kind) | dict.fromkeys(NORM, "FLOAT")
    return opened(folder, tensors, None, files={"quant_model_description.json": json.dumps(table)})


def test_modelslim(tmp_path):
    tensors, weight = quantized.int8_rows("l.q_proj", 24, 40)
    tensors["l.q_proj.weight_offset"] = quantized.f32(np.zeros((24, 1)))
    check(described(tmp_path / "a", tensors, "W8A8_DYNAMIC"), "l.q_proj", weight)
    tensors, weight = quantized.w4a8("l.q_proj", 26, 48)
    found = described(tmp_path / "b", tensors, "W4A8_DYNAMIC")
    stored = check(found, "l.q_proj", weight)
    assert [part.spec.name.rpartition(".")[2] for part in stored.parts] == [
        "weight", "weight_scale", "weight_offset", "scale_bias",
    ]  # fmt: skip
    assert list(found.tensors) == ["model.norm.weight", "l.q_proj.weight"]
    tensors, weight = quantized.flatquant("l.q_proj", 12, 8, 16)
    found = described(tmp_path / "c", tensors, "W4A4_FLATQUANT_DYNAMIC")
    made = read_tensor(found.tensors["l.q_proj.weight"])
    torch.testing.assert_close(made, torch.from_numpy(weight), rtol=1e-5, atol=1e-5)
    assert list(found.tensors) == ["model.norm.weight", "l.q_proj.weight"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("l.q_proj.weight_scale"), "describes `l.q_proj.weight_scale`, which"),
        (lambda t: t.pop("l.q_proj.weight"), "describes `l.q_proj.weight`, which"),
        (
            lambda t: t.update({"l.q_proj.weight_scale": tensor("F32", 3, 1)}),
            "W8A8_DYNAMIC has [24, 1]",
        ),
        (lambda t: t.update({"b.weight": tensor("I8", 4, 4)}), "`b.weight`"),
    ],
)
def test_what_modelslim_does_not_describe_is_refused(tmp_path, change, said):
    tensors, _ = quantized.int8_rows("l.q_proj", 24, 40)
    table = json.dumps(dict.fromkeys(tensors, "W8A8_DYNAMIC") | dict.fromkeys(NORM, "FLOAT"))
    change(tensors)
    with pytest.raises(InputError) as caught:
        opened(tmp_path, tensors, None, files={"quant_model_description.json": table})
    assert said in f"{caught.value.what} {caught.value.where}"


# -- the checkpoint ------------------------------------------------------------------------------


def test_float_and_decoded_checkpoints_stay_as_they_are(tmp_path):
    plain = open_checkpoint(make_model(tmp_path / "a"))
    assert decoded(plain) is plain
    stale = open_checkpoint(make_model(tmp_path / "b", config={"quantization_config": AWQ}))
    assert decoded(stale) is stale
    tensors, _ = quantized.fp8_blocks("a", 8, 8)
    made = opened(tmp_path / "c", tensors, BLOCKS)
    assert decoded(made) is made
    original = open_checkpoint(tmp_path / "c")
    assert made.fingerprint == original.fingerprint
    assert made.nbytes == original.nbytes
    assert made.on_disk == original.tensors


def scaled(name, shape, inputs=None):
    """Codes with one scale for the weight, or for each row, and the weight."""
    n, k = 20, 64
    codes = quantized.fp8_codes(n, k)
    count = int(np.prod(shape))
    scale = np.linspace(0.01, 0.02, count).astype("f4")
    rows = scale if count == n else np.repeat(scale, n)
    weight = (quantized.FP8[codes] * rows[:, None]).astype("f4")
    tensors = {"a.weight": ("F8_E4M3", (n, k), codes.tobytes())}
    tensors[f"a.{name}"] = ("F32", shape, scale.tobytes())
    return tensors | ({f"a.{inputs}": tensor("F32", fill=1)} if inputs else {}), weight


@pytest.mark.parametrize(
    ("name", "inputs"),
    [("weight_scale", "input_scale"), ("scale_weight", "scale_input"), ("weight_scale_inv", None)],
)
@pytest.mark.parametrize("shape", [(), (1,), (20,), (20, 1)], ids=str)
def test_fp8_without_a_config_is_told_by_its_headers(tmp_path, name, inputs, shape):
    tensors, weight = scaled(name, shape, inputs)
    found = opened(tmp_path, tensors, None)
    check(found, "a", weight)
    assert list(found.tensors) == ["model.norm.weight", "a.weight"]


@pytest.mark.parametrize("fmt", ["float8_e4m3fn", "e4m3", None])
def test_published_spellings_of_fmt(tmp_path, fmt):
    tensors, weight = quantized.fp8_blocks("a", 130, 200)
    check(opened(tmp_path, tensors, BLOCKS | {"fmt": fmt}), "a", weight)


@pytest.mark.parametrize("method", ["fp8", "mxfp8"])
def test_scales_of_uint8_are_exponents(tmp_path, method):
    codes = quantized.fp8_codes(20, 64)
    exponents = np.arange(110, 150, dtype="u1").reshape(20, 2)
    tensors = {"a.weight": ("F8_E4M3", (20, 64), codes.tobytes())}
    tensors["a.weight_scale_inv"] = ("U8", (20, 2), exponents.tobytes())
    powers = 2.0 ** (exponents.astype("f8") - 127)
    weight = (quantized.FP8[codes] * np.repeat(powers, 32, 1)).astype("f4")
    settings = BLOCKS | {"quant_method": method, "weight_block_size": [1, 32]}
    check(opened(tmp_path / "a", tensors, settings), "a", weight)
    exponents[3, 1] = 255
    tensors["a.weight_scale_inv"] = ("U8", (20, 2), exponents.tobytes())
    found = read_tensor(opened(tmp_path / "b", tensors, settings).tensors["a.weight"])
    assert found[3, 32:].isnan().all()
    assert int(found.isnan().sum()) == 32


MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}


@pytest.mark.parametrize("shape", [(), (20,)], ids=str)
@pytest.mark.parametrize("alone", [True, False])
def test_modelopt(tmp_path, shape, alone):
    """Its description stands in either of two files."""
    tensors, weight = scaled("weight_scale", shape, "input_scale")
    algorithm = "FP8_PER_CHANNEL_PER_TOKEN" if shape else "FP8"
    table = MODELOPT | {"quantization": {"quant_algo": algorithm}}
    files = {"hf_quant_config.json": json.dumps(table)} if alone else {}
    settings = None if alone else {"quant_method": "modelopt", "quant_algo": algorithm}
    check(opened(tmp_path, tensors, settings, files=files), "a", weight)


def test_modelopt_has_blocks_of_four_dimensions(tmp_path):
    tensors, weight = quantized.fp8_blocks("a", 130, 200)
    tensors["a.weight_scale"] = ("F32", (2, 1, 2, 1), tensors.pop("a.weight_scale_inv")[2])
    settings = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}
    check(opened(tmp_path, tensors, settings), "a", weight)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (
            {"quantization": {"quant_algo": "W4A8_AWQ"}},
            "hf_quant_config.json: `quant_algo` is 'W4A8_AWQ'",
        ),
        ({"quantization": 7}, "`quantization` should be an object, not the number 7"),
        ({}, "`quantization` should be an object, not null"),
    ],
)
def test_modelopt_of_other_formats(tmp_path, table, said):
    tensors, _ = scaled("weight_scale", ())
    with pytest.raises(InputError) as caught:
        opened(tmp_path, tensors, None, files={"hf_quant_config.json": json.dumps(table)})
    assert said in caught.value.what
    assert "hf_quant_config.json" in f"{caught.value.what} {caught.value.where}"


def test_scales_of_the_cache_belong_to_no_weight(tmp_path):
    tensors, _ = quantized.fp8_blocks("a", 8, 8)
    tensors["l.self_attn.k_scale"] = tensors["l.self_attn.v_scale"] = tensor("F32", 1)
    found = opened(tmp_path, tensors, BLOCKS)
    assert list(found.tensors) == ["model.norm.weight", "a.weight"]
    assert "l.self_attn.k_scale" in found.on_disk  # where the planner finds it


def fp8(**changes):
    return quantized.fp8_blocks("a", 130, 200)[0] | {f"a.{k}": v for k, v in changes.items()}


def without(tensors, *suffixes):
    return {name: t for name, t in tensors.items() if name.rpartition(".")[2] not in suffixes}


AWQ_TENSORS = quantized.awq("a", 16, 64)[0]
GPTQ_TENSORS = quantized.gptq("a", 16, 64)[0]
FP8_CODES = ("F8_E4M3", (2, 2), bytes(4))


@pytest.mark.parametrize(
    ("tensors", "settings", "said"),
    [
        (without(fp8(), "weight_scale_inv"), BLOCKS, "neither `a.weight_scale_inv` nor"),
        (fp8(weight_scale=tensor("F32", 1)), BLOCKS, "both `a.weight_scale_inv` and"),
        (fp8(weight_scale_inv=tensor("F32", 1, 2)), BLOCKS, "contradicts the tensors: blocks of"),
        (fp8(weight_scale_inv=tensor("I32", 2, 2)), BLOCKS, "scale is I32 [2, 2]; it must be float"),
        (fp8(), FP8, "contradicts the tensors: no weight_block_size"),
        (fp8(), BLOCKS | {"weight_block_size": [64, 64]}, "give a weight of 130 x 200 [3, 4] scales"),
        (fp8(), BLOCKS | {"weight_block_size": [0, 64]}, "`weight_block_size` is [0, 64]"),
        (fp8(), BLOCKS | {"weight_block_size": "128"}, "`weight_block_size` is '128'"),
        (fp8(), BLOCKS | {"fmt": "e5m2"}, "contradicts the tensors: `fmt` is 'e5m2'"),
        (fp8(), BLOCKS | {"fmt": "e3m4"}, "`fmt` is 'e3m4': only e4m3 and e5m2 are decoded"),
        (fp8(), BLOCKS | {"fmt": 3}, "`fmt` is 3, not text"),
        (
            fp8(weight=("F8_E5M2", (130, 200), bytes(26000))),
            BLOCKS | {"fmt": "e4m3"},
            "contradicts the tensors: `fmt` is 'e4m3'",
        ),
        (fp8(weight=("F8_E4M3FNUZ", (130, 200), bytes(26000))), BLOCKS, "codes are fp8 e4m3fnuz"),
        (fp8(weight=("F8_E4M3", (2, 65, 200), bytes(26000))), BLOCKS, "codes are F8_E4M3 [2, 65, 200]"),
        (without(fp8(), "weight"), BLOCKS, "`a.weight_scale_inv` belongs to no weight"),
        (fp8() | {"b.weight": tensor("I8", 4, 4)}, BLOCKS, "mixed: 1 module such as `a` are"),
        (fp8() | {"b.weight_scale": tensor("F32", 1)}, BLOCKS, "`b.weight_scale` belongs to no weight"),
        (fp8() | AWQ_TENSORS | {"b.qweight": tensor("I32", 4, 4)}, BLOCKS, "formats are mixed"),
        (fp8(), {"quant_method": "bitsandbytes"}, "already quantized: bitsandbytes, 1 module"),
        (fp8(), {"quant_method": "gguf"}, "this version decodes ascend, auto-round, awq, comfyui"),
        (fp8(), {"quant_method": ["fp8"]}, "quant_method` should be text, not a list"),
        (fp8(), None, "has no quantization_config for its fp8 weights"),
        (fp8(), {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "`a.weight_scale` is missing"),
        (fp8(), {"quant_method": "modelopt"}, "`quant_algo` is ''"),
        (fp8(), "fp8", "`quantization_config` should be an object, not text: it is 'fp8'"),
        (without(AWQ_TENSORS, "scales"), AWQ, "`a.scales` is missing"),
        (without(AWQ_TENSORS, "qzeros"), AWQ, "`a.qzeros` is missing"),
        (without(AWQ_TENSORS, "qweight"), AWQ, "`a.qzeros` belongs to no weight"),
        (AWQ_TENSORS | {"a.scales": ("F16", (4, 8), bytes(64))}, AWQ, "contradicts the tensors"),
        (AWQ_TENSORS | {"a.scales": ("I16", (2, 16), bytes(64))}, AWQ, "is I16 [2, 16]; AWQ has"),
        (AWQ_TENSORS | {"a.qzeros": tensor("I32", 1, 2)}, AWQ, "is I32 [1, 2]; AWQ of 16 x 64 has"),
        (AWQ_TENSORS | {"a.weight": tensor("F16", 16, 64)}, AWQ, "and `a.weight` as well"),
        (AWQ_TENSORS, AWQ | {"group_size": 64}, "give a weight of 16 x 64 [1, 16] scales"),
        (AWQ_TENSORS, AWQ | {"group_size": 0}, "in groups of 0"),
        (AWQ_TENSORS, AWQ | {"group_size": None}, "has no `group_size`"),
        (AWQ_TENSORS, AWQ | {"bits": 3}, "AWQ of 3 bits"),
        (AWQ_TENSORS, AWQ | {"bits": "4"}, "`bits` is '4', not a whole number"),
        (AWQ_TENSORS, AWQ | {"version": "gemv"}, "AWQ in the layout `gemv`"),
        (GPTQ_TENSORS, GPTQ | {"bits": 8}, "8 bits in groups of 32 give a weight of 16 x 32 [1, 16]"),
        (GPTQ_TENSORS, GPTQ | {"bits": 3}, "GPTQ of 3 bits"),
        (GPTQ_TENSORS, GPTQ | {"checkpoint_format": "marlin"}, "in the layout `marlin`"),
        (GPTQ_TENSORS, GPTQ | {"is_marlin_format": True}, "in the layout `marlin`"),
        (GPTQ_TENSORS | {"a.g_idx": tensor("I32", 3)}, GPTQ, "is I32 [3]; GPTQ of 16 x 64 has"),
        (GPTQ_TENSORS | {"a.qweight": tensor("U8", 8, 16)}, GPTQ, "is U8 [8, 16]; GPTQ has I32"),
        (GPTQ_TENSORS | {"b.weight": FP8_CODES}, GPTQ, "formats are mixed"),
        (GPTQ_TENSORS, BLOCKS, "but no tensor uses it"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, tensors, settings, said):
    with pytest.raises(InputError) as caught:
        opened(tmp_path, tensors, settings)
    assert said in caught.value.what
    assert caught.value.fix


def test_a_group_index_out_of_range_is_named(tmp_path):
    tensors, _ = quantized.gptq("a", 8, 64)
    index = np.arange(64) // 32
    for value in (2, -1):
        index[7] = value
        data = index.astype("<i4").tobytes()
        folder = tmp_path / str(value)
        found = opened(folder, tensors | {"a.g_idx": ("I32", (64,), data)}, GPTQ)
        with pytest.raises(InputError, match=f"is {value}; there are 2 groups") as caught:
            read_tensor(found.tensors["a.weight"])
        assert caught.value.where == "`a.g_idx`[7] in model.safetensors"


def test_what_is_not_finite_is_found_in_its_part(tmp_path):
    tensors, _ = quantized.fp8_blocks("a", 130, 200)
    data = bytearray(tensors["a.weight_scale_inv"][2])
    data[8:12] = struct.pack("<f", float("nan"))
    found = opened(tmp_path, tensors | {"a.weight_scale_inv": ("F32", (2, 2), bytes(data))}, BLOCKS)
    codes, scale = found.tensors["a.weight"].parts
    assert first_not_finite(codes) is None
    index, value = first_not_finite(scale)
    assert index == [1, 0]
    assert value != value
    assert torch.isnan(read_span(found.tensors["a.weight"], 128, 1)[0, :128]).all()


@pytest.mark.parametrize("suffix", ["left_trans", "input_scale"])
def test_siblings_that_one_engine_parameter_cannot_serve_are_refused(tmp_path, suffix):
    def siblings(value):
        tensors = {}
        for name in ("l.self_attn.q_proj", "l.self_attn.k_proj", "l.self_attn.v_proj"):
            if suffix == "left_trans":
                tensors |= quantized.flatquant(name, 12, 8, 16)[0]
                continue
            codes, _ = quantized.int8_rows(name, 24, 40)
            tensors[f"{name}.weight"] = codes[f"{name}.weight"]
            tensors |= {
                f"{name}.deq_scale": quantized.f32(np.full(24, 1e-3)),
                f"{name}.quant_bias": tensor("I32", 24),
                f"{name}.input_scale": quantized.bf16(np.full(1, 0.5, "f4"))[0],
                f"{name}.input_offset": quantized.bf16(np.zeros(1, "f4"))[0],
            }
        if value is not None:
            name = f"l.self_attn.k_proj.{suffix}"
            dtype, shape, data = tensors[name]
            tensors[name] = (dtype, shape, value + data[len(value) :])
        return tensors

    kind = "W4A4_FLATQUANT_DYNAMIC" if suffix == "left_trans" else "W8A8"
    sound = described(tmp_path / "sound", siblings(None), kind)
    assert len(sound.tensors) == 4
    with pytest.raises(InputError, match=suffix) as caught:
        described(tmp_path / "other", siblings(b"\x80\x3e"), kind)  # 0.25
    assert "_proj" in f"{caught.value.what} {caught.value.where}"


@pytest.mark.parametrize("value", [-0.5, 0.0])
def test_scales_that_are_not_positive_are_named(tmp_path, value):
    tensors, _ = quantized.fp8_blocks("l.q_proj", 130, 200)
    name = "l.q_proj.weight_scale_inv"
    data = bytearray(tensors[name][2])
    data[8:12] = struct.pack("<f", value)
    tensors[name] = ("F32", (2, 2), bytes(data))
    found = opened(tmp_path / "fp8", tensors, BLOCKS)
    read_span(found.tensors["l.q_proj.weight"], 0, 128)
    for first in (128, 129):
        with pytest.raises(InputError, match=f"weight_scale_inv is {value:g}: a scale is") as caught:
            read_span(found.tensors["l.q_proj.weight"], first, 1)
        assert caught.value.where == f"`{name}`[1, 0] in model.safetensors"
    settings = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    inputs = TOKENS | {"type": "float", "strategy": "group", "group_size": 128}
    tensors = {name.replace("_inv", ""): stored for name, stored in tensors.items()}
    found = opened(tmp_path / "block", tensors, compressed("float-quantized", settings, inputs))
    with pytest.raises(InputError) as caught:
        read_span(found.tensors["l.q_proj.weight"], 128, 2)
    assert caught.value.where == "`l.q_proj.weight_scale`[1, 0] in model.safetensors"
    tensors, _ = quantized.packed_int4("l.q_proj", 24, 96, 32, symmetric=True, wide=False)
    dtype, shape, data = tensors["l.q_proj.weight_scale"]
    size = len(data) // (shape[0] * shape[1])
    place = size * (5 * shape[1] + 2)
    scale = struct.pack("<f", value)[4 - size :]  # bfloat16 is the upper half of a float32
    tensors["l.q_proj.weight_scale"] = (dtype, shape, data[:place] + scale + data[place + size :])
    settings = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    found = opened(tmp_path / "int4", tensors, compressed("pack-quantized", settings))
    with pytest.raises(InputError) as caught:
        read_span(found.tensors["l.q_proj.weight"], 4, 3)
    assert caught.value.where == "`l.q_proj.weight_scale`[5, 2] in model.safetensors"


def test_a_scale_of_zero_with_codes_of_zero_is_sound(tmp_path):
    tensors, _ = quantized.fp8_blocks("a", 130, 200)
    codes = np.frombuffer(tensors["a.weight"][2], "u1").reshape(130, 200).copy()
    codes[128:, :128] = 0
    data = bytearray(tensors["a.weight_scale_inv"][2])
    data[8:12] = bytes(4)
    tensors["a.weight"] = ("F8_E4M3", (130, 200), codes.tobytes())
    tensors["a.weight_scale_inv"] = ("F32", (2, 2), bytes(data))
    found = read_tensor(opened(tmp_path, tensors, BLOCKS).tensors["a.weight"])
    assert not found[128:, :128].any()
    assert found[128:, 128:].any()


def test_codes_are_never_read_as_floats(tmp_path):
    from quantcli.checkpoint.tensors import read_bytes

    found = opened(tmp_path, quantized.fp8_blocks("a", 8, 8)[0], BLOCKS)
    with pytest.raises(AssertionError, match="codes are not weights"):
        read_bytes(found.tensors["a.weight"], 0, 4)
    assert dataclasses.replace(found.tensors["a.weight"]).nbytes == 68
