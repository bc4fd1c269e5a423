"""Checkpoints of Model-Optimizer: no false alarm on what it exports, and damage is seen."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.targets.vllm_family import fused_siblings
from tests.verify.producers import CONFIG as MODEL
from tests.verify.producers import float_model, fp8, fp8_rows, mxfp8, others, weights, write
from tests.verify.test_fp4 import LARGEST, load, nvfp4
from tests.verify.test_producers import NO_MANIFEST, change, edit, errors, examine, weight

K = "model.layers.0.self_attn.k_proj"
UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"
FILE = "hf_quant_config.json"
HEAD = ["lm_head"]


def multiplied(weight, amax, *, inputs=True):
    """NVFP4 of a weight; amax: of all siblings."""
    made = nvfp4(weight, LARGEST * 6 / amax)
    parts = {"weight": made["weight_packed"], "weight_scale": made["weight_scale"]}
    parts["weight_scale_2"] = amax / (LARGEST * 6)
    return parts | ({"input_scale": torch.tensor(7.5 / (LARGEST * 6))} if inputs else {})


def tiles(weight):
    """FP8 in blocks of 128 x 128, whose scales have four dimensions."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -k % 128, 0, -n % 128))
    blocks = padded.view(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    codes = (blocks / scale).view_as(padded)[:n, :k].to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}


def encoded(algorithm, name, weight, amax):
    if algorithm == "FP8":
        return fp8(weight) | {"input_scale": torch.tensor(7.5 / 448)}
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        parts = fp8_rows(weight)
        return parts | {"weight_scale": parts["weight_scale"].view(-1)}
    if algorithm == "MXFP8":
        return mxfp8(weight)
    if algorithm.upper() == "FP8_PB_WO":
        return tiles(weight)
    return multiplied(weight, amax, inputs=algorithm == "NVFP4")


def described(algorithm, ignore, layers=None, **more):
    """Both descriptions, as convert_hf_config.py makes one of the other."""
    entry = {"quant_algo": algorithm} | ({"group_size": 16} if "NVFP4" in algorithm else {}) | more
    extra = {"quantized_layers": layers} if layers else {}
    producer = {"name": "modelopt", "version": "0.45.0"}
    number = {"dynamic": False, "num_bits": 8, "type": "float"}
    group = {"weights": number, "targets": ["Linear"]}
    if algorithm != "W4A16_NVFP4":
        group["input_activations"] = number
    block = {"config_groups": {"group_0": group}, "ignore": ignore, **entry, **extra,
             "producer": producer, "quant_method": "modelopt"}  # fmt: skip
    own = {"producer": producer, "quantization": {
        **entry, "kv_cache_quant_algo": None, "exclude_modules": ignore, **extra}}  # fmt: skip
    return block, own


def checkpoint(folder, algorithm, ignore=None, *, of=None, only="", **more):
    """All projections, or those with `only` in their names. of: a module's algorithm by its name."""
    of = of or (lambda name: algorithm)
    table, amax, layers = dict(others()), {}, {}
    for name, w in weights().items():
        group = fused_siblings(name) or name
        amax[group] = max(amax.get(group, torch.zeros(())), w.abs().max())
    for name, w in weights().items():
        if only not in name:
            table[f"{name}.weight"] = w.bfloat16()
            continue
        parts = encoded(of(name), name, w, amax[fused_siblings(name) or name])
        table |= {f"{name}.{suffix}": tensor for suffix, tensor in parts.items()}
        layers[name] = {"quant_algo": of(name)}
    mixed = algorithm == "MIXED_PRECISION"
    block, own = described(
        algorithm, HEAD if ignore is None else ignore, layers if mixed else None, **more
    )
    return write(folder, table, MODEL | {"quantization_config": block}, hf_quant_config=own)


@pytest.fixture
def source(tmp_path):
    return float_model(tmp_path / "float")


def notes(report):
    found = [f.what for f in report.findings if f.severity == "note" and f.what != NO_MANIFEST]
    return [what for what in found if "rounds codes again" not in what]


WHOLE = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8", "NVFP4", "W4A16_NVFP4")


@pytest.mark.parametrize("algorithm", WHOLE)
def test_sound(tmp_path, source, algorithm):
    path = checkpoint(tmp_path / "q", algorithm)
    report = examine(path, source)
    assert errors(report) == []
    assert notes(report) == []
    assert report.format == "modelopt"
    assert {module.label for module in report.modules} == {algorithm}
    assert len(report.modules) == len(weights())


