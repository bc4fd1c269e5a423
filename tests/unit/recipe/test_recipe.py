"""Recipes: every key and name checked, every place told, what was applied written down again."""

import json
import math
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from quantcli.calibration.methods.kv_cache import KvCache
from quantcli.calibration.methods.smoothing import Smoothing, SmoothRule
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.core.errors import InputError
from quantcli.core.registry import discover
from quantcli.planning.planner import Expected, compare_expected, make_plan
from quantcli.recipe.fields import (
    Calibration,
    Expect,
    LearnRotation,
    RecipeFile,
    Rotate,
    RuleFile,
    Verify,
    parse_size,
)
from quantcli.recipe.json_schema import recipe_schema
from quantcli.recipe.recipe import compare, load_recipe
from quantcli.targets.base import Target
from tests.builders import make_model, tensor

SHIPPED = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))
FULL = """\
target: ascend
model: here
output: there
max_shard: 5GB
rules:
  - match: "*.q_proj"
    scheme: keep
    optional: true
  - match: ["*_proj", "re:x.*"]
    scheme: {name: w8a16}
    role: [mlp, attention.out]
expect:
  quantizable_pct: ">= 95"
  quantized_params_pct: ">= 1"
  quantized_modules: ">= 1"
  bits_per_param: "<= 16"
  output_gib: "< 1"
calibration:
  data: file
  samples: 3
  length: 4
  seed: 5
  pack: true
  inputs: quantized
  dtype: float32
  uncalibrated: group
  all_tokens: true
  sha256: 00000000000000000000000000000000000000000000000000000000000000ff
rotate:
  residual: true
  heads: true
  untie: true
  seed: 1
  learn:
    epochs: 3
    rate: 0.02
smooth:
  alpha: 0.6
  within: 1.5
  rules:
  - match: "*.o_proj"
    skip: true
  - match: "*_proj"
    alpha: 0.7
kv_cache:
  format: c8
  observer: percentile
  percentile: 99.9
verify:
  min_sqnr: 20
  max_ppl_ratio: 1.01
  max_kl: 0.05
siblings: ['(.*)_proj']
version: 1
card: true
base_model: org/name
"""
KEYS = [line.strip(" -").partition(":")[0] for line in FULL.splitlines()]
SCHEMA = json.loads(recipe_schema())
CHECK = jsonschema.Draft202012Validator(SCHEMA)


@pytest.fixture
def load(tmp_path):
    def read(text, *sets):
        path = tmp_path / "r.yaml"
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
        return load_recipe(path, sets)

    return read


@pytest.fixture
def model(tmp_path):
    shapes = {
        f"model.layers.{n}.{name}_proj.weight": (8, 16) for n in (0, 1) for name in ("q", "k", "o")
    }
    tensors = {name: tensor("BF16", *shape) for name, shape in shapes.items()}
    tensors |= {"model.norm.weight": tensor("BF16", 16), "model.x.bias": tensor("BF16", 8)}
    tensors["lm_head.weight"] = tensor("BF16", 16, 16)
    config = {"torch_dtype": "bfloat16"}
    return open_checkpoint(make_model(tmp_path / "m", {"model.safetensors": tensors}, config=config))


def rules(*pairs, **more):
    return {
        "target": "ascend",
        "rules": [dict(zip(("match", "scheme"), p, strict=True)) for p in pairs],
    } | more


def edits(word):
    """Every misspelling by one edit: a letter lost, doubled, swapped with the next, replaced."""
    for i in range(len(word)):
        yield word[:i] + word[i + 1 :]
        yield word[:i] + word[i] + word[i:]
        yield word[:i] + "z" + word[i + 1 :]
        if i + 1 < len(word):
            yield word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def blocks():
    every = (
        RecipeFile, RuleFile, Expect, Calibration, Rotate, LearnRotation, Smoothing, SmoothRule,
        KvCache, Verify,
    )  # fmt: skip
    return {f.alias or name for block in every for name, f in block.model_fields.items()}


def test_the_full_recipe_is_full(load):
    recipe = load(FULL)
    # `methods` may not name `smooth` again, and a recipe with a budget is not resolved
    assert set(KEYS) | {"methods", "budget"} == blocks()
    assert recipe.file.max_shard == 5 * 10**9
    assert [rule.patterns for rule in recipe.rules] == [("*.q_proj",), ("*_proj", "re:x.*")]
    assert [rule.scheme and rule.scheme.name for rule in recipe.rules] == [None, "w8a16"]
    assert [rule.roles for rule in recipe.rules] == [set(), {"mlp", "attention.out"}]
    assert [rule.where.rpartition(":")[2] for rule in recipe.rules] == ["6", "9"]
    CHECK.validate(yaml.safe_load(FULL))


