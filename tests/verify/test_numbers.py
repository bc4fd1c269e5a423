"""Numbers that no sound checkpoint holds, and bytes that have changed since it was written."""

import math
import re

import pytest
import torch

from tests.verify.damage import (
    CONFIG,
    DESCRIPTION,
    GENERATION,
    INDEX,
    TOKENIZER,
    assert_caught,
    bit,
    byte,
    change,
    each,
    flip,
    put,
    raw,
    row,
    swap,
    table,
    ulp,
)

LAYER = "model.layers.1"
Q, K, V, OUT = (f"{LAYER}.self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"{LAYER}.mlp.{name}_proj" for name in ("gate", "up", "down"))
EXPERT = f"{LAYER}.mlp.experts.3"
NORM, EMBEDDING = f"{LAYER}.input_layernorm.weight", "model.embed_tokens.weight"
INF, NAN = math.inf, math.nan
POSITIVE = "not a positive number"


def all_of(modules, suffix, to):
    """The same for siblings, so that they stay alike."""
    return each(*(change(f"{module}.{suffix}", to) for module in modules))


def filled(value):
    return lambda tensor: torch.full_like(tensor, value)


def nibbles_swapped(packed):
    """Even rows in the high halves of the bytes."""
    return (packed << 4) | (packed >> 4 & 15)


def row_halves(packed):
    """Row r beside row r + n / 2, as other formats have it, in place of 2r beside 2r + 1."""
    low, high = packed << 4 >> 4, packed >> 4
    rows = torch.stack([low, high], 1).view(-1, packed.shape[1])
    half = len(rows) // 2
    return (rows[half:] << 4) | (rows[:half] & 15)


def singular(tensor):
    tensor[1] = tensor[0]
    return tensor


def high_bits(tensor):
    tensor[3] |= 1 << 46
    return tensor


def without_bias(copy):
    """quant_bias as if the module had no bias."""
    with copy.tensors() as tensors:
        sums = tensors[f"{Q}.weight"].sum(1, dtype=torch.int64)
        offset = tensors[f"{Q}.input_offset"].long()
        tensors[f"{Q}.quant_bias"] = (-offset * sums).to(torch.int32)


VALUES = [
    row("scale 0", "dynamic", put(f"{Q}.weight_scale", (3, 0), 0), "values", POSITIVE,
        f"`{Q}.weight_scale`[3, 0]"),
    row("scale negative", "w8a16", put(f"{Q}.weight_scale", (3, 0), -0.01), "values", POSITIVE),
    row("scale NaN", "fp8", put(f"{DOWN}.weight_scale", (3, 0), NAN), "values", POSITIVE, "nan",
        "[3, 0]"),
    row("scale infinite", "moe", put(f"{LAYER}.mlp.experts.5.up_proj.weight_scale", (9, 0), INF),
        "values", POSITIVE, "experts.5.up_proj", "inf"),
    row("offset of weights", "w8a16", put(f"{Q}.weight_offset", (7, 0), 1), "values", "not zero",
        f"`{Q}.weight_offset`[7, 0]"),
    row("offset of dynamic weights", "dynamic", put(f"{Q}.weight_offset", (7, 0), 0.5), "values",
        "not zero"),
    row("input_scale 0", "static", put(f"{OUT}.input_scale", (0,), 0), "values", POSITIVE,
        f"{OUT}.input_scale"),
    row("input_scale NaN for siblings", "mix", all_of((Q, K, V), "input_scale", filled(NAN)), "values",
        POSITIVE, "input_scale", most=3),
    row("input_offset out of range", "static", put(f"{OUT}.input_offset", (0,), 300), "values",
        "not an int8: 300", f"{OUT}.input_offset", also={"arithmetic"}, most=2),
    row("input_offset between two codes", "static", put(f"{OUT}.input_offset", (0,), 0.5), "values",
        "not an int8", also={"arithmetic"}, most=2),
    row("deq_scale negative", "static", put(f"{OUT}.deq_scale", (4,), -1e-4), "values", POSITIVE,
        f"`{OUT}.deq_scale`[4]"),
    row("deq_scale with high bits", "half", change(f"{OUT}.deq_scale", high_bits), "values",
        "bits of a positive float32", f"`{OUT}.deq_scale`[3]"),
    row("deq_scale converted by value", "half", change(f"{OUT}.deq_scale", filled(0)), "values",
        "bits of a positive float32"),
    row("NaN code 0x7F", "fp8", byte(f"{Q}.weight", 0x7F, 65), "values", "code is NaN", "0x7F",
        f"`{Q}.weight`[1, 1]"),
    row("NaN code 0xFF", "mxfp8", byte(f"{Q}.weight", 0xFF), "values", "code is NaN", "0xFF"),
    row("E8M0 255", "mxfp8", byte(f"{Q}.weight_scale", 255, 9), "values", "E8M0", "[1, 1]"),
    row("int4 code 8", "flatquant", put(f"{Q}.weight", (2, 5), 8), "values", "-8..7: 8",
        f"`{Q}.weight`[2, 5]"),
    row("int4 code -9", "flatquant", put(f"{Q}.weight", (0, 0), -9), "values", "-8..7: -9"),
    row("clip ratio as it was trained", "flatquant", all_of((GATE, UP), "clip_ratio", filled(4.6)),
        "values", "before its sigmoid", "clip_ratio", most=2),
    row("clip ratio negative", "flatquant", all_of((Q, K, V), "clip_ratio", filled(-0.2)), "values",
        "clip ratio", most=3),
    row("norm NaN", "dynamic", put(NORM, (11,), NAN), "values", "not finite: nan", f"`{NORM}`[11]"),
    row("embedding infinite", "dynamic", put(EMBEDDING, (3, 1), INF), "values", "not finite: inf",
        f"`{EMBEDDING}`[3, 1]"),
    row("bias NaN", "static", put(f"{Q}.bias", (2,), NAN), "values", f"`{Q}.bias`[2]"),
    row("router NaN", "moe", put(f"{LAYER}.mlp.gate.weight", (2, 2), NAN), "values", "mlp.gate"),
    row("transform NaN", "flatquant", all_of((GATE, UP), "left_trans", filled(NAN)), "values",
        "left_trans", most=2),
    row("transform of no inverse", "flatquant", all_of((GATE, UP), "right_trans", singular),
        "arithmetic", "right_trans cannot be inverted", GATE, most=2),
    row("transform of zeros", "flatquant", all_of((Q, K, V), "left_trans", filled(0)), "arithmetic",
        "left_trans cannot be inverted", most=3),
    row("bias dropped from quant_bias", "static", without_bias, "arithmetic", "quant_bias", f"`{Q}`"),
    row("quant_bias of one row", "static", change(f"{OUT}.quant_bias", lambda t: t + 1000),
        "arithmetic", "quant_bias of row", f"`{OUT}`"),
    row("quant_bias of another offset", "static", put(f"{OUT}.input_offset", (0,), 77), "arithmetic",
        "quant_bias", f"`{OUT}`"),
    row("quant_bias 0", "static", change(f"{DOWN}.quant_bias", filled(0)), "arithmetic", f"`{DOWN}`"),
    row("sum of codes has changed", "static", put(f"{OUT}.weight", (5, 0), -128), "arithmetic",
        "quant_bias of row 5", f"`{OUT}`"),
    row("deq_scale of a mixed module", "mix", change(f"{OUT}.deq_scale", lambda t: t * 1.5),
        "arithmetic", "deq_scale", f"`{OUT}`"),
    row("top bit of two int4 codes", "w4a8", bit(f"{Q}.weight", 100, 7), "arithmetic",
        "scale_bias of row 1 ", f"`{Q}`"),
    row("exponent of scale_bias", "w4a8", bit(f"{Q}.scale_bias", 7, 0), "arithmetic",
        "scale_bias of row 1 ", f"`{Q}`"),
    row("exponent of quant_bias", "static", bit(f"{OUT}.quant_bias", 6, 3), "arithmetic",
        "quant_bias of row 1 ", f"`{OUT}`"),
    row("scale_bias of another row", "w4a8", change(f"{Q}.scale_bias", lambda t: t.roll(1, 0)),
        "arithmetic", "scale_bias of row", f"`{Q}`"),
    row("scale_bias 0", "w4a8", change(f"{DOWN}.scale_bias", filled(0)), "arithmetic", f"`{DOWN}`"),
    row("slices of scale_bias swapped", "w4a8", change(f"{DOWN}.scale_bias", lambda t: t.flip(1)),
        "arithmetic", "scale_bias", f"`{DOWN}`"),
    row("nibbles swapped", "w4a8", change(f"{Q}.weight", nibbles_swapped), "arithmetic",
        "scale_bias of row", f"`{Q}`"),
    row("rows of both halves in one byte", "w4a8", change(f"{Q}.weight", row_halves), "arithmetic",
        "scale_bias of row", f"`{Q}`"),
    row("scale_bias of another expert", "w4a8 moe", swap(f"{EXPERT}.down_proj",
        f"{LAYER}.mlp.experts.2.down_proj", "scale_bias"), "arithmetic", f"`{EXPERT}.down_proj`", also={
        "arithmetic"}, most=2),
    row("scale_bias of another slice", "w4a8 moe",
        change(f"{EXPERT}.down_proj.scale_bias", lambda t: t.roll(1, 1)), "arithmetic",
        "scale_bias", f"`{EXPERT}.down_proj`"),
    row("scale_bias without the factor 8", "w4a8 moe",
        change(f"{EXPERT}.up_proj.scale_bias", lambda t: t / 8), "arithmetic", f"`{EXPERT}.up_proj`"),
    row("nibbles of an expert swapped", "w4a8 moe", change(f"{EXPERT}.up_proj.weight", nibbles_swapped),
        "arithmetic", f"`{EXPERT}.up_proj`"),
    row("a negative scale of W4A8", "w4a8 moe",
        change(f"{EXPERT}.up_proj.weight_scale", lambda t: -t), "values", POSITIVE,
        also={"arithmetic"}, most=3),
]  # fmt: skip

OPEN = {"sealed": False}
CHANGED = "changed since it was written"
FLIPPED = {  # a tensor of each kind
    "dynamic": (f"{Q}.weight", f"{Q}.weight_scale", f"{Q}.weight_offset", NORM, EMBEDDING,
                "lm_head.weight"),
    "static": (f"{OUT}.weight", f"{OUT}.input_scale", f"{OUT}.input_offset", f"{OUT}.quant_bias",
               f"{OUT}.deq_scale", f"{Q}.bias"),
    "fp8": (f"{Q}.weight", f"{Q}.weight_scale"),
}  # fmt: skip
HASHES = [
    *(row(f"lowest bit of {name}", good, bit(name, 0, 0), "hashes", CHANGED, "model-", **OPEN,
          also={"values"} if "offset" in name else (), most=2)
      for good, names in FLIPPED.items() for name in names),
    row("one ulp of a scale", "moe", change(f"{LAYER}.mlp.experts.2.up_proj.weight_scale", ulp),
        "hashes",
        CHANGED, "model-", **OPEN),
    row("bit of config.json", "dynamic", flip(CONFIG, 30), "hashes", CHANGED, CONFIG, **OPEN),
    row("bit of tokenizer.json", "dynamic", flip(TOKENIZER, 80), "hashes", CHANGED, TOKENIZER, **OPEN),
    row("bit of generation_config.json", "dynamic", flip(GENERATION, 10), "hashes", CHANGED, **OPEN),
    row("white space of the description",
        "dynamic", raw(DESCRIPTION, lambda data: data.replace(b"  ", b" \t", 1)), "hashes", CHANGED,
        DESCRIPTION, **OPEN),
    row("total size of the index",
        "dynamic", raw(INDEX, lambda data: re.sub(rb'(size": )\d', rb"\g<1>9", data)),
        "hashes", CHANGED, INDEX, **OPEN),
    row("padding of a header", "dynamic", lambda copy: padding(copy), "hashes", CHANGED, "model-",
        **OPEN),
]  # fmt: skip


def padding(copy):
    """A tab in place of the last space of a header."""
    for path in copy.shards:
        data = bytearray(path.read_bytes())
        end = 8 + int.from_bytes(data[:8], "little")
        if data[end - 1] == ord(" "):
            data[end - 1] = ord("\t")
            path.write_bytes(data)
            return
    raise AssertionError("no header is padded")


@pytest.mark.parametrize(**table(VALUES))
def test_values(stock, tmp_path, row):
    assert_caught(stock, row, tmp_path)


@pytest.mark.parametrize(**table(HASHES))
def test_hashes(stock, tmp_path, row):
    assert_caught(stock, row, tmp_path)
