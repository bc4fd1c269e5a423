"""What the gptq target writes and reads, against the format's definition and the rules of vLLM."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.spec import TensorSpec, safetensors_dtype
from quantcli.core.errors import InputError
from quantcli.core.numerics import Module, Numerics, Operand
from quantcli.core.registry import discover
from quantcli.schemes.base import Scheme
from quantcli.targets.base import PlannedCheckpoint
from quantcli.targets.gptq.config import quantization_config, read_config
from quantcli.targets.gptq.kinds import Kind, kind_of, layout_of
from quantcli.targets.gptq.target import Gptq
from tests import quantized
from tests.builders import write_safetensors
from tests.measured import maxima

TARGET = Gptq()
L = "model.layers.{}"
N, K = 200, 256
INT8_GROUPS = Numerics(Operand("int8", "group", block=(1, 64)), None)


def scheme(name, **options):
    return discover(Scheme)[name](**options)


SCHEMES = {
    "int4 g128 W4A16": scheme("w4a16"),
    "int4 g64 W4A16": scheme("w4a16", group_size=64),
    "int4 g32 W4A16": scheme("w4a16", group_size=32),
    "int4 channel W4A16": scheme("w4a16", group_size="channel"),
    "int8 channel W8A16": scheme("w8a16"),
}


# -- tensors ------------------------------------------------------------------------------------------


def parts_of(found, weight):
    parts = found.quantize(weight, torch.bfloat16, maxima(found, weight))
    return parts | {"weight_scale": parts["weight_scale"].bfloat16()}


@pytest.mark.parametrize("label", SCHEMES)
def test_tensors_as_the_format_defines_them(label):
    """Word by word, from codes and scales: packed along k, zero points along n, less 1."""
    found = SCHEMES[label]
    assert TARGET.label(found.numerics) == label
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = parts_of(found, weight)
    stored = TARGET.pack(found.numerics, parts, (N, K))
    bits = 8 if "int8" in label else 4
    each, groups = 32 // bits, parts["weight_scale"].shape[1]
    specs = {s: (safetensors_dtype(t.dtype), tuple(t.shape)) for s, t in stored.items()}
    assert specs == {
        "qweight": ("I32", (K // each, N)),
        "scales": ("BF16", (groups, N)),
        "qzeros": ("I32", (groups, N // each)),
        "g_idx": ("I32", (K,)),
    }
    codes = parts["weight"].numpy().astype(np.uint64) + 2 ** (bits - 1) & np.uint64(2**bits - 1)
    words = sum(codes[:, place::each] << np.uint64(bits * place) for place in range(each))
    assert np.array_equal(stored["qweight"].numpy().view(np.uint32), words.T)
    middle = {4: 0x77777777, 8: 0x7F7F7F7F}[bits]
    assert bool((stored["qzeros"] == middle).all())
    assert torch.equal(stored["scales"], parts["weight_scale"].T)
    assert stored["g_idx"].tolist() == [i * groups // K for i in range(K)]
    back = TARGET.unpack(found.numerics, stored)
    assert torch.equal(back["weight"], parts["weight"])
    assert torch.equal(back["weight_scale"], parts["weight_scale"].float())
    layout = TARGET.layout(found.numerics)
    assert torch.equal(layout.dequantize(stored), found.dequantize(parts))
    if bits == 4:
        assert bool((parts["weight_scale"] < 0).any())  # of both signs


CASES = [  # bits, group, options of tests.quantized.gptq
    (4, 32, {"symmetric": True}), (8, 32, {"symmetric": True}), (4, 96, {"symmetric": True}),
    (4, 32, {}), (8, 32, {}), (4, 32, {"v2": True}), (4, 32, {"act_order": True}),
    (8, 16, {"act_order": True, "v2": True}),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "group", "options"), CASES, ids=str)
def test_checkpoints_of_others_stand_for_their_weights(tmp_path, bits, group, options):
    """Asymmetric, with act-order, of the second version: read by columns, block by block."""
    from quantcli.targets import module_rows

    name = "model.layers.0.mlp.up_proj"
    tensors, weight = quantized.gptq(name, 64, 96, group, bits=bits, **options)
    block = {
        "quant_method": "gptq", "bits": bits, "group_size": group if group < 96 else -1,
        "desc_act": options.get("act_order", False), "sym": options.get("symmetric", False),
        "checkpoint_format": "gptq_v2" if options.get("v2") else "gptq",
    }  # fmt: skip
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": block, "torch_dtype": "float16"})
    )
    checkpoint = open_checkpoint(tmp_path)
    assert TARGET.recognises(checkpoint)
    stored = TARGET.open_stored(checkpoint)
    module = stored.modules[name]
    assert module.shape == (64, 96)
    assert ("act-order" in module.layout.label) == options.get("act_order", False)
    assert (module.numerics is None) == options.get("act_order", False)
    for step in (8, 24, 64):
        with module_rows.ModuleReader(module) as reader:
            rows = [reader.weight(start, step) for start in range(0, 64, step)]
        assert np.array_equal(torch.cat(rows).numpy(), weight), step
    notes = [finding.what for finding in stored.findings if finding.severity == "note"]
    refusals = (not options.get("symmetric", False)) + options.get("act_order", False)
    assert sum("vLLM 0.32 refuses" in what for what in notes) == refusals


def groups_of(size):
    return Numerics(Operand("int4", "group", block=(1, size)), None)


# -- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numerics", "words"),
    [
        (groups_of(256), "groups of 32, 64, 128 columns, or whole rows"),
        (groups_of(16), "not groups of 16"),
        (scheme("w8a8_dynamic").numerics, "how inputs are quantized"),
        (scheme("fp8_dynamic").numerics, "stores int4 and int8 weights, not fp8_e4m3"),
        (Numerics(Operand("int4", "group", symmetric=False, block=(1, 32)), None), "symmetric weights"),
        (Numerics(Operand("int8", "tensor"), None), "cannot store"),
    ],
)
def test_numerics_that_are_not_stored(numerics, words):
    with pytest.raises(InputError, match=re.escape(words)):
        TARGET.label(numerics)


INT4, INT8 = SCHEMES["int4 g32 W4A16"].numerics, SCHEMES["int8 channel W8A16"].numerics


def refusals(name, n, k, numerics=INT4):
    return [r.what for r in TARGET.check([Module(name, (n, k), numerics)])]


@pytest.mark.parametrize(
    ("name", "n", "k", "numerics", "words"),
    [
        ("model.layers.0.mlp.up_proj", 12, 64, INT4, "packs 8 rows together; there are 12"),
        ("model.layers.0.mlp.up_proj", 12, 64, INT8, None),
        ("model.layers.0.mlp.up_proj", 16, 66, INT8, "packs 4 columns together; there are 66"),
        ("model.layers.0.mlp.up_proj", 16, 72, INT4, "groups of 32 columns do not divide 72"),
        ("model.embed_tokens", 64, 64, INT4, "no quantized embedding"),
        ("model.layers.0.mlp.gate", 64, 64, INT4, "routers as float"),
        ("lm_head", 72, 64, INT4, "pads a head to a multiple of 64 rows"),
        ("lm_head", 128, 64, INT4, None),
    ],
)
def test_modules_that_are_not_stored(name, n, k, numerics, words):
    found = refusals(name, n, k, numerics)
    assert (found == []) if words is None else (words in found[0]), found


# -- config -------------------------------------------------------------------------------------------


def planned(modules):
    """A planned checkpoint of these modules: name -> numerics."""
    made = [Module(name, (64, 64), numerics) for name, numerics in modules.items()]
    tensors = {f"{m.name}.weight": TensorSpec(f"{m.name}.weight", "BF16", m.shape) for m in made}
    return PlannedCheckpoint(made, tensors, {}, Settings({}), "BF16")


def block_of(modules):
    output = planned(modules)
    used = {m.numerics for m in output.modules if m.numerics}
    return quantization_config(output, {numerics: kind_of(numerics) for numerics in used})


def in_vllm(block, name):
    """bits and group_size of a name as vLLM's gptq_utils.py finds them; None if it stays float."""
    for pattern, changes in block.get("dynamic", {}).items():
        if pattern.startswith("-:"):
            if re.match(pattern[2:], name):
                return None
        elif re.match(pattern.removeprefix("+:"), name):
            return changes.get("bits", block["bits"]), changes.get("group_size", block["group_size"])
    return block["bits"], block["group_size"]


MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def model(layers=4, change=lambda layer, name: INT4, head="lm_head"):
    names = [(n, f"model.layers.{n}.self_attn.{p}") for n in range(layers) for p in ATTENTION]
    names += [(n, f"model.layers.{n}.mlp.{p}") for n in range(layers) for p in MLP]
    return {"model.embed_tokens": None, head: None} | {name: change(n, name) for n, name in names}


def test_one_kind_needs_no_rules():
    block = block_of(model())
    assert block == {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 32,
                     "desc_act": False, "sym": True, "lm_head": False}  # fmt: skip


def mixed(layer, name):
    if layer == 1 and "self_attn" in name:
        return None
    return INT8 if name.endswith("down_proj") else INT4


@pytest.mark.parametrize("change", [mixed, lambda layer, name: (INT4, None, INT8, INT4)[layer]])
def test_rules_find_what_is_not_alike(change):
    """By own names, as gptqmodel looks them up, and by fused ones, as vLLM does."""
    modules = model(12 if change is mixed else 4, change)
    block = block_of(modules)
    numbers = {INT4: (4, 32), INT8: (8, -1), None: None}
    for name, numerics in modules.items():
        if name.startswith("model.layers."):
            prefixes = [name] + [p + name.removeprefix("model.") for p in ("language_model.model.", "")]
            for spelled in prefixes:
                assert in_vllm(block, spelled) == numbers[numerics], spelled
    for layer in range(12 if change is mixed else 4):
        fused = {"self_attn.qkv_proj": "self_attn.q_proj", "mlp.gate_up_proj": "mlp.up_proj"}
        for engine, own in fused.items():
            numerics = modules[f"model.layers.{layer}.{own}"]
            assert in_vllm(block, f"model.layers.{layer}.{engine}") == numbers[numerics], engine