def test_a_cache_by_its_format_alone(load):
    short = load(rules(("*", "keep"), kv_cache="fp8", target="compressed-tensors"))
    assert str(short.cache) == "fp8_e4m3 per tensor"
    long = load(rules(("*", "keep"), kv_cache={"format": "fp8"}, target="compressed-tensors"))
    assert short.effective() == long.effective()
    assert yaml.safe_load(short.effective())["kv_cache"] == {
        "format": "fp8", "observer": "minmax", "percentile": 99.99,
    }  # fmt: skip
    assert load(rules(("*", "keep"))).cache is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("int8", "`kv_cache.format`: input should be 'fp8', 'fp8_per_head' or 'c8'"),
        ({}, "key `kv_cache.format` is missing"),
        ({"format": "fp8", "percentile": 99.0}, "has no effect without `observer: percentile`"),
        ({"format": "fp8", "group": 3}, "unknown key `kv_cache.group`"),
    ],
)
def test_a_wrong_cache(load, value, said):
    with pytest.raises(InputError) as caught:
        load(rules(("*", "keep"), kv_cache=value))
    assert said in caught.value.what


def test_a_cache_leaves_weights_without_text_alone(load):
    """They are the same bytes with a cache and without."""
    plain = load(rules(("*", "w8a8_dynamic")))
    cached = load(rules(("*", "w8a8_dynamic"), kv_cache="c8"))
    assert cached.rules[0].scheme == plain.rules[0].scheme
    assert load(rules(("*", "w8a8_dynamic"), smooth={})).rules[0].scheme != plain.rules[0].scheme


@pytest.mark.parametrize("line", [n for n, key in enumerate(KEYS, 1) if KEYS.index(key) == n - 1])
def test_every_key_misspelt_by_one_edit(load, line):
    lines = FULL.splitlines()
    key = KEYS[line - 1]
    tried = 0
    for wrong in {*edits(key)} - blocks() - {""}:
        if len(wrong) < 4 and wrong[:1] == "z":
            continue
        text = "\n".join([*lines[: line - 1], lines[line - 1].replace(key, wrong, 1), *lines[line:]])
        with pytest.raises(InputError) as caught:
            load(text)
        assert caught.value.what.startswith("unknown key `")
        assert caught.value.what.endswith(f"{wrong}`")
        assert caught.value.where.endswith(f"r.yaml:{line}"), (wrong, caught.value.where)
        assert caught.value.fix.startswith(f"did you mean `{key}`"), (wrong, caught.value.fix)
        with pytest.raises(jsonschema.ValidationError):
            CHECK.validate(yaml.safe_load(text))
        tried += 1
    assert tried > len(key)


@pytest.mark.parametrize("key", ["str", "dict[str,any]", "zzz", "<<", "5"])
def test_keys_that_resemble_nothing(load, key):
    with pytest.raises(InputError, match="unknown key") as caught:
        load(FULL + f"'{key}': 1\n")
    assert caught.value.what == f"unknown key `{key}`"
    assert "known: " in caught.value.fix or "did you mean" in caught.value.fix


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (("scheme", "scheme", {"name": "w8a16", "group": 1}), "unknown key `group`"),
        (("scheme", "scheme", {"nmae": "w8a16"}), "the scheme needs a `name`; it has `nmae`"),
        (("scheme", "scheme", {"name": 3}), "the scheme needs a `name`"),
        (("scheme", "scheme", {}), "the scheme needs a `name`"),
        (("scheme", "scheme", {"name": "keep"}), "`keep` takes no options"),
        (("scheme", "scheme", "W8A16"), "unknown scheme `W8A16`"),
        (("scheme", "scheme", None), "`rules.0.scheme`: expected text"),
        (("scheme", "scheme", ["keep"]), "`rules.0.scheme`: expected text"),
        (("match", "match", []), "`rules.0.match`: must not be empty"),
        (("match", "match", [1]), "`rules.0.match.0`: expected text"),
        (("match", "match", 1), "`rules.0.match`: expected a list"),
        (("match", "match", ""), "the pattern is empty"),
        (("match", "match", ["a", ""]), "the pattern is empty"),
        (("match", "match", "re:"), "the pattern is empty"),
        (("optional", "optional", "yes"), "`rules.0.optional`: expected true or false"),
        (("optional", "optional", 1), "`rules.0.optional`: expected true or false"),
    ],
)
def test_bad_rules(load, change, what):
    _, key, value = change
    table = rules(("*", "w8a16"))
    table["rules"][0][key] = value
    with pytest.raises(InputError) as caught:
        load(table)
    assert caught.value.what == what
    assert "r.yaml:" in caught.value.where


