"""Checkpoints for vLLM in compressed-tensors: sound ones of every kind, and what can happen to them."""

import pytest
import torch

from quantcli.verification.depths import verify
from quantcli.verification.options import VerifyOptions
from tests.verify.damage import (
    CONFIG,
    MANIFEST,
    Copy,
    add,
    assert_caught,
    byte,
    change,
    drop,
    each,
    good_of,
    put,
    row,
    swap,
    table,
)
from tests.verify.test_sound import NO_MANIFEST

LAYER = "model.layers.1"
Q, K, V, OUT = (f"{LAYER}.self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"{LAYER}.mlp.{name}_proj" for name in ("gate", "up", "down"))

SOUND = [
    ("qwen3", "ct_dynamic", "max_shard=60KB"), ("qwen2", "ct_dynamic"), ("gemma3", "ct_dynamic"),
    ("phi3", "ct_dynamic"), ("multimodal", "ct_dynamic"), ("names:deepseek_v3", "ct_dynamic"),
    ("names:vlm", "ct_dynamic"), ("qwen3_moe", "ct_dynamic"), ("mixtral", "ct_dynamic"),
    ("qwen2", "ct_static"), ("phi3", "ct_static"), ("llama:float16", "ct_static"),
    ("llama", "ct_symmetric"), ("mixtral", "ct_fp8"), ("stablelm", "ct_fp8"),
    ("llama", "ct_fp8_static"), ("phi3", "ct_fp8_static"), ("qwen3_moe", "ct_w4a16"),
    ("llama:float16", "ct_w4a16"), ("qwen2", "ct_w4a8"), ("llama", "ct_w8a16"), ("llama", "ct_mixed"),
    ("llama", "ct_asymmetric"), ("qwen3_moe", "ct_asymmetric"), ("qwen2", "ct_w8a16_groups"),
    ("granitemoe", "ct_dynamic"), ("granitemoehybrid", "ct_w4a16"), ("aria_text", "ct_fp8"),
]  # fmt: skip


def examine(path, source=None):
    report = verify(VerifyOptions(path, full=True, against=source and str(source)))
    assert [f for f in report.findings if f.severity == "error"] == []
    assert report.format == "compressed-tensors"
    return report


@pytest.mark.parametrize("case", SOUND, ids=" ".join)
def test_own(stock, case):
    good = stock.good(*case)
    report = examine(good.path, good.source)
    assert [f.what for f in report.findings] == []
    assert report.modules
    assert report.checked["parameters"] > len(report.modules)


# -- as other producers write it ----------------------------------------------------------------------


def as_the_library_has_it(block):
    """Every field written out, most of them null."""
    from compressed_tensors.quantization import QuantizationConfig

    plain = {key: value for key, value in block.items() if key != "quant_method"}
    full = QuantizationConfig.model_validate(plain).model_dump()
    for group in full["config_groups"].values():
        for args in (group["weights"], group["input_activations"]):
            if args is not None:
                args |= {"actorder": args.get("actorder"), "observer": "minmax"}
    return {**full, "quant_method": "compressed-tensors", "version": "0.19.0", "sparsity_config": {}}


@pytest.mark.parametrize("good", ["ct dynamic", "ct static", "ct w4a16", "ct moe", "ct mixed"])
def test_what_llm_compressor_writes_is_sound(stock, tmp_path, good):
    copy = Copy(good_of(stock, good), tmp_path / "copy")
    with copy.tensors() as tensors:
        for name in tensors:
            if name.endswith(("weight_scale", "input_scale")):
                tensors[name] = tensors[name].bfloat16()
    with copy.json(CONFIG) as config:
        block = as_the_library_has_it(config["quantization_config"])
        if len(block["config_groups"]) == 1:
            block["config_groups"]["group_0"]["targets"] = [r"re:.*self_attn\..*_proj$", "re:.*mlp.*"]
            block["ignore"] = ["lm_head", r"re:.*mlp\.gate$"]
        config["quantization_config"] = block
    (copy.path / MANIFEST).unlink()
    report = examine(copy.path, copy.source)
    assert [f.what for f in report.findings] == [NO_MANIFEST]
    assert all(module.label != "FLOAT" for module in report.modules)


# -- harm ---------------------------------------------------------------------------------------------


def to(dtype):
    return lambda tensor: tensor.to(dtype)


def configure(change):
    """A change of `quantization_config`."""

    def damage(copy):
        with copy.json(CONFIG) as config:
            change(config["quantization_config"])

    return damage


def group(number=0, **entries):
    """Entries of a group; those of weights and inputs as `weights_num_bits=4`."""

    def change(block):
        found = block["config_groups"][f"group_{number}"]
        for key, value in entries.items():
            for part in ("weights", "input_activations"):
                if key.startswith(f"{part}_"):
                    found[part][key.removeprefix(f"{part}_")] = value
                    break
            else:
                found[key] = value

    return configure(change)


def also_ignored(*names):
    return configure(lambda block: block["ignore"].extend(names))


def beside(**entries):
    return configure(lambda block: block.update(entries))


def and_not_ignored(block):
    """Two float modules among those of int4."""
    groups = block["config_groups"].values()
    for name in ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"):
        block["ignore"].remove(name)
        next(g for g in groups if g["format"] == "pack-quantized")["targets"].append(name)


def none_of(block):
    block["config_groups"] = {}


HARM = [
    # tensors
    row("codes as bfloat16", "ct dynamic", change(f"{Q}.weight", to(torch.bfloat16)), "parameters",
        f"{Q}.weight", "BF16", "reads I8"),
    row("scale as int8", "ct dynamic", change(f"{Q}.weight_scale", to(torch.int8)), "parameters",
        f"{Q}.weight_scale", "I8"),
    row("scale without its second dimension", "ct dynamic",
        change(f"{Q}.weight_scale", lambda t: t.flatten()), "parameters", f"{Q}.weight_scale",
        "[64, 1]"),
    row("scale lost", "ct dynamic", drop(f"{DOWN}.weight_scale", described=True), "parameters",
        f"{DOWN}.weight_scale", "no file holds"),
    row("codes lost", "ct w4a16", drop(f"{DOWN}.weight_packed", described=True), "parameters",
        f"{DOWN}.weight_packed", "no file holds"),
    row("input_scale lost", "ct static", drop(f"{OUT}.input_scale", described=True), "parameters",
        f"{OUT}.input_scale", "no file holds"),
    row("zero point as int32", "ct static", change(f"{OUT}.input_zero_point", to(torch.int32)),
        "parameters", f"{OUT}.input_zero_point", "reads I8"),
    row("zero points of weights", "ct dynamic",
        add(f"{OUT}.weight_zero_point", torch.zeros(64, 1, dtype=torch.int8), None), "parameters",
        "no weight_zero_point"),
    row("weight_shape of another", "ct w4a16", put(f"{DOWN}.weight_shape", (0,), 65), "parameters",
        f"{DOWN}.weight_shape", "[65, 96]"),
    row("packed twice as wide", "ct w4a16", change(f"{OUT}.weight_packed", lambda t: t.repeat(1, 2)),
        "parameters", f"{OUT}.weight_shape", "64 x 128", most=2),
    row("scales of other groups", "ct w4a8", change(f"{OUT}.weight_scale", lambda t: t.repeat(1, 2)),
        "parameters", f"{OUT}.weight_scale", "[64, 4]", "[64, 2]"),
    row("scale of a block for each row", "ct mixed",
        change(f"{OUT}.weight_scale", lambda t: t.repeat(64, 1)), "parameters", f"{OUT}.weight_scale",
        "[64, 1]", "[1, 1]"),
    row("bias as int32", "ct static", change(f"{Q}.bias", to(torch.int32)), "parameters", f"{Q}.bias"),
    row("experts one short", "ct moe", drop(f"{LAYER}.mlp.experts.3.", described=True, everything=True),
        "experts", "expert 3 is missing"),
    # what siblings share
    row("input_scale of k alone", "ct static", change(f"{K}.input_scale", lambda t: t * 2), "siblings",
        f"{K}.input_scale", "differs from"),
    row("zero point of v alone", "ct static", change(f"{V}.input_zero_point", lambda t: t + 1),
        "siblings", f"{V}.input_zero_point", "differs from"),
    # config.json
    row("a quantized module in ignore", "ct dynamic", also_ignored(DOWN), "loader", DOWN,
        "is in `ignore`"),
    row("one of q, k, v in ignore", "ct dynamic", also_ignored(K), "siblings", "fuses",
        also=("loader",), most=2),
    row("a float module that is not in ignore", "ct mixed", configure(and_not_ignored), "parameters",
        "model.layers.0.mlp.up_proj.weight_packed", "BF16", most=2),
    row("a float head that is not in ignore", "ct dynamic",
        configure(lambda block: block["ignore"].remove("lm_head")), "loader", "lm_head",
        "transformers would take it for quantized"),
    row("targets of no module", "ct dynamic", group(targets=["Linera"]), "loader",
        "is in no group", "27 more"),
    row("no groups", "ct dynamic", configure(none_of), "config", "config_groups", also=("loader",),
        most=2),
    row("int4 over codes of int8", "ct dynamic", group(weights_num_bits=4), "values",
        "a code is outside of -8..7", most=28),
    row("groups of another size", "ct w4a16", group(weights_group_size=64), "parameters",
        "[64, 2]", "[64, 1]", most=32),
    row("inputs symmetric with a zero point", "ct static", group(input_activations_symmetric=True),
        "parameters", "has no input_zero_point", most=28),
    row("inputs dynamic with a scale", "ct fp8 static",
        group(input_activations_strategy="token", input_activations_dynamic=True), "parameters",
        "has no input_scale", most=28),
    row("an order of columns", "ct w4a16", group(weights_actorder="group"), "config", "actorder"),
    row("an unknown strategy", "ct dynamic", group(weights_strategy="attn_head"), "config",
        "attn_head"),
    row("an unknown format", "ct dynamic", group(format="marlin-24"), "config", "marlin-24"),
    row("inputs with packed weights", "ct w4a16",
        group(input_activations={"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}),
        "config", "no scheme for"),
    row("numbers that are none", "ct dynamic", group(weights_num_bits="8"), "config", "bits"),
    row("targets that are none", "ct dynamic", group(targets=7), "config", "targets",
        also=("loader",), most=2),
    row("sparsity", "ct dynamic", beside(sparsity_config={"targets": ["Linear"]}), "config",
        "sparsity"),
    row("a transform", "ct dynamic", beside(transform_config={"R1": {}}), "config",
        "transform_config"),
    row("a costly expression", "ct dynamic", also_ignored("re:(a{999}){999}"), "config", "too costly"),
    row("no expression", "ct dynamic", also_ignored("re:("), "config", "is not a regular expression"),
    row("float32 to be served", "ct dynamic", lambda copy: change_dtype(copy), "config", "float32"),
    # numbers
    row("a scale of zero", "ct dynamic", put(f"{Q}.weight_scale", (3, 0), 0.0), "values",
        f"{Q}.weight_scale", "[3, 0]"),
    row("a NaN among codes", "ct mixed", byte(f"{OUT}.weight", 0x7F, 70), "values", f"{OUT}.weight",
        "0x7F"),
    row("an input_scale of NaN", "ct fp8 static", each(
        *(put(f"{m}.input_scale", (0,), float("nan")) for m in (Q, K, V))), "values", "not a positive",
        most=3),
    row("rows exchanged", "ct w4a16", change(f"{DOWN}.weight_packed", lambda t: t.flip(0)), "sqnr",
        DOWN),
    row("nibbles exchanged", "ct w4a16", change(f"{DOWN}.weight_packed", lambda t: (
        ((t >> 4) & 0x0F0F0F0F) | ((t & 0x0F0F0F0F) << 4))), "sqnr", DOWN),
    row("no zero points", "ct asymmetric", drop(f"{DOWN}.weight_zero_point", described=True),
        "parameters", f"{DOWN}.weight_zero_point", "no file holds"),
    row("zero points packed along columns", "ct asymmetric",
        change(f"{DOWN}.weight_zero_point", lambda t: torch.zeros(64, 1, dtype=torch.int32)),
        "parameters", f"{DOWN}.weight_zero_point", "[8, 3]"),
    row("zero points off by 8", "ct asymmetric",
        change(f"{DOWN}.weight_zero_point", lambda t: t ^ -0x77777778), "sqnr", DOWN),
    row("zero points of rows in another order", "ct asymmetric",
        change(f"{DOWN}.weight_zero_point", lambda t: t.roll(1, 0)), "sqnr", DOWN),
    row("a negative scale next to a zero point", "ct asymmetric",
        change(f"{DOWN}.weight_scale", lambda t: -t), "values", f"{DOWN}.weight_scale",
        "not a positive"),
    row("symmetric with zero points", "ct asymmetric", group(weights_symmetric=True), "parameters",
        "has no weight_zero_point", most=28),
    row("modules exchanged", "ct w4a8", swap(GATE, UP, "weight", "weight_scale"), "sqnr", GATE,
        most=2),
    row("a scale with a wrong exponent", "ct w4a8", put(f"{OUT}.weight_scale", (4, 1), 1.0), "sqnr",
        OUT, most=2),
    row("the scale of a whole weight", "ct fp8 static",
        change(f"{OUT}.weight_scale", lambda t: t * 1.5), "edits", OUT),
]  # fmt: skip


def change_dtype(copy):
    with copy.json(CONFIG) as config:
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = "float32"


def test_names_in_ignore_that_no_module_has_are_noted(stock, tmp_path):
    """Not other spellings of a name, parts of names, expressions or classes."""
    good = good_of(stock, "ct moe")
    copy = Copy(good, tmp_path / "copy")
    configure(lambda block: block["ignore"].extend([f"{LAYER}.mlp.no_proj", "visual.proj"]))(copy)
    copy.seal()
    notes = [f for f in examine(copy.path).findings if f.check == "config"]
    assert [f.severity for f in notes] == ["note"]
    assert notes[0].what == f"`ignore` names `{LAYER}.mlp.no_proj` and 1 more, which no file holds"
    others = ["model.language_model.layers.1.mlp.gate", f"{LAYER}.input_layernorm", "re:no", "Conv1d"]
    copy = Copy(good, tmp_path / "another")
    configure(lambda block: block["ignore"].extend(others))(copy)
    copy.seal()
    assert examine(copy.path).findings == []


@pytest.mark.parametrize(**table(HARM))
def test_caught(stock, tmp_path, row):
    assert_caught(stock, row, tmp_path)


SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        (SCHEME, "the cache is declared fp8_e4m3 per tensor, and no file holds a scale"),
        (SCHEME | {"type": "int"}, "`kv_cache_scheme` (num_bits 8, type 'int'"),
        (
            SCHEME | {"strategy": "channel"},
            "`kv_cache_scheme` (num_bits 8, type 'float', strategy 'chan",
        ),
        (SCHEME | {"symmetric": False}, "`kv_cache_scheme` (num_bits 8, type 'float', strategy 'tens"),
        ({"num_bits": 8}, "`kv_cache_scheme` (num_bits 8, type None"),
        ("fp8", "`kv_cache_scheme` that is 'fp8', not an object"),
    ],
)
def test_a_cache_without_scales_or_of_an_unknown_kind(stock, tmp_path, scheme, said):
    copy = Copy(good_of(stock, "ct dynamic"), tmp_path / "copy")
    beside(kv_cache_scheme=scheme)(copy)
    copy.seal()
    report = verify(VerifyOptions(copy.path))
    (error,) = report.errors
    assert said in error.what