@pytest.mark.parametrize("experts", [None, INT4, INT8])
def test_experts_are_looked_up_by_their_layer(experts):
    modules = {"model.embed_tokens": None, "lm_head": None}
    for layer in range(3):
        modules[f"model.layers.{layer}.mlp.gate"] = None
        modules |= {f"model.layers.{layer}.self_attn.{p}": INT4 for p in ATTENTION}
        for expert in range(2):
            names = (f"model.layers.{layer}.mlp.experts.{expert}.{p}" for p in MLP)
            modules |= dict.fromkeys(names, experts)
    modules["lm_head"] = INT4
    block = block_of(modules)
    wanted = {None: None, INT4: (4, 32), INT8: (8, -1)}[experts]
    assert in_vllm(block, "model.layers.2.mlp.experts") == wanted
    assert in_vllm(block, "model.layers.2.mlp.experts.1.up_proj") == wanted
    assert in_vllm(block, "model.layers.2.self_attn.qkv_proj") == (4, 32)
    assert in_vllm(block, "model.layers.2.mlp.gate") is None
    assert block["lm_head"] is True


def test_what_is_written_is_read_as_it_was_meant():
    modules = model(12, mixed)
    config = read_config(Settings(block_of(modules)))
    assert config.findings == []
    for name, numerics in modules.items():
        if "layers" in name:
            kind = kind_of(numerics) if numerics else None
            assert config.kind_for_engine(name) == kind, name


BLOCK = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": "4"}, "`bits` is '4'"),
        ({"bits": True}, "`bits` is True"),
        ({"group_size": 0}, "`group_size` is 0"),
        ({"group_size": 1.5}, "`group_size` is 1.5"),
        ({"sym": 1}, "`sym` is 1"),
        ({"sym": None}, "`sym` is None"),
        ({"desc_act": "no"}, "`desc_act` is 'no'"),
        ({"dynamic": []}, "`dynamic` is []"),
        ({"dynamic": {"(": {}}}, "not a regular expression"),
        ({"dynamic": {"-:" + "x" * 5000: {}}}, "too long"),
        ({"dynamic": {"-:(a{999}){999}": {}}}, "too costly"),
        ({"dynamic": {"-:[[a]": {}}}, "not a regular expression: Possible nested set"),
        ({"dynamic": {"+:x": 8}}, "8 for '+:x', not an object"),
        ({"dynamic": {"+:x": {"bits": 3}}}, "3 bits, which vLLM does not have"),
        ({"dynamic": {"+:x": {"bits": []}}}, "`bits` is []"),
        ({"dynamic": {"x": {"group_size": "a"}}}, "`group_size` is 'a'"),
        ({"modules_in_block_to_quantize": [["a"], [1]]}, "not a list of names"),
        ({"modules_in_block_to_quantize": {}}, "not a list of names"),
    ],
    ids=str,
)
def test_a_config_of_nonsense_is_a_finding(change, words):
    config = read_config(Settings(BLOCK | change))
    errors = [finding.what for finding in config.findings if finding.severity == "error"]
    assert any(words in what for what in errors), errors
    assert config.usual is None


