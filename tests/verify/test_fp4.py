"""NVFP4 and MXFP4 in compressed-tensors as others write them: no false alarm, and damage is seen."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.targets.vllm_family import fused_siblings
from tests.e2e.conftest import run_cli
from tests.tiny_models import make_tiny
from tests.verify.producers import CONFIG as MODEL
from tests.verify.producers import (
    E2M1,
    float_model,
    groups,
    mxfp4,
    others,
    weights,
    write,
)
from tests.verify.test_producers import change, errors, examine, sound, weight

K = "model.layers.0.self_attn.k_proj"
UP = "model.layers.0.mlp.up_proj"
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
         "symmetric": True, "dynamic": False, "scale_dtype": "torch.float8_e4m3fn",
         "observer": "memoryless_minmax", "zp_dtype": None}  # fmt: skip
LOCAL = NVFP4 | {"dynamic": "local", "observer": "static_minmax"}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
         "dynamic": False, "scale_dtype": "torch.uint8"}  # fmt: skip
TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
LARGEST = 448.0  # scale of a block


def codes_of(values):
    """Nearest e2m1 codes, packed."""
    codes = (values.abs().unsqueeze(2) - torch.tensor(E2M1)).abs().argmin(2) + 8 * (values < 0)
    return (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)


def nvfp4(weight, divisor, top=6.0):
    """As llm-compressor: `top` is the code of the largest weight of a block."""
    rows = weight.view(len(weight), -1, 16)
    scale = (rows.abs().amax(2) / top * divisor).to(torch.float8_e4m3fn)
    values = (rows / (scale.float() / divisor).unsqueeze(2)).flatten(1)
    return {"weight_packed": codes_of(values), "weight_scale": scale,
            "weight_global_scale": divisor.view(1)}  # fmt: skip


def nvfp4_checkpoint(folder, *, inputs=False, top=6.0, largest=LARGEST, scalar=False):
    """All projections; siblings have one divisor."""
    table, amax = dict(others()), {}
    for name, w in weights().items():
        group = fused_siblings(name) or name
        amax[group] = max(amax.get(group, torch.zeros(())), w.abs().max())
    for name, w in weights().items():
        parts = nvfp4(w, largest * 6 / amax[fused_siblings(name) or name], top)
        if inputs:
            parts["input_global_scale"] = torch.tensor([LARGEST * 6 / 7.5])
        if scalar:
            parts |= {suffix: t.view(()) for suffix, t in parts.items() if "global" in suffix}
        table |= {f"{name}.{suffix}": tensor for suffix, tensor in parts.items()}
    block = groups("nvfp4-pack-quantized", NVFP4, LOCAL if inputs else None)
    return write(folder, table, MODEL | {"quantization_config": block})


def mxfp4_checkpoint(folder, inputs=None):
    """All projections, and the inputs that config.json says."""
    table = dict(others())
    for name, w in weights().items():
        parts = mxfp4(w)
        table[f"{name}.weight_packed"] = parts["weight"]
        table[f"{name}.weight_scale"] = parts["weight_scale"]
    block = groups("mxfp4-pack-quantized", MXFP4, inputs)
    return write(folder, table, MODEL | {"quantization_config": block})


@pytest.fixture
def source(tmp_path):
    return float_model(tmp_path / "float")


def by_definition(parts, columns):
    """Code by code: value * scale / divisor."""
    scale, divisor = parts["weight_scale"], float(parts.get("weight_global_scale", torch.ones(1)))
    rows = []
    for r, octets in enumerate(parts["weight_packed"].tolist()):
        row = []
        for nibble in [n for octet in octets for n in (octet & 15, octet >> 4)]:
            place = scale[r, len(row) // columns]
            step = float(place) if scale.dtype != torch.uint8 else 2.0 ** (int(place) - 127)
            row.append((-1) ** (nibble >> 3) * E2M1[nibble & 7] * step / divisor)
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize(
    "options",
    [{}, {"inputs": True}, {"scalar": True}, {"top": 4.0, "largest": 256.0}, {"largest": 256.0}],
    ids=["weights", "inputs", "without a dimension", "blocks to 4", "headroom"],
)
def test_nvfp4_of_others(tmp_path, source, options):
    path = nvfp4_checkpoint(tmp_path / "q", **options)
    assert sound(path, source) == []
    label = "nvfp4" if options.get("inputs") else "nvfp4 float inputs"
    assert {module.label for module in examine(path, source).modules} == {label}
    parts = {s: t for s, t in load(path, K).items() if s.startswith("weight")}
    torch.testing.assert_close(
        weight(open_checkpoint(path), K), by_definition(parts, 16), rtol=1e-6, atol=0
    )


def load(path, module):
    """Tensors of a module by suffix."""
    tensors = load_file(path / "model.safetensors")
    prefix = f"{module}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@pytest.mark.parametrize(
    ("inputs", "label"),
    [
        (None, "mxfp4 float inputs"),
        (MXFP4 | {"dynamic": True}, "mxfp4"),
        (TOKEN, "mxfp4 fp8 inputs"),
        (TOKEN | {"strategy": "group", "group_size": 128}, "mxfp4 fp8 inputs in groups"),
    ],
)
def test_mxfp4_of_others(tmp_path, source, inputs, label):
    path = mxfp4_checkpoint(tmp_path / "q", inputs)
    assert sound(path, source) == []
    assert {module.label for module in examine(path, source).modules} == {label}
    assert torch.equal(weight(open_checkpoint(path), K), by_definition(load(path, K), 32))


def blocks_of_zeros(t):
    """The smallest scale of all; codes there may be anything."""
    t[3, 1] = torch.tensor(2.0**-9).to(t.dtype)
    return t


def test_the_smallest_scale_of_a_block(tmp_path):
    path = nvfp4_checkpoint(tmp_path / "q")
    change(path, f"{K}.weight_scale", blocks_of_zeros)
    assert errors(examine(path)) == []


def put(value, place=(3, 1)):
    def to(t):
        t.view(torch.uint8)[place] = value
        return t

    return to


@pytest.mark.parametrize(
    ("name", "to", "said"),
    [
        ("weight_packed", lambda t: t >> 4 | t << 4, "sqnr: SQNR"),
        ("weight_packed", lambda t: t.view(torch.int8), "parameters: is I8; nvfp4 reads U8"),
        ("weight_packed", lambda t: t[:, :-8].clone(), "parameters: is [32, 4]; for a weight"),
        ("weight_packed", lambda t: t[:, :-1].clone(), "parameters: groups of 16 columns do"),
        ("weight_scale", lambda t: t.view(torch.uint8), "parameters: is U8; nvfp4 reads F8_E4M3"),
        ("weight_scale", lambda t: t.float(), "parameters: is F32; nvfp4 reads F8_E4M3"),
        ("weight_scale", lambda t: t[:, :2].clone(), "parameters: is [32, 2]; for a weight of 32 x 64"),
        ("weight_scale", put(0), "values: a scale is not a positive number: code 0x00"),
        ("weight_scale", put(0x7F), "values: a scale is not a positive number: code 0x7F"),
        ("weight_scale", put(0xB0), "values: a scale is not a positive number: code 0xB0"),
        ("weight_scale", lambda t: t.view(torch.uint8).flip(1).view(t.dtype), "sqnr: "),
        ("weight_global_scale", lambda t: t * 1.5, "siblings: differs from that of"),
        ("weight_global_scale", lambda t: t.repeat(2), "parameters: is [2]; for a weight of"),
        ("weight_global_scale", lambda t: t * float("nan"), "values: a divisor of weights is not"),
        ("weight_global_scale", lambda t: -t, "values: a divisor of weights is not"),
        ("weight_global_scale", lambda t: 1 / t, "values: a divisor of weights is not"),
        ("weight_global_scale", lambda t: t.long(), "parameters: is I64; nvfp4 reads F32"),
        ("input_global_scale", lambda t: t * 1.5, "siblings: differs from that of"),
        ("input_global_scale", lambda t: t * 0, "values: a scale is not a positive number: 0"),
        ("input_global_scale", lambda t: t.repeat(3), "parameters: is [3]; for a weight of"),
    ],
)  # fmt: skip
def test_damaged_nvfp4(tmp_path, source, name, to, said):
    path = nvfp4_checkpoint(tmp_path / "q", inputs=True)
    change(path, f"{K}.{name}", to)
    found = errors(examine(path, source))
    assert any(error.startswith(said) and K in error for error in found), found
    assert all(K in error for error in found), found


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_global_scale", "input_global_scale"])
def test_a_parameter_that_is_missing(tmp_path, suffix):
    path = nvfp4_checkpoint(tmp_path / "q", inputs=True)
    tensors = load_file(path / "model.safetensors")
    del tensors[f"{UP}.{suffix}"]
    save_file(tensors, path / "model.safetensors")
    (error,) = errors(examine(path))
    assert error.startswith(f"parameters: nvfp4 needs `{UP}.{suffix}`, which no file holds")


@pytest.mark.parametrize(
    ("suffix", "to", "said"),
    [
        ("weight_packed", lambda t: t >> 4 | t << 4, "sqnr: SQNR"),
        ("weight_scale", lambda t: t.view(torch.float8_e8m0fnu), "parameters: is F8_E8M0; mxfp4"),
        ("weight_scale", put(255), "values: an E8M0 scale is NaN: 255"),
        ("weight_scale", lambda t: t[:, :1].clone(), "parameters: is [32, 1]; for a weight of 32 x 64"),
        ("weight_scale", lambda t: t + 1, "edits: its rows were multiplied"),
        ("weight_packed", lambda t: t[:, :-4].clone(), "parameters: groups of 32 columns do"),
    ],
)  # fmt: skip
def test_damaged_mxfp4(tmp_path, source, suffix, to, said):
    path = mxfp4_checkpoint(tmp_path / "q", MXFP4 | {"dynamic": True})
    change(path, f"{K}.{suffix}", to)
    found = errors(examine(path, source))
    assert any(error.startswith(said) and K in error for error in found), found


def test_gate_and_up_of_an_expert_have_one_divisor(tmp_path):
    """Each expert has its own, and the engine takes that of gate for both."""
    model = make_tiny(tmp_path / "model", "qwen3_moe", hidden_size=64, head_dim=16)
    (tmp_path / "recipe.yaml").write_text(
        'target: compressed-tensors\nrules: [{match: "*_proj", scheme: nvfp4a16}]\n'
    )
    out = tmp_path / "out"
    done = run_cli("quantize", tmp_path / "recipe.yaml", "--model", model, "--out", out)
    assert done.code == 0, done.err
    (file,) = out.glob("*.safetensors")
    found = {n: t for n, t in load_file(file).items() if ".experts." in n and "global" in n}
    gates = {name: t for name, t in found.items() if "gate_proj" in name}
    assert len(gates) >= 4
    assert len({float(t) for t in gates.values()}) > len(gates) // 2
    assert all(torch.equal(t, found[n.replace("gate_proj", "up_proj")]) for n, t in gates.items())
    assert errors(examine(out)) == []
    name = next(iter(gates)).replace("gate_proj", "up_proj")
    tensors = load_file(file)
    tensors[name] = tensors[name] * 2
    save_file(tensors, file, metadata={"format": "pt"})
    siblings = [error for error in errors(examine(out)) if error.startswith("siblings")]
    assert len(siblings) == 1
    assert "the engine keeps one for both" in siblings[0]
    assert name.rsplit(".", 2)[0] in siblings[0]


def test_groups_that_devices_cannot_share(tmp_path):
    """Of 128 inputs 8 devices get 16 each, a group of NVFP4 and half one of MXFP4; of 64 they get 8."""
    made = {16: nvfp4_checkpoint(tmp_path / "nv"), 32: mxfp4_checkpoint(tmp_path / "mx")}
    few = {size: errors(examine(path, tp="4")) for size, path in made.items()}
    many = {size: errors(examine(path, tp="8")) for size, path in made.items()}
    of = {16: "nvfp4 float inputs", 32: "mxfp4 float inputs"}
    said = {size: f"tp: {of[size]} needs inputs in multiples of {size} on each device" for size in made}
    assert few[16] == []
    assert {e.split("|")[0] for e in few[32]} == {f"{said[32]}; there are 16 "}
    assert len(few[32]) == 4  # o_proj
    assert {e.split("|")[0] for e in many[16] if "heads" not in e} == {f"{said[16]}; there are 8 "}
    assert {e.split("|")[0] for e in many[32] if "heads" not in e} == {
        f"{said[32]}; there are {count} " for count in (8, 16)
    }
