"""Which modules share what an engine keeps once."""

from dataclasses import replace

import pytest

from quantcli.core.errors import InputError
from quantcli.core.registry import discover
from quantcli.planning.siblings import siblings_of
from quantcli.recipe.recipe import load_recipe
from quantcli.schemes.base import Scheme

EXPERTS = [f"layers.{n}.mlp.experts.{e}.{w}_proj" for n in (0, 1) for e in (0, 1, 2)
           for w in ("gate", "up", "down")]  # fmt: skip
ATTENTION = [f"layers.0.self_attn.{name}_proj" for name in "qkvo"]


def siblings(tmp_path, patterns, rules='- {match: "*_proj", scheme: fp8_tensor}', target="fp8"):
    text = f"target: {target}\nrules:\n  {rules}\n"
    if patterns:
        text += "siblings:\n" + "".join(f"  - '{pattern}'\n" for pattern in patterns)
    (tmp_path / "r.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "r.yaml")
    assigned = {name: recipe.rule_of(name) for name in [*ATTENTION, *EXPERTS, "lm_head"]}
    return siblings_of(recipe, assigned), assigned


def groups(found):
    table = {}
    for name in [*ATTENTION, *EXPERTS, "lm_head"]:
        if (group := found.group(name)) is not None:
            table.setdefault(group, set()).add(name)
    return sorted(table.values(), key=lambda names: (-len(names), sorted(names)))


def test_without_patterns_they_are_the_engine_s(tmp_path):
    found, assigned = siblings(tmp_path, [])
    assert groups(found)[0] == set(ATTENTION[:3])
    assert found.group("layers.0.mlp.experts.1.up_proj") == found.group(
        "layers.0.mlp.experts.1.gate_proj"
    )
    assert found.group("layers.0.mlp.experts.1.up_proj") != found.group(
        "layers.0.mlp.experts.2.up_proj"
    )
    assert found.group(ATTENTION[3]) is None
    assert found.group("lm_head") is None  # no rule quantizes it
    assert not found.given_to(ATTENTION[0])
    assert not found.have_effect(assigned)


def test_patterns_join_groups_of_the_engine(tmp_path):
    # each expert's gate is fused with its up: a pattern over gates alone makes one group of all
    found, assigned = siblings(tmp_path, [r"(layers\.\d+)\.mlp\.experts\.\d+\.gate_proj"])
    per_layer = [
        {n for n in EXPERTS if n.startswith(f"layers.{i}.") and "down" not in n} for i in (0, 1)
    ]
    assert groups(found)[:2] == per_layer
    assert found.given_to(EXPERTS[1])
    assert not found.given_to(EXPERTS[2])  # down
    assert found.have_effect(assigned)


def test_patterns_join_each_other(tmp_path):
    a = r"(layers\.0)\.mlp\.experts\.[01]\.down_proj"
    b = r"(layers\.0)\.mlp\.experts\.[12]\.down_proj"
    downs = {n for n in EXPERTS if n.startswith("layers.0.") and "down" in n}
    for patterns in ([a, b], [b, a], [a, b, a]):
        found, _ = siblings(tmp_path, patterns)
        assert downs in groups(found)
        assert [name for name in EXPERTS if found.given_to(name)] == sorted(downs)


def test_crossed_patterns_end(tmp_path):
    # each pattern ties the two groups of the other one the other way round
    patterns = [
        r"(layers)\.0\.mlp\.experts\.0\.gate_proj|(layers)\.0\.mlp\.experts\.1\.gate_proj",
        r"layers\.0\.mlp\.experts\.(?:0|1)\.(up)_proj",
        r"layers\.0\.mlp\.experts\.(?:1|0)\.(?:gate|up)(_proj)",
    ]
    found, _ = siblings(tmp_path, patterns[1:])
    assert (
        len({found.group(f"layers.0.mlp.experts.{e}.{w}_proj") for e in (0, 1) for w in ("gate", "up")})
        == 1
    )
    with pytest.raises(InputError, match="makes no group of two modules"):
        siblings(tmp_path, patterns[:1])  # different capture groups took part


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        (r"layers\.0\.(.*)_proj", "makes no group of two modules"),
        (r"(lm)_head", "matches no quantized module"),
        (r"(gate)_proj", "matches no quantized module"),  # names are matched whole
        (r".*gate_proj", "captures nothing"),
        (r"(.*)\.gate_proj|.*", "and captures nothing of it"),
        (r"(.*", "is not a regular expression"),
        (r"(re:.*)gate_proj", "matches no quantized module"),
    ],
)
def test_patterns_that_group_nothing(tmp_path, pattern, what):
    with pytest.raises(InputError, match=what) as caught:
        siblings(tmp_path, [pattern])
    assert caught.value.where.endswith("r.yaml:5")
    assert caught.value.fix


def test_siblings_have_one_scheme(tmp_path):
    rules = """- {match: "*experts.0.*", scheme: fp8_static}
  - {match: "*_proj", scheme: fp8_tensor}"""
    with pytest.raises(InputError, match="siblings must have one scheme") as caught:
        siblings(tmp_path, [r"(layers\.0)\.mlp\.experts\.\d+\.down_proj"], rules)
    assert "experts.0.down_proj" in caught.value.what
    assert "experts.1.down_proj" in caught.value.where


def test_schemes_that_share_nothing(tmp_path):
    rules = '- {match: "*_proj", scheme: w8a8_dynamic}'
    pattern = r"(layers\.0)\.mlp\.experts\.\d+\.down_proj"
    found, assigned = siblings(tmp_path, [pattern], rules, "compressed-tensors")
    assert found.given_to("layers.0.mlp.experts.1.down_proj")
    assert not found.have_effect(assigned)


@pytest.mark.parametrize("option", ["clip: inputs", "weight_rounding: gptq, clip: inputs"])
def test_a_sibling_that_no_token_reached_stays_one(tmp_path, option):
    """Its scheme does without inputs, which only weigh the errors of weights."""
    rule = f'- {{match: "*_proj", scheme: {{name: w8a16, {option}}}}}'
    pattern = r"(layers\.0)\.mlp\.experts\.[01]\.down_proj"
    found, assigned = siblings(tmp_path, [pattern], rule, "compressed-tensors")
    unreached = "layers.0.mlp.experts.1.down_proj"
    recipe = load_recipe(tmp_path / "r.yaml")
    rule = assigned[unreached]
    assigned[unreached] = replace(rule, scheme=rule.scheme.without_inputs)
    assert assigned[unreached].scheme != rule.scheme
    assert groups(siblings_of(recipe, assigned)) == groups(found)
    assigned[unreached] = replace(rule, scheme=discover(Scheme)["w8a8_dynamic"]())
    with pytest.raises(InputError, match="siblings must have one scheme"):
        siblings_of(recipe, assigned)