def test_sound_in_blocks(tmp_path, source):
    """Small letters; parts of names and wildcards for what is float."""
    ignore = ["lm_head", "self_attn", "*.gate_up_proj"]
    path = checkpoint(tmp_path / "q", "fp8_pb_wo", ignore, only="down_proj")
    report = examine(path, source)
    assert errors(report) == []
    assert {module.label for module in report.modules} == {"FP8_PB_WO"}
    expected = weights()[DOWN]
    assert float((weight(open_checkpoint(path), DOWN) - expected).norm() / expected.norm()) < 0.04


def mixture(name):
    kinds = {"o_proj": "FP8", "down_proj": "NVFP4"}
    usual = "MXFP8" if ".mlp." in name else "FP8_PER_CHANNEL_PER_TOKEN"
    return kinds.get(name.rpartition(".")[2], usual)


def test_a_sound_mixture(tmp_path, source):
    path = checkpoint(tmp_path / "q", "MIXED_PRECISION", of=mixture)
    report = examine(path, source)
    assert errors(report) == []
    assert {module.label for module in report.modules} == {
        "FP8", "NVFP4", "MXFP8", "FP8_PER_CHANNEL_PER_TOKEN"
    }  # fmt: skip


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4"])
def test_one_description_is_enough(tmp_path, source, algorithm):
    path = checkpoint(tmp_path / "q", algorithm)
    edit(path, "config.json", quantization_config=None)
    assert errors(examine(path, source)) == []
    path = checkpoint(tmp_path / "p", algorithm)
    (path / FILE).unlink()
    assert errors(examine(path, source)) == []


def test_an_input_scale_of_older_exports_is_of_no_use(tmp_path, source):
    path = checkpoint(tmp_path / "q", "W4A16_NVFP4", of=lambda name: "NVFP4")
    report = examine(path, source)
    assert errors(report) == []
    assert {module.label for module in report.modules} == {"W4A16_NVFP4"}


def test_scales_of_the_cache_are_no_parameters_of_weights(tmp_path):
    path = checkpoint(tmp_path / "q", "FP8")
    layers = [f"model.layers.{n}.self_attn" for n in range(4)]
    cache = {f"{a}.{x}_proj.{x}_scale": torch.tensor(0.5) for a in layers for x in "kv"}
    save_file(load_file(path / "model.safetensors") | cache, path / "model.safetensors")
    assert errors(examine(path)) == []


@pytest.mark.parametrize("suffix", ["weight_zero_point", "weight_packed", "g_idx"])
def test_a_tensor_that_no_parameter_takes(tmp_path, suffix):
    path = checkpoint(tmp_path / "q", "MXFP8")
    stray = {f"{K}.{suffix}": torch.ones(1)}
    save_file(load_file(path / "model.safetensors") | stray, path / "model.safetensors")
    assert errors(examine(path)) == [
        f"parameters: MXFP8 has no {suffix}: the engine stops at it, or leaves it out | `{K}.{suffix}`"
    ]


@pytest.mark.parametrize(
    ("name", "to", "said"),
    [
        ("weight", lambda t: t >> 4 | t << 4, "sqnr: SQNR"),
        ("weight", lambda t: t.view(torch.int8), "parameters: is I8; NVFP4 reads U8"),
        ("weight", lambda t: t[:, :-4].clone(), "parameters: NVFP4 needs columns in multiples of 16"),
        ("weight_scale", lambda t: t.view(torch.uint8), "parameters: is U8; NVFP4 reads F8_E4M3"),
        ("weight_scale", lambda t: t[:, :2].clone(), "parameters: is [32, 2]; for a weight of 32 x 64"),
        ("weight_scale_2", lambda t: t * 1.5, "siblings: differs from that of"),
        ("weight_scale_2", lambda t: 1 / t, "values: a multiplier of weights is not"),
        ("weight_scale_2", lambda t: -t, "values: a multiplier of weights is not"),
        ("weight_scale_2", lambda t: t * float("nan"), "values: a multiplier of weights is not"),
        ("weight_scale_2", lambda t: t.repeat(2), "parameters: is [2]; for a weight of"),
        ("input_scale", lambda t: t * 1.5, "siblings: differs from that of"),
        ("input_scale", lambda t: t * 0, "values: a scale is not a positive number: 0"),
        ("weight", lambda t: torch.zeros(32, 64).bfloat16(), "parameters: is BF16; NVFP4 reads U8"),
    ],
)
def test_damaged_nvfp4(tmp_path, source, name, to, said):
    path = checkpoint(tmp_path / "q", "NVFP4")
    change(path, f"{K}.{name}", to)
    found = errors(examine(path, source))
    assert any(error.startswith(said) and K in error for error in found), found