@pytest.mark.parametrize(
    ("rounding", "what"),
    [
        ("gtpq", "`weight_rounding`: input should be 'nearest', 'gptq' or 'learned'"),
        ({"name": "learned", "steps": 0}, "`weight_rounding.steps`: input should be greater than"),
        ({"name": "gptq", "steps": 9}, "unknown key `weight_rounding.steps`"),
        (True, "`weight_rounding`: expected a mapping"),
        (None, "`weight_rounding`: expected a mapping"),
        ({}, "key `weight_rounding.name` is missing"),
        ({"name": "nearest"}, "`weight_rounding.name`: input should be 'gptq'"),
        ({"name": "gptq", "sweep": 1}, "unknown key `weight_rounding.sweep`"),
        ({"name": "gptq", "damping": 0}, "`weight_rounding.damping`: input should be greater than 0"),
        ({"name": "gptq", "damping": math.nan}, "`weight_rounding.damping`: "),
        ({"name": "gptq", "sweeps": True}, "`weight_rounding.sweeps`: expected a whole number"),
        ({"name": "gptq", "ranges": "mse"}, "`weight_rounding.ranges`: input should be 'fitted' or"),
    ],
)
@pytest.mark.parametrize("scheme", ["w4a16", "nvfp4", "w4a4_flatquant"])
def test_bad_options_of_rounding(load, scheme, rounding, what):
    table = rules(("*", {"name": scheme, "weight_rounding": rounding}))
    with pytest.raises(InputError) as caught:
        load(table)
    assert caught.value.what.startswith(what)
    assert "r.yaml:" in caught.value.where


@pytest.mark.parametrize("rounding", ["learned", {"name": "learned"}])
def test_a_learned_transform_learns_no_rounding(load, rounding):
    table = rules(("*", {"name": "mxfp4_flatquant", "weight_rounding": rounding}))
    with pytest.raises(InputError, match="learns a transform takes `nearest` or `gptq`"):
        load(table)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"target": "vllm"}, "unknown target `vllm`"),
        ({"target": "keep"}, "unknown target `keep`"),
        ({"target": {"name": "ascend", "x": 1}}, "unknown key `x`"),
        ({"target": {}}, "the target needs a `name`"),
        ({"target": None}, "`target`: expected text"),
        ({"rules": None}, "`rules`: expected a list"),
        ({"rules": {}}, "`rules`: expected a list"),
        ({"rules": []}, "`rules`: must not be empty"),
        ({"rules": ["*"]}, "`rules.0`: expected a mapping"),
        ({"expect": None}, "`expect`: expected a mapping"),
        ({"expect": {"output_gib": 5}}, '`expect.output_gib`: expected a comparison such as ">= 90"'),
        (
            {"expect": {"output_gib": True}},
            '`expect.output_gib`: expected a comparison such as ">= 90"',
        ),
        (
            {"expect": {"output_gib": "> -1"}},
            '`expect.output_gib`: expected a comparison such as ">= 90"',
        ),
        (
            {"expect": {"output_gib": "> 1 GB"}},
            '`expect.output_gib`: expected a comparison such as ">= 90"',
        ),
        ({"calibration": {"samples": 0}}, "`calibration.samples`: input should be greater than 0"),
        ({"calibration": {"samples": "3"}}, "`calibration.samples`: expected a whole number"),
        ({"verify": {"min_sqnr": "20"}}, "`verify.min_sqnr`: expected a number"),
        ({"verify": {"min_sqnr": True}}, "`verify.min_sqnr`: expected a number"),
        ({"verify": {"min_sqnr": math.nan}}, "`verify.min_sqnr`: expected a finite number"),
        ({"verify": {"min_sqnr": -math.inf}}, "`verify.min_sqnr`: expected a finite number"),
        ({"verify": {"max_ppl_ratio": math.inf}}, "`verify.max_ppl_ratio`: expected a finite number"),
        ({"verify": {"max_kl": math.nan}}, "`verify.max_kl`: expected a finite number"),
        ({"model": 7}, "`model`: expected text"),
    ],
)
def test_bad_values(load, more, what):
    with pytest.raises(InputError) as caught:
        load(rules(("*", "w8a16")) | more)
    assert caught.value.what == what