@pytest.mark.parametrize("key", ["bits", "group_size", "desc_act", "sym"])
def test_keys_that_vllm_needs(key):
    config = read_config(Settings({k: v for k, v in BLOCK.items() if k != key}))
    assert [f.what for f in config.findings if f"no `{key}`" in f.what]


@pytest.mark.parametrize(
    ("change", "form"),
    [({"bits": 3}, "GPTQ of 3 bits"), ({"checkpoint_format": "marlin"}, "layout `marlin`"),
     ({"is_marlin_format": True}, "layout `marlin`")],
)  # fmt: skip
def test_layouts_that_are_not_read(change, form):
    config = read_config(Settings(BLOCK | change))
    assert form in config.unchecked
    assert config.usual is None
    assert config.findings == []


def test_a_layout_that_is_not_text_is_not_read():
    assert (
        read_config(Settings(BLOCK | {"checkpoint_format": ["gptq"]})).unchecked
        == "GPTQ in the layout `['gptq']`"
    )


def test_an_empty_weight_is_a_finding_or_nothing(tmp_path):
    """No division by the groups that it does not have."""
    empty = {f"{Q}.{s}": ("I32", shape, b"") for s, shape in (("qweight", (0, 8)), ("g_idx", (0,)))}
    empty |= {f"{Q}.scales": ("F16", (0, 8), b""), f"{Q}.qzeros": ("I32", (0, 1), b"")}
    write_safetensors(tmp_path / "model.safetensors", empty)
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": BLOCK, "torch_dtype": "bfloat16"})
    )
    stored = TARGET.open_stored(open_checkpoint(tmp_path))
    assert [list(stored.check_arithmetic(module)) for module in stored.modules.values()] in ([], [[]])


def test_the_first_rule_counts():
    rules = {"-:.*\\.a$": {}, "+:.*\\.[ab]$": {"bits": 8}, ".*\\.c$": {"group_size": -1, "sym": False}}
    config = read_config(Settings(BLOCK | {"dynamic": rules}))
    assert config.kind_of(["x.a"]) is None
    assert config.kind_of(["x.b"]) == Kind(8, 32)
    assert config.kind_of(["x.c"]) == Kind(4, -1, symmetric=False)
    assert config.kind_of(["x.d"]) == Kind(4, 32)
    assert config.kind_of(["y", "x.b"]) == Kind(8, 32)


# -- a checkpoint on disk -----------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """Writes one of two linears with changes; returns the findings."""

    def make(change=lambda tensors: None, tp=1, **block):
        tensors = {}
        for name in ("q_proj", "o_proj"):
            module = f"model.layers.0.self_attn.{name}"
            made, _ = quantized.gptq(module, 64, 64, 32, symmetric=True)
            tensors |= made
        path = write_safetensors(tmp_path / "model.safetensors", tensors)
        loaded = load_file(path)
        change(loaded)
        save_file({k: v.contiguous() for k, v in loaded.items()}, path)
        config = {"quantization_config": BLOCK | block, "torch_dtype": "float16"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        stored = TARGET.open_stored(open_checkpoint(tmp_path))
        findings = list(stored.findings) + list(stored.check_tp(tp))
        for module in stored.modules.values():
            findings += stored.check_arithmetic(module)
        return [f"{f.what} {f.where}" for f in findings if f.severity == "error"], stored

    return make


Q = "model.layers.0.self_attn.q_proj"


def edit(name, value):
    def change(tensors):
        tensors[name].view(-1)[5] = value

    return change


@pytest.mark.parametrize(
    ("change", "block", "words"),
    [
        (edit(f"{Q}.qzeros", 0x77777778), {}, f"this one is 0x77777778 `{Q}.qzeros`[0, 5]"),
        (edit(f"{Q}.g_idx", 1), {}, "desc_act is not true: vLLM drops it"),
        (edit(f"{Q}.g_idx", 2), {"desc_act": True}, "groups from 0 to 2 of 2"),
        (lambda t: t.pop(f"{Q}.scales"), {}, f"needs `{Q}.scales`"),
        (lambda t: t.pop(f"{Q}.qweight"), {}, f"`{Q}.qweight` is missing"),
        (lambda t: None, {"group_size": 64}, "is [2, 64]; for a weight of 64 x 64"),
        (lambda t: None, {"bits": 8}, "for a weight of 64 x 32"),
        (lambda t: None, {"group_size": 48}, "groups of 48 columns do not divide 64"),
        (lambda t: None, {"dynamic": {"-:.*q_proj": {}}}, "makes it float by its own name"),
        (lambda t: None, {"dynamic": {"-:.*qkv_proj": {}}}, "`dynamic` in quantization_config"),
        (lambda t: None, {"dynamic": {"-:.*o_proj": {}}}, "find no place for its codes"),
        (lambda t: None, {"modules_in_block_to_quantize": [["self_attn.q_proj"]]}, "does not name it"),
        (lambda t: t.update({f"{Q}.weight": torch.ones(64, 64).half()}), {}, f"`{Q}.weight`"),
        (
            lambda t: t.update({"layers.1.mlp.experts.0.up_proj.weight": torch.ones(8, 8).half()}),
            {},
            "quantization_config has it quantized",
        ),
        (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].half()}), {}, "reads I32"),
    ],
)  # fmt: skip
def test_damage_is_found(checkpoint, change, block, words):
    errors, _ = checkpoint(change, **block)
    assert any(words in error for error in errors), errors