@pytest.mark.parametrize(
    ("algorithm", "name", "to", "said"),
    [
        ("FP8", "weight_scale", lambda t: t * 0, "values: a scale is not a positive number"),
        ("FP8", "input_scale", lambda t: -t, "values: a scale is not a positive number"),
        ("FP8", "weight", lambda t: t.view(torch.uint8), "parameters: is U8; FP8 reads F8_E4M3"),
        (
            "FP8_PER_CHANNEL_PER_TOKEN",
            "weight_scale",
            lambda t: t.unsqueeze(1),
            "parameters: is [32, 1];",
        ),
        ("MXFP8", "weight_scale", lambda t: t.view(torch.float8_e8m0fnu), "parameters: is F8_E8M0;"),
        ("MXFP8", "weight_scale", lambda t: t | 255, "values: an E8M0 scale is NaN"),
    ],
)
def test_damaged(tmp_path, source, algorithm, name, to, said):
    path = checkpoint(tmp_path / "q", algorithm)
    change(path, f"{K}.{name}", to)
    found = errors(examine(path, source))
    assert any(error.startswith(said) and K in error for error in found), found


def test_blocks_of_two_dimensions_do_not_load(tmp_path):
    path = checkpoint(
        tmp_path / "q", "FP8_PB_WO", ["lm_head", "self_attn", "*up_proj"], only="down_proj"
    )
    change(path, f"{DOWN}.weight_scale", lambda t: t[:, 0, :, 0].clone())
    assert errors(examine(path)) == [
        f"parameters: is [1, 1]; for a weight of 64 x 128 FP8_PB_WO has [1, 1, 1, 1] | "
        f"`{DOWN}.weight_scale`"
    ]


@pytest.mark.parametrize(
    ("algorithm", "suffix"),
    [
        *(("NVFP4", suffix) for suffix in ("weight_scale", "weight_scale_2", "input_scale")),
        ("FP8", "input_scale"),
        ("MXFP8", "weight_scale"),
    ],
)
def test_a_parameter_that_is_missing(tmp_path, algorithm, suffix):
    path = checkpoint(tmp_path / "q", algorithm)
    tensors = load_file(path / "model.safetensors")
    del tensors[f"{UP}.{suffix}"]
    save_file(tensors, path / "model.safetensors")
    (error,) = errors(examine(path))
    assert error.startswith(f"parameters: {algorithm} needs `{UP}.{suffix}`, which no file holds")


def test_siblings_in_fp8_may_differ(tmp_path):
    """The engine rounds their codes to the larger scale: a note."""
    report = examine(checkpoint(tmp_path / "q", "FP8"))
    assert errors(report) == []
    assert any("rounds codes again to the larger scale" in f.what for f in report.findings)


def relist(path, entries):
    """The same list of float modules in both files."""
    for file, key, place in (("config.json", "ignore", "quantization_config"),
                             (FILE, "exclude_modules", "quantization")):  # fmt: skip
        table = json.loads((path / file).read_text())
        table[place][key] = entries
        (path / file).write_text(json.dumps(table))


LAYER = "model.layers.0"


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([], "loader: is BF16 and not among the float modules: the engine would build it in MXFP8"),
        (
            ["lm_head", "layers.0.self_attn.o"],
            "loader: is among the float modules, but has weight_scale",
        ),
        (["lm_head", f"{LAYER}.mlp.up"], "no error"),
        (["lm_head", f"{LAYER}.mlp.gate"], "loader: is among the float modules, but has weight_scale"),
        (
            ["lm_head", f"{LAYER}.mlp.down_pro?"],
            "loader: is among the float modules, but has weight_sc",
        ),
        (["lm_head", "model.layers.2*"], "loader: is among the float modules, but has weight_scale"),
        (["lm_head", f"{LAYER}.mlp.up_proj"], "loader: only some of it and its siblings are among the"),
        ([""], "loader: is among the float modules, but has weight_scale"),
    ],
)
def test_lists_of_float_modules(tmp_path, entries, said):
    path = checkpoint(tmp_path / "q", "MXFP8")
    relist(path, entries)
    found = errors(examine(path))
    if said == "no error":  # a part of no name that the engine has: it fuses gate and up
        assert found == []
    else:
        assert any(error.startswith(said) for error in found), found


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"quant_algo": "W4A8_AWQ"}, "`quant_algo` is 'W4A8_AWQ'; vLLM 0.32 has FP8, FP8_PER"),
        ({"quant_algo": 8}, "`quant_algo` is 8;"),
        ({"ignore": "lm_head"}, "`ignore` is 'lm_head', not a list of names"),
        ({"ignore": [8]}, "`ignore` is [8], not a list of names"),
        ({"group_size": 32}, "`group_size` is 32; NVFP4 has groups of 16"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {}}, "has no `quantized_layers`"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": 1}}, "has 1 for 'a', without a"),
    ],
)
def test_descriptions_that_cannot_be_read(tmp_path, table, said):
    path = checkpoint(tmp_path / "q", "NVFP4")
    (path / FILE).unlink()
    config = json.loads((path / "config.json").read_text())
    edit(path, "config.json", quantization_config=config["quantization_config"] | table)
    found = errors(examine(path))
    assert any(error.startswith("config: ") and said in error for error in found), found