def test_missing_keys(load):
    with pytest.raises(InputError, match="key `target` is missing"):
        load({"rules": [{"match": "*", "scheme": "keep"}]})
    with pytest.raises(InputError, match="key `rules` is missing"):
        load({"target": "ascend"})
    with pytest.raises(InputError, match=r"key `rules\.0\.scheme` is missing") as caught:
        load("target: ascend\nrules:\n  - match: a\n")
    assert caught.value.where.endswith("r.yaml:3")


@pytest.mark.parametrize("pattern", ["re:(", "re:*", "re:[[a]", "re:(?P<a>x)(?P<a>y)"])
def test_bad_expressions(load, pattern):
    with pytest.raises(InputError, match="is not a regular expression") as caught:
        load(rules(("a", "keep"), (["b", pattern], "keep")))
    assert f"`{pattern}`" in caught.value.what
    assert caught.value.where.rpartition(":")[2].isdecimal()


@pytest.mark.parametrize(
    ("pattern", "matching", "not_matching"),
    [
        ("*_proj", ["q_proj", "a.b.q_proj"], ["q_proj.x", "q_projs"]),
        ("a.?.q", ["a.1.q"], ["a.10.q", "xa.1.q", "a.1.q.x"]),
        ("a.[12].q", ["a.1.q", "a.2.q"], ["a.3.q"]),
        ("a.[!12].q", ["a.3.q"], ["a.1.q"]),
        ("A", ["A"], ["a"]),
        ("a.b", ["a.b"], ["aXb"]),
        ("re:a.b", ["a.b", "aXb"], ["a.bc", "xa.b"]),
        ("re:a|bc", ["a", "bc"], ["ac", "abc", "abcd", "bcd"]),
        ("re:.*\\.(q|k)_proj", ["x.q_proj", "x.k_proj"], ["q_proj", "x.v_proj", "x.q_proj.y"]),
        ("re:(?i)A", ["a", "A"], ["b"]),
        (["a", "re:b+"], ["a", "b", "bb"], ["ab"]),
    ],
)
def test_patterns_match_whole_names(load, pattern, matching, not_matching):
    rule = load(rules((pattern, "keep"))).rules[0]
    assert [name for name in matching + not_matching if rule.matches(name)] == matching


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        ("5GB", 5 * 10**9),
        ("5gb", 5 * 10**9),
        ("512MiB", 2**29),
        (" 1.5 KB ", 1500),
        ("1KB", 1000),
        ("1000", 1000),
        (1000, 1000),
        ("1200B", 1200),
        ("1GiB", 2**30),
        ("1.5KiB", 1536),
        ("3kb", 3000),
        ("2MB", 2 * 10**6),
        ("5 TB", 5 * 10**12),
        ("5G", 5 * 10**9),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes(value, nbytes):
    assert parse_size(value) == nbytes


@pytest.mark.parametrize(
    "value",
    [
        "",
        "GB",
        "-1GB",
        "5 boxes",
        "5bit",
        "1,5GB",
        "5.GB",
        "5GB!",
        "1e9",
        "0",
        0,
        -1,
        True,
        1.5,
        None,
        [],
        "0.1",
        "9" * 400,
        "9" * 5000,
        2**63,
    ],
)
def test_bad_sizes(load, value):
    with pytest.raises(ValueError, match="expected a size such as 5GB or 512MiB"):
        parse_size(value)
    with pytest.raises(InputError, match="`max_shard`: expected a size"):
        load(rules(("*", "keep"), max_shard=value))


@pytest.mark.parametrize(
    ("value", "nbytes", "example"),
    [
        (5, "5 bytes", "5GB"),
        ("5", "5 bytes", "5GB"),
        (" 64 ", "64 bytes", "64GB"),
        (1, "1 byte", "1GB"),
        (999, "999 bytes", "999GB"),
        ("5B", "5 bytes", "5GB"),
        ("512B", "512 bytes", "5GB"),
        ("0.5KiB", "512 bytes", "5GB"),
        ("0.999KB", "999 bytes", "5GB"),
    ],
)
def test_a_size_without_its_unit(load, value, nbytes, example):
    what = f"a size of {nbytes} is below the smallest, 1KB: write the unit, such as {example}"
    with pytest.raises(ValueError, match=f"^{what}$"):
        parse_size(value)
    with pytest.raises(InputError, match=f"^`max_shard`: {what}\n  --> .*:[0-9]+\n"):
        load(rules(("*", "keep"), max_shard=value))


