"""`group_size: auto`: modules take the largest groups that divide what they are merged with."""

import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.core.errors import InputError
from quantcli.planning.plan import quantized_items
from quantcli.planning.planner import make_plan
from quantcli.recipe.recipe import load_recipe
from tests.builders import make_model, tensor
from tests.e2e.conftest import run_cli

SIZES = (128, 64, 32)
AUTO = "{name: w4a16, group_size: auto}"


def recipe(tmp_path, scheme=AUTO, *, target="compressed-tensors", more=""):
    path = tmp_path / "r.yaml"
    path.write_text(f'target: {target}\nrules:\n  - {{match: "*_proj", scheme: {scheme}}}\n{more}')
    return path


def model(tmp_path, shapes):
    """shapes: of weights, by module of the one layer."""
    names = {f"model.layers.0.{name}.weight": tensor("BF16", *s) for name, s in shapes.items()}
    tensors = {"model.embed_tokens.weight": tensor("BF16", 64, 64), **names}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    return make_model(tmp_path / "m", {"model.safetensors": tensors}, config=config)


def llama(hidden, inner):
    """A layer with these widths; its attention is half as wide."""
    attention = {f"self_attn.{name}_proj": (hidden // 2, hidden) for name in "qkv"}
    mlp = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    return {
        **attention,
        "self_attn.o_proj": (hidden, hidden // 2),
        **mlp,
        "mlp.down_proj": (hidden, inner),
    }


def experts(hidden, inner, count=3):
    shapes = {}
    for expert in range(count):
        for name in ("gate", "up"):
            shapes[f"mlp.experts.{expert}.{name}_proj"] = (inner, hidden)
        shapes[f"mlp.experts.{expert}.down_proj"] = (hidden, inner)
    return shapes


def planned(tmp_path, shapes, **options):
    plan = make_plan(load_recipe(recipe(tmp_path, **options)), open_checkpoint(model(tmp_path, shapes)))
    sizes = {
        i.module.removeprefix("model.layers.0."): i.scheme.group_size for i in quantized_items(plan)
    }
    return plan, sizes


def test_the_largest_groups_that_divide_a_width(tmp_path):
    # SmolLM2-135M has 576 columns, which 128 does not divide, and 1536
    plan, sizes = planned(tmp_path, llama(576, 1536))
    assert sizes == {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 64),
        "self_attn.o_proj": 32,
        "mlp.gate_proj": 64,
        "mlp.up_proj": 64,
        "mlp.down_proj": 128,
    }
    lines = {line.label: line.modules for line in plan.rules}
    assert lines == {"int4 g128 W4A16": 1, "int4 g64 W4A16": 5, "int4 g32 W4A16": 1}
    assert plan.quantized_modules == 7
    assert [note for note in plan.notes if "group_size" in note] == [
        "model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj, model.layers.0.self_attn.k_proj, "
        "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.v_proj (5 modules): group_size 64, "
        "as groups of 128 columns do not divide 576",
        "model.layers.0.self_attn.o_proj (1 module): group_size 32, as groups of 64 columns do not "
        "divide 288",
    ]


def test_a_config_group_for_each_size(tmp_path):
    plan, sizes = planned(tmp_path, llama(576, 1536))
    block = json.loads(plan.sidecars["config.json"])["quantization_config"]
    groups = {g["weights"]["group_size"]: g["targets"] for g in block["config_groups"].values()}
    assert groups.keys() == {128, 64, 32}
    found = {
        module: [size for size, targets in groups.items() if any(names(t, module) for t in targets)]
        for module in sizes
    }
    assert found == {module: [size] for module, size in sizes.items()}


def names(target, module):
    """Whether an entry of a config group names a module, as compressed-tensors reads it."""
    name = f"model.layers.0.{module}"
    return bool(re.match(target[3:], name)) if target.startswith("re:") else target in (name, "Linear")


def test_experts_of_a_layer_have_one_size(tmp_path):
    _, sizes = planned(tmp_path, {**llama(256, 512), **experts(256, 96)})
    assert sizes.pop("self_attn.o_proj") == 128
    assert {sizes.pop(name) for name in list(sizes) if ".experts." in name} == {32}
    assert set(sizes.values()) == {128}


def test_siblings_of_a_recipe_have_one_size(tmp_path):
    joined = "siblings: ['(model\\.layers\\.\\d+)\\.(?:self_attn\\.o|mlp\\.down)_proj']\n"
    _, sizes = planned(tmp_path, llama(576, 1536), more=joined)
    assert sizes["self_attn.o_proj"] == sizes["mlp.down_proj"] == 32
    assert sizes["mlp.gate_proj"] == 64


def test_gptq_names_the_modules_of_other_sizes(tmp_path):
    plan, _ = planned(tmp_path, llama(576, 1536), target="gptq")
    block = json.loads(plan.sidecars["config.json"])["quantization_config"]
    assert block["group_size"] == 64
    assert {rule["group_size"] for rule in block["dynamic"].values()} == {32, 128}


def test_a_width_that_no_size_divides_is_refused(tmp_path):
    with pytest.raises(InputError) as caught:
        planned(tmp_path, llama(576, 1544))
    assert caught.value.what.startswith("groups of 32 columns do not divide 1544")


def test_numerics_that_a_target_has_no_label_for(tmp_path):
    with pytest.raises(InputError) as caught:
        planned(tmp_path, llama(64, 128), scheme="{name: w4a8, group_size: auto}", target="gptq")
    assert "how inputs are quantized" in caught.value.what


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 24))
def test_the_size_is_the_largest_that_divides_all(tmp_path_factory, hidden, inner, expert):
    folder = tmp_path_factory.mktemp("choices")
    shapes = {**llama(64 * hidden, 32 * inner), **experts(64 * hidden, 32 * expert, 2)}
    _, sizes = planned(folder, shapes)
    for merged in (
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
        [name for name in shapes if ".experts." in name],
    ):
        common = math.gcd(*(shapes[name][1] for name in merged))
        assert {sizes[name] for name in merged} == {next(s for s in SIZES if common % s == 0)}


@pytest.mark.parametrize("target", ["compressed-tensors", "gptq"])
def test_the_bytes_are_those_of_sizes_by_hand(tmp_path, target):
    source = model(tmp_path, llama(64, 96))
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.randn(value.shape, generator=generator).to(torch.bfloat16)
        for name, value in load_file(source / "model.safetensors").items()
    }
    save_file(drawn, source / "model.safetensors", metadata={"format": "pt"})
    auto = recipe(tmp_path, target=target)
    one = run_cli("quantize", auto, "--model", source, "--out", tmp_path / "auto")
    assert one.code == 0, one.err
    by_hand = tmp_path / "hand.yaml"
    by_hand.write_text(
        f"target: {target}\nrules:\n"
        '  - {match: ["*.o_proj", "*.down_proj"], scheme: {name: w4a16, group_size: 32}}\n'
        '  - {match: "*_proj", scheme: {name: w4a16, group_size: 64}}\n'
    )
    two = run_cli("quantize", by_hand, "--model", source, "--out", tmp_path / "hand")
    assert two.code == 0, two.err
    weights = [
        (tmp_path / name / "model-00001-of-00001.safetensors").read_bytes() for name in ("auto", "hand")
    ]
    assert weights[0] == weights[1]
    checked = run_cli("verify", tmp_path / "auto", "--full", "--against", source)
    assert checked.code == 0, checked.out + checked.err
    assert "recomputed" in checked.out