def test_files_that_disagree(tmp_path):
    path = checkpoint(tmp_path / "q", "NVFP4")
    own = json.loads((path / FILE).read_text())
    own["quantization"]["exclude_modules"] = ["lm_head", f"{LAYER}.mlp*"]
    (path / FILE).write_text(json.dumps(own))
    found = errors(examine(path))
    assert found == [
        f"config: makes `{LAYER}.mlp.down_proj` float, and config.json NVFP4: TensorRT-LLM reads this "
        f"file, vLLM the other | {FILE}"
    ]


def test_a_file_alone_that_vllm_does_not_take(tmp_path):
    path = checkpoint(tmp_path / "q", "MXFP8")
    edit(path, "config.json", quantization_config=None)
    assert any("vLLM does not take MXFP8 from this file alone" in e for e in errors(examine(path)))
    own = json.loads((path / FILE).read_text())
    del own["quantization"]["kv_cache_quant_algo"]
    own["producer"] = {"name": "other"}
    (path / FILE).write_text(json.dumps(own))
    found = errors(examine(path))
    assert any("has no `kv_cache_quant_algo`, which vLLM needs" in e for e in found)
    assert any("`producer` is 'other'" in e for e in found)


def test_a_mixture_with_faults(tmp_path):
    path = checkpoint(tmp_path / "q", "MIXED_PRECISION", of=mixture)
    (path / FILE).unlink()
    config = json.loads((path / "config.json").read_text())
    block = config["quantization_config"]
    layers = dict(block["quantized_layers"])
    layers[UP] = {"quant_algo": "NVFP4"}  # gate_proj is MXFP8
    del layers[DOWN]
    layers["model.layers.2.self_attn.o_proj"] = {"quant_algo": "W4A8_AWQ"}
    edit(path, "config.json", quantization_config=block | {"quantized_layers": layers})
    found = errors(examine(path))
    assert any("its siblings have different algorithms, MXFP8, NVFP4" in e and UP in e for e in found)
    assert any("is in no entry of quantized_layers, but has" in e and DOWN in e for e in found)
    assert any("has the algorithm W4A8_AWQ, which the engine does not know" in e for e in found)


def test_parts_are_by_definition(tmp_path):
    """Code times scale times multiplier."""
    path = checkpoint(tmp_path / "q", "NVFP4")
    parts = load(path, K)
    found = weight(open_checkpoint(path), K)
    low = parts["weight"][0, 0] & 15
    step = float(parts["weight_scale"][0, 0]) * float(parts["weight_scale_2"])
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    expected = (-1) ** int(low >> 3) * values[int(low & 7)] * step
    assert float(found[0, 0]) == pytest.approx(expected, rel=1e-6)


def llama4(folder, **change):
    """A model with stacked experts as Model-Optimizer exports it: one scale for all of them."""
    block, own = described("FP8", ["lm_head"])
    experts = "language_model.model.layers.0.feed_forward.experts"
    table = {
        f"{experts}.{name}": torch.zeros(4, *shape).to(torch.float8_e4m3fn)
        for name, shape in (("gate_up_proj", (64, 256)), ("down_proj", (128, 64)))
    }
    table |= {f"{name}_{one}_scale": torch.tensor(0.5) for name in table for one in ("weight", "input")}
    config = MODEL | {"model_type": "llama4", "num_local_experts": 4, "num_hidden_layers": 1}
    return write(folder, table | change, config | {"quantization_config": block}, hf_quant_config=own)


def test_stacked_experts_of_llama_4_are_not_checked_and_not_refused(tmp_path):
    path = llama4(tmp_path / "q")
    report = examine(path)
    assert [e for e in errors(report) if e.startswith("experts")] == []
    assert "this version cannot check 4 scales of stacked experts" in notes(report)
    other = llama4(tmp_path / "p")
    tensors = load_file(other / "model.safetensors")
    tensors = {n: t for n, t in tensors.items() if not n.endswith("down_proj_weight_scale")}
    save_file(tensors, other / "model.safetensors")
    assert any("there is no `down_proj_scale`" in error for error in errors(examine(other)))
