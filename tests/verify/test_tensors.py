"""Tensors that the engine would stop at or misread, found from headers and what a module has once."""

import pytest
import torch

from tests.verify.damage import (
    CONFIG,
    DESCRIPTION,
    add,
    assert_caught,
    bit,
    change,
    describe,
    drop,
    each,
    edit,
    relabel,
    row,
    table,
    to_float,
    to_int8,
    ulp,
)

LAYER = "model.layers.1"
Q, K, V, OUT = (f"{LAYER}.self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"{LAYER}.mlp.{name}_proj" for name in ("gate", "up", "down"))
EXPERT = f"{LAYER}.mlp.experts.3"
EXPERTS = f"`{LAYER}.mlp.experts`"
NORM = f"{LAYER}.input_layernorm.weight"


def to(dtype):
    return lambda tensor: tensor.to(dtype)


def shaped(*shape):
    return lambda tensor: tensor.reshape(shape)


def heads(**counts):
    return edit(CONFIG, **counts)


ROWS = [
    # dtypes
    row("codes as bfloat16", "dynamic", change(f"{Q}.weight", to(torch.bfloat16)), "parameters",
        f"{Q}.weight", "BF16", "reads I8"),
    row("scale as int8", "dynamic", change(f"{Q}.weight_scale", to(torch.int8)), "parameters",
        f"{Q}.weight_scale", "I8"),
    row("deq_scale as int64 for bfloat16", "static", change(f"{OUT}.deq_scale", to(torch.int64)),
        "parameters", f"{OUT}.deq_scale", "I64", "bfloat16 reads F32"),
    row("deq_scale as float32 for float16", "half", change(f"{OUT}.deq_scale", to(torch.float32)),
        "parameters", f"{OUT}.deq_scale", "F32", "float16 reads I64"),
    row("quant_bias as float32", "static", change(f"{OUT}.quant_bias", to(torch.float32)), "parameters",
        f"{OUT}.quant_bias", "reads I32"),
    row("exponents as int8", "mxfp8", change(f"{Q}.weight_scale", lambda t: t.view(torch.int8)),
        "parameters", f"{Q}.weight_scale", "reads U8"),
    row("fp8 codes as int8", "fp8", change(f"{Q}.weight", lambda t: t.view(torch.int8)), "parameters",
        f"{Q}.weight", "reads F8_E4M3"),
    row("bias as int32", "static", change(f"{Q}.bias", to(torch.int32)), "parameters", f"{Q}.bias"),
    # shapes
    row("scale [n]", "dynamic", change(f"{Q}.weight_scale", shaped(-1)), "parameters",
        f"{Q}.weight_scale", "is [64]", "has [64, 1]"),
    row("one scale for all rows", "w8a16", change(f"{Q}.weight_scale", lambda t: t[:1]), "parameters",
        f"{Q}.weight_scale", "is [1, 1]"),
    row("input_scale without a dimension", "static", change(f"{OUT}.input_scale", shaped()),
        "parameters",
        f"{OUT}.input_scale", "is []", "has [1]"),
    row("deq_scale [n, 1]", "static", change(f"{OUT}.deq_scale", shaped(-1, 1)), "parameters",
        f"{OUT}.deq_scale"),
    row("codes in three dimensions", "dynamic", change(f"{Q}.weight", shaped(64, 8, 8)), "parameters",
        f"{Q}.weight", "not a matrix"),
    row("codes transposed", "dynamic", change(f"{DOWN}.weight", lambda t: t.T), "parameters",
        f"{DOWN}.weight_scale", "for a weight of 96 x 64", most=2),
    row("int4 codes not packed", "w4a8", change(f"{Q}.weight", lambda t: t.repeat(2, 1)), "parameters",
        f"{Q}.weight_scale", "for a weight of 512", most=3),
    row("scale_bias not summed", "w4a8", change(f"{Q}.scale_bias", lambda t: t.repeat(1, 256)),
        "parameters", f"{Q}.scale_bias", "is [256, 256]"),
    row("exponents of blocks of 64", "mxfp8", change(f"{Q}.weight_scale", lambda t: t[:, ::2]),
        "parameters", f"{Q}.weight_scale", "has [256, 8]"),
    row("transform of another size", "flatquant",
        each(*(change(f"{m}.left_trans", lambda t: torch.eye(8)) for m in (Q, K, V))), "parameters",
        "left_trans", "has [16, 16]", most=3),
    row("bias of another length", "static", change(f"{Q}.bias", lambda t: t[:-1]), "parameters",
        f"{Q}.bias", "64 floats"),
    # what is not there, and what should not be
    row("no input_offset", "static", drop(f"{OUT}.input_offset"), "parameters", f"{OUT}.input_offset",
        "which no file holds"),
    row("no quant_bias", "static", drop(f"{OUT}.quant_bias"), "parameters", f"{OUT}.quant_bias"),
    row("no scale", "dynamic", drop(f"{Q}.weight_scale"), "parameters", f"{Q}.weight_scale"),
    row("no offset of weights for W8A16", "w8a16", drop(f"{Q}.weight_offset"), "parameters",
        f"{Q}.weight_offset", "W8A16 needs"),
    row("no scale in a mixed module", "mix", drop(f"{Q}.weight_scale"), "parameters", "W8A8_MIX needs"),
    row("no scale_bias", "w4a8", drop(f"{Q}.scale_bias"), "parameters", f"{Q}.scale_bias"),
    row("no right transform", "flatquant", drop(f"{Q}.right_trans"), "parameters", f"{Q}.right_trans"),
    row("scale without codes", "dynamic", drop(f"{Q}.weight"), "parameters", f"{Q}.weight_offset",
        "belongs to no weight"),
    row("offset of E8M0 scales", "mxfp8", add(f"{Q}.weight_offset", torch.zeros(256, 1), "W8A8_MXFP8"),
        "parameters", f"{Q}.weight_offset", "has no weight_offset"),
    row("tensor that the type does not have", "dynamic",
        add(f"{Q}.smooth_scale", torch.ones(64), "W8A8_DYNAMIC"), "parameters", "has no smooth_scale"),
    row("scale of a float weight", "dynamic", add("lm_head.weight_scale", torch.ones(128, 1)),
        "parameters", "lm_head.weight_scale", "is FLOAT"),
    row("bias lost in one layer", "static", drop(f"{Q}.bias"), "layers", f"`{LAYER}`", "q_proj.bias"),
    # the wrong type
    row("FLOAT for codes", "dynamic", each(*(relabel(m, "FLOAT") for m in (Q, K, V))), "parameters",
        f"{Q}.weight", "codes would be taken for weights", most=9),
    row("W8A8_DYNAMIC for W8A8", "static", relabel(OUT, "W8A8_DYNAMIC"), "parameters",
        "W8A8_DYNAMIC", f"{OUT}.", most=9),
    row("W8A8 for W8A8_DYNAMIC", "dynamic", relabel(OUT, "W8A8"), "parameters", "W8A8 needs", OUT,
        most=9),
    row("W8A16 for W8A8_MIX", "mix", relabel(OUT, "W8A16"), "parameters", "W8A16 has no", OUT, most=9),
    row("W8A8FP8 for int8", "dynamic", relabel(OUT, "W8A8FP8_DYNAMIC"), "parameters", OUT,
        "reads F8_E4M3"),
    row("W4A4_DYNAMIC for FlatQuant", "flatquant",
        each(*(relabel(m, "W4A4_DYNAMIC") for m in (GATE, UP))), "parameters", "no left_trans", most=9),
    row("a type for the embedding",
        "dynamic", describe(**{"model.embed_tokens.weight": "W8A8_DYNAMIC"}),
        "parameters", "model.embed_tokens", most=9),
    # siblings
    row("one sibling of another type", "dynamic", relabel(K, "W8A16"), "siblings", "k_proj W8A16"),
    row("gate float, up int8", "dynamic", to_float(GATE), "siblings", "gate_proj FLOAT"),
    row("input_scale of a sibling, one ulp", "static", change(f"{K}.input_scale", ulp), "siblings",
        f"{K}.input_scale", "whichever it reads last"),
    row("input_offset of a sibling", "static", change(f"{V}.input_offset", lambda t: t + 1), "siblings",
        f"{V}.input_offset"),
    row("transform of a sibling, one ulp", "flatquant",
        change(f"{K}.right_trans", ulp), "siblings", f"{K}.right_trans"),
    row("bit of a transform", "flatquant", bit(f"{V}.left_trans", 7, 0), "siblings", f"{V}.left_trans"),
    row("clip ratio of a sibling, one ulp", "flatquant", change(f"{UP}.clip_ratio", ulp), "siblings",
        f"{UP}.clip_ratio"),
    # experts
    row("one expert float", "moe", to_float(f"{EXPERT}.up_proj"), "siblings", "up_proj FLOAT",
        also={"experts", "loader"}, most=9),
    row("all of one expert float", "moe",
        each(*(to_float(f"{EXPERT}.{name}_proj") for name in ("gate", "up", "down"))), "experts",
        "experts of one layer must have one scheme", also={"loader"}, most=9),
    row("an expert is missing", "moe", drop(f"{EXPERT}.", everything=True), "experts",
        "expert 3 is missing", EXPERTS),
    row("last experts are missing", "moe",
        drop(f"{LAYER}.mlp.experts.6.", f"{LAYER}.mlp.experts.7.", everything=True), "experts",
        "expert 6 is missing", EXPERTS),
    row("more experts than config.json says", "moe", edit(CONFIG, num_experts=7), "experts",
        "there are 8 experts; config.json says 7", most=4),
    row("part of an expert is missing", "moe", drop(f"{EXPERT}.up_proj.", everything=True), "experts",
        "lacks up_proj", f"`{EXPERT}`"),
    row("an expert of another width", "moe",
        each(*(change(f"{EXPERT}.down_proj.{s}", lambda t: t[:32]) for s in ("weight", "weight_scale",
               "weight_offset"))), "experts", f"{EXPERT}.down_proj", "unlike", most=3),
    row("type that experts do not have", "moe",
        lambda copy: w8a16_experts(copy), "loader", "no W8A16 for experts", most=24),
    row("set of experts not described", "mixtral",
        describe(**{f"{LAYER}.block_sparse_moe.experts.weight": None}), "loader", "does not describe",
        f"{LAYER}.block_sparse_moe.experts.weight"),
    # what the engine never quantizes, and how it looks names up
    row("router quantized", "moe", to_int8(f"{LAYER}.mlp.gate"), "loader", f"{LAYER}.mlp.gate",
        "routers"),
    row("kv_b_proj quantized", "latent", to_int8(f"{LAYER}.self_attn.kv_b_proj"), "loader", "kv_b_proj",
        "must be float"),
    row("embedding quantized", "dynamic", to_int8("model.embed_tokens"), "loader", "embed_tokens",
        "no quantized embedding"),
    row("float name that begins with a quantized one", "dynamic",
        add(f"{DOWN}_gate.weight", torch.ones(64, 96, dtype=torch.bfloat16)), "loader",
        f"{DOWN}_gate", "both for float"),
    # int4 experts
    row("one scale_bias for down", "w4a8 moe",
        change(f"{EXPERT}.down_proj.scale_bias", lambda t: t.sum(1, keepdim=True)), "parameters",
        f"{EXPERT}.down_proj.scale_bias", "has [64, 16]",
        also={"experts"}, most=3),
    row("slices of scale_bias for up", "w4a8 moe",
        change(f"{EXPERT}.up_proj.scale_bias", lambda t: t.repeat(1, 16) / 16), "parameters",
        f"{EXPERT}.up_proj.scale_bias", ", 1] for a module of this name",
        also={"experts"}, most=3),
    row("no scale_bias of an expert", "w4a8 moe", drop(f"{EXPERT}.up_proj.scale_bias"), "parameters",
        f"{EXPERT}.up_proj.scale_bias", "which no file holds",
        also={"experts"}, most=3),
    row("a group_size for W4A8", "w4a8 moe", describe(group_size=32), "description",
        "W4A8_DYNAMIC needs 0"),
    row("another group_size for W4A16", "w4a16 moe", describe(group_size=64), "parameters",
        "W4A16 has", most=999),
    row("group_size 0 for W4A16", "w4a16 moe", describe(group_size=0), "description", "W4A16 needs 32"),
    row("W4A16 by the name of the weight", "w4a16 moe",
        lambda copy: renamed(copy), "parameters",
        f"{EXPERT}.up_proj.weight_packed",
        also={"experts"}, most=9),
    row("a weight_shape the other way round", "w4a16 moe",
        change(f"{EXPERT}.up_proj.weight_shape", lambda t: t.flip(0)), "parameters",
        f"{EXPERT}.up_proj.weight_shape", "the codes are for"),
    row("no scales of W4A16", "w4a16 moe", drop(f"{EXPERT}.up_proj.weight_scale"), "parameters",
        f"{EXPERT}.up_proj.weight_scale",
        also={"experts"}, most=3),
    row("scales of W4A16 per channel", "w4a16 moe",
        change(f"{EXPERT}.up_proj.weight_scale", lambda t: t[:, :1]), "parameters", "W4A16 has",
        also={"experts"}, most=3),
    # layers
    row("a layer is missing", "dynamic", drop(f"{LAYER}.", everything=True), "layers",
        "layer 1 is missing"),
    row("the last layer is missing", "dynamic", drop("model.layers.3.", everything=True), "sizes",
        "it says 4 layers; `model.layers` has 3"),
    row("a module of one layer is missing everywhere", "dynamic", drop(f"{OUT}.", everything=True),
        "layers", "self_attn.o_proj", f"`{LAYER}`"),
    row("a norm of one layer is missing", "dynamic", drop(NORM), "layers", "input_layernorm"),
    row("no head, though untied", "dynamic", drop("lm_head.weight", described=True), "layers",
        "lm_head is missing"),
    row("no head, and not described", "dynamic", drop("lm_head.weight"), "layers",
        "lm_head is missing"),
    # config.json against shapes
    row("other hidden_size", "dynamic", edit(CONFIG, hidden_size=512), "sizes", "hidden_size` is 512",
        most=2),
    row("other vocab_size", "dynamic", edit(CONFIG, vocab_size=999), "sizes", "vocab_size` is 999"),
    row("other intermediate_size", "dynamic", edit(CONFIG, intermediate_size=3), "sizes",
        "mlp.down_proj` 3 columns; it has 96"),
    row("other number of heads", "dynamic", edit(CONFIG, num_key_value_heads=1), "sizes",
        "self_attn.k_proj` 16 rows", most=2),
    row("other number of query heads", "dynamic", edit(CONFIG, num_attention_heads=8), "sizes",
        "self_attn.q_proj` 128 rows; it has 64", most=2),
    row("output of other heads", "dynamic", edit(CONFIG, num_attention_heads=2), "sizes",
        "self_attn.o_proj` 32 columns; it has 64", most=2),
    row("other head_dim", "dynamic", edit(CONFIG, head_dim=8), "sizes",
        "self_attn.v_proj` 16 rows; it has 32", most=4),
    row("fewer layers than there are", "dynamic", edit(CONFIG, num_hidden_layers=2), "sizes",
        "it says 2 layers; `model.layers` has 4"),
    row("layers in words", "dynamic", edit(CONFIG, num_hidden_layers="six"), "config",
        "num_hidden_layers` should be a whole number of 0 or more, not text: it is 'six'"),
    row("a list of model types", "moe", edit(CONFIG, model_type=["x"]), "config",
        "`model_type` should be text, not a list"),
    # tensor parallelism
    row("FlatQuant over two devices", "flatquant",
        lambda copy: flat_output(copy), "tp", "--tp 2", OUT, "transforms of 16 and 16", tp=(1, 2)),
    row("heads over three devices", "dynamic", lambda copy: None, "tp", "4 attention heads", "--tp 3",
        tp=(3,), most=99),
    row("key/value heads over devices", "dynamic", heads(num_key_value_heads=3), "tp",
        "3 key/value heads", also={"sizes"}, tp=(4,), most=3),
    row("E8M0 blocks over eight devices", "mxfp8", heads(num_attention_heads=8), "tp",
        "multiples of 64", OUT, also={"sizes"}, tp=(8,), most=6),
    row("inputs over devices", "dynamic", heads(num_attention_heads=64, num_key_value_heads=64), "tp",
        "96 inputs", DOWN, also={"sizes"}, tp=(64,), most=8),
]  # fmt: skip


def flat_output(copy):
    """A FlatQuant module whose inputs tensor parallelism splits."""
    with copy.tensors() as tensors:
        for suffix in ("left_trans", "right_trans", "clip_ratio"):
            tensors[f"{OUT}.{suffix}"] = tensors[f"{Q}.{suffix}"].clone()
        tensors[f"{OUT}.weight"] = tensors[f"{OUT}.weight"].clamp(-8, 7)
    names = ("weight", "weight_scale", "weight_offset", "left_trans", "right_trans", "clip_ratio")
    describe(**{f"{OUT}.{name}": "W4A4_FLATQUANT_DYNAMIC" for name in names})(copy)


def renamed(copy):
    """Packed codes under the name of others."""
    name = f"{EXPERT}.up_proj.weight"
    with copy.tensors() as tensors, copy.json(DESCRIPTION) as table_:
        tensors[name] = tensors.pop(f"{name}_packed")
        table_[name] = table_.pop(f"{name}_packed")


def w8a16_experts(copy):
    """All experts of one layer of a type that experts do not have."""
    relabel(f"{LAYER}.mlp.experts", "W8A16")(copy)


@pytest.mark.parametrize(**table(ROWS))
def test_caught(stock, tmp_path, row):
    assert_caught(stock, row, tmp_path)