@pytest.mark.parametrize(
    ("limit", "value", "met"),
    [
        (">= 90", 90, True),
        (">= 90", 89.99, False),
        ("> 90", 90, False),
        ("<=5", 5, True),
        ("<5", 5, False),
        ("== 7", 7, True),
        ("==7.5", 7, False),
    ],
)
def test_limits(limit, value, met):
    assert compare(limit, value) is met


# against a model


@pytest.mark.parametrize(
    ("pairs", "what", "fix"),
    [
        ([("*.z", "keep")], "`rules.0` matches no module", "optional: true"),
        (
            [("*_proj", "w8a16"), ("*.q_proj", "keep")],
            "`rules.1` matches only modules that earlier",
            "r.yaml:",
        ),
        (
            [("*norm", "w8a16")],
            "`rules.0` matches no matrix; only matrices",
            "`model.norm` is BF16 [16]",
        ),
        ([("*.weight", "w8a16")], "`rules.0` matches no module", "leave out `.weight`"),
        ([("model", "w8a16")], "`rules.0` matches no module", "whole names"),
        ([("*.bias", "keep")], "`rules.0` matches no module", "whole names"),
        ([("re:q_proj", "w8a16")], "`rules.0` matches no module", "q_proj"),
    ],
)
def test_rules_that_do_nothing(load, model, pairs, what, fix):
    recipe = load(rules(*pairs))
    with pytest.raises(InputError) as caught:
        make_plan(recipe, model)
    assert caught.value.what.startswith(what)
    assert fix in caught.value.fix
    assert caught.value.where.startswith(recipe.rules[-1].where)


def test_optional_rules_may_do_nothing(load, model):
    table = rules(("*_proj", "w8a16"), ("*.q_proj", "keep"), ("*.z", "keep"), ("*norm", "w8a8_dynamic"))
    for rule in table["rules"][1:]:
        rule["optional"] = True
    assert make_plan(load(table), model).quantized_modules == 6


def test_first_rule_wins(load, model):
    table = rules(("*.0.*", "keep"), ("*_proj", "w8a16"))
    plan = make_plan(load(table), model)
    assert plan.quantized_modules == 3
    assert make_plan(load(table, "rules.0.scheme=w8a16"), model).quantized_modules == 6


PARAMS, QUANTIZED = 6 * 8 * 16 + 16 + 8 + 16 * 16, 6 * 8 * 16
NBYTES = QUANTIZED + 6 * 8 * (4 + 4) + 2 * (PARAMS - QUANTIZED)  # codes, scales and offsets, the rest


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantized_params_pct", 100 * QUANTIZED / PARAMS),
        ("quantized_modules", 6),
        ("bits_per_param", 8 * NBYTES / PARAMS),
        ("output_gib", NBYTES / 2**30),
    ],
)
def test_expectations(load, model, key, value):
    table = rules(("*_proj", "w8a16"))
    for limit in (f">= {value * 0.999:.12f}", f"<= {value * 1.001:.12f}"):
        plan = make_plan(load(table, f"expect.{key}={limit}"), model)
        assert compare_expected(plan) == [Expected(key, limit, pytest.approx(value), ok=True)]
    for limit in (f"> {value * 1.001:.12f}", f"< {value * 0.999:.12f}"):
        recipe = load(table, f"expect.{key}={limit}")
        missed = compare_expected(make_plan(recipe, model))
        assert missed == [Expected(key, limit, pytest.approx(value), ok=False)]