def test_a_sound_one_has_no_errors(checkpoint):
    for block in ({}, {"checkpoint_format": "gptq"}, {"modules_in_block_to_quantize": [["self_attn"]]}):
        errors, stored = checkpoint(**block)
        assert errors == []
        assert {m.layout.label for m in stored.modules.values()} == {"int4 g32 W4A16"}


def test_zero_points_of_the_other_version(checkpoint):
    errors, _ = checkpoint(checkpoint_format="gptq_v2")
    assert sum("each word is 0x88888888; this one is 0x77777777" in error for error in errors) == 2


@pytest.mark.parametrize(("size", "words"), [(2, None), (4, "inputs in multiples of 32"),
                                             (16, "outputs in multiples of 8")])  # fmt: skip
def test_tensor_parallel(checkpoint, size, words):
    errors, _ = checkpoint(tp=size)
    assert (errors == []) if words is None else any(words in error for error in errors), errors


def test_a_file_of_its_own_is_read_as_well(tmp_path):
    tensors, _ = quantized.gptq(Q, 64, 64, 32, symmetric=True)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text("{}")
    assert not TARGET.recognises(open_checkpoint(tmp_path))
    (tmp_path / "quantize_config.json").write_text(json.dumps(BLOCK))
    assert list(TARGET.open_stored(open_checkpoint(tmp_path)).modules) == [Q]
    (tmp_path / "quantize_config.json").write_text("{")
    assert not TARGET.recognises(open_checkpoint(tmp_path))
    (tmp_path / "quantize_config.json").write_text(json.dumps(BLOCK | {"quant_method": "awq"}))
    assert not TARGET.recognises(open_checkpoint(tmp_path))


def test_int8_in_groups():
    assert TARGET.label(INT8_GROUPS) == "int8 g64 W8A16"
    assert layout_of(kind_of(INT8_GROUPS)).row_multiple == 4


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (BLOCK, []),
        (BLOCK | {"bits": 8, "sym": False}, ["`bits` is 8, and 4 in config.json", "`sym` is False"]),
        (
            BLOCK | {"dynamic": {"-:x": {}}, "damp_percent": 0.1},
            [],
        ),  # config.json does not have the key
        ([1], ["cannot read it"]),
        ("{", ["cannot read it"]),
    ],
    ids=str,
)
def test_a_file_of_its_own_that_says_otherwise(tmp_path, own, words):
    tensors, _ = quantized.gptq(Q, 64, 64, 32, symmetric=True)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": BLOCK, "torch_dtype": "bfloat16"})
    )
    text = own if isinstance(own, str) else json.dumps(own)
    (tmp_path / "quantize_config.json").write_text(text)
    stored = TARGET.open_stored(open_checkpoint(tmp_path))
    notes = [f.what for f in stored.findings if f.where == "quantize_config.json"]
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True)), notes
    assert not [f for f in stored.findings if f.severity == "error"]