@pytest.mark.parametrize(
    "table",
    [
        rules(("*_proj", "w8a16")),
        rules(
            ("*.q_proj", "keep"),
            ("*.k_proj", "keep"),
            (["re:.*\\.(o|v)_proj"], {"name": "fp8_dynamic"}),
        ),
        rules(("*_proj", "w8a16"), max_shard="1KiB", expect={"quantized_modules": "== 6"}),
        rules(("*_proj", "w8a16"), calibration={"samples": 3}, verify={"min_sqnr": 20.5}),
        rules(("*_proj", "w8a16"), target={"name": "ascend"}, model="elsewhere", output="there"),
        {"target": "ascend", "rules": [{"match": "*é#: x", "scheme": "keep", "optional": True}]},
    ],
)
def test_effective_recipe_gives_the_same_plan(load, model, tmp_path, table):
    plan = make_plan(load(table), model)
    text = plan.recipe.effective()
    again = make_plan(load(text), model)
    assert again.digest == plan.digest
    assert again.recipe.effective() == text
    assert plan.sidecars["quantcli_recipe.yaml"] == text.encode()
    assert str(tmp_path) not in text
    assert "elsewhere" not in text
    CHECK.validate(yaml.safe_load(text))
    for rule, other in zip(plan.recipe.rules, again.recipe.rules, strict=True):
        assert (rule.patterns, rule.scheme, rule.optional) == (
            other.patterns,
            other.scheme,
            other.optional,
        )


def test_what_is_set_is_in_the_effective_recipe(load, model):
    plan = make_plan(
        load(rules(("*_proj", "w8a16")), "max_shard=1KiB", "rules.0.scheme=fp8_dynamic"), model
    )
    written = yaml.safe_load(plan.recipe.effective())
    assert written["max_shard"] == 1024
    assert written["rules"] == [
        {
            "match": ["*_proj"],
            "scheme": {"name": "fp8_dynamic", "clip": "none"},
            "optional": False,
        }
    ]


CLIPS = rules(
    ("*.q_proj", "w8a16"),
    ("*.k_proj", {"name": "fp8_dynamic", "clip": "none"}),
    ("*.v_proj", "w4a4_dynamic"),
    ("*_proj", "fp8_tensor"),
)


@pytest.mark.parametrize(
    ("more", "clips"),
    [
        ({}, ["none", "none", "columns", None]),
        ({"smooth": {"alpha": 0.5}, "calibration": {"data": "t"}}, ["inputs", "none", "inputs", None]),
    ],
)
def test_a_recipe_that_calibrates_clips_by_inputs_unless_it_says_otherwise(load, model, more, clips):
    recipe = load({**CLIPS, **more})
    assert [getattr(rule.scheme, "clip", None) for rule in recipe.rules] == clips
    written = yaml.safe_load(recipe.effective())["rules"]
    assert [rule["scheme"].get("clip") for rule in written] == clips


def test_one_scheme_that_needs_data_makes_all_clip_by_inputs(load):
    assert load(rules(("*.q_proj", "w8a8_dynamic"))).rules[0].scheme.clip == "none"
    clipped = load(rules(("*.q_proj", "w8a8_dynamic"), ("*_proj", "w8a8_static")))
    assert [rule.scheme.clip for rule in clipped.rules] == ["inputs", "inputs"]
    learned = load(rules(("*.q_proj", "w4a4_flatquant"), ("*_proj", "w4a4_dynamic")))
    assert [rule.scheme.clip for rule in learned.rules] == ["learned", "inputs"]


# the schema for editors


def test_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert recipe_schema() == json.dumps(SCHEMA, indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_good(path):
    CHECK.validate(yaml.safe_load(path.read_text()))
    recipe = load_recipe(path)
    known = {"vllm": "compressed-tensors"}.get(path.stem.partition("_")[0])
    assert recipe.target.name in ([known] if known else discover(Target))
    assert any(rule.scheme for rule in recipe.rules)


@pytest.mark.parametrize(
    "table",
    [
        rules(("*", "w8a17")),
        rules(("*", {"name": "w8a16", "group": 1})),
        rules(("*", {})),
        rules(("*", "keep"), target="vllm"),
        rules(("*", "keep"), rulez=[]),
        {"target": "ascend", "rules": []},
        {"target": "ascend", "rules": [{"match": "*"}]},
        {"target": "ascend", "rules": [{"match": "*", "scheme": "keep", "opt": True}]},
        {"rules": [{"match": "*", "scheme": "keep"}]},
        rules(("*", "keep"), expect={"output": "> 1"}),
        [],
    ],
)
def test_schema_refuses_what_the_loader_refuses(load, table):
    with pytest.raises(jsonschema.ValidationError):
        CHECK.validate(table)
    with pytest.raises(InputError):
        load(table)


def test_every_field_of_a_block_is_described_or_plain():
    for block in (RecipeFile, RuleFile, Expect, Calibration, Smoothing, SmoothRule):
        assert issubclass(block, BaseModel)
        assert all(field.description for name, field in block.model_fields.items() if name not in
                   {"expect", "calibration", "verify"})  # fmt: skip
