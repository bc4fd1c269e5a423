"""Four-bit floats, scales of blocks, int4 experts: each mutation is caught where it was promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantcli.verification.depths import verify
from quantcli.verification.options import VerifyOptions
from tests.verify.damage import (
    CONFIG,
    DESCRIPTION,
    Copy,
    Damage,
    assert_caught,
    byte,
    change,
    drop,
    each,
    edit,
    harmed,
    put,
    relabel,
    row,
    swap,
    table,
)

LAYER = "model.layers.1"
Q, K, V, OUT = (f"{LAYER}.self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"{LAYER}.mlp.{name}_proj" for name in ("gate", "up", "down"))
EXPERT = f"{LAYER}.mlp.experts.3"
W1, W2, W3 = (f"{EXPERT}.{name}_proj" for name in ("gate", "down", "up"))
OTHER = "model.layers.0"
ATTENTION = f"{LAYER}.self_attn"
HF = "hf_quant_config.json"


def to(dtype: torch.dtype) -> Any:
    return lambda tensor: tensor.to(dtype)


def seen_as(dtype: torch.dtype) -> Any:
    return lambda tensor: tensor.view(dtype)


def nibbles_swapped(tensor: torch.Tensor) -> torch.Tensor:
    octets = tensor.view(torch.uint8)
    return (octets << 4 | octets >> 4).view(tensor.dtype)


def swizzled(tensor: torch.Tensor) -> torch.Tensor:
    """As tensor cores read scales, of as many whole tiles of 32 x 4 as there are."""
    octets = tensor.view(torch.uint8)
    rows, groups = octets.shape
    return octets.view(rows // 32, 32, groups).transpose(0, 1).reshape(rows, groups).view(tensor.dtype)


def rolled(tensor: torch.Tensor) -> torch.Tensor:
    """Each group has the scale of the next."""
    return tensor.view(torch.uint8).roll(1, 1).view(tensor.dtype)


def of_all(suffix: str, change_to: Any, *modules: str) -> Damage:
    return each(*(change(f"{module}.{suffix}", change_to) for module in modules))


def taken(module: str, suffix: str, source: str) -> Damage:
    """A tensor of another module in this one."""

    def damage(copy: Copy) -> None:
        with copy.tensors() as tensors:
            tensors[f"{module}.{suffix}"] = tensors[f"{source}.{suffix}"].clone()

    return damage


def group(**entries: Any) -> Damage:
    """Entries of the weights in the only config group."""

    def damage(copy: Copy) -> None:
        with copy.json(CONFIG) as config:
            weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
            for key, value in entries.items():
                if value is None:
                    weights.pop(key)
                else:
                    weights[key] = value

    return damage


def block(**entries: Any) -> Damage:
    """Entries of quantization_config."""

    def damage(copy: Copy) -> None:
        with copy.json(CONFIG) as config:
            config["quantization_config"] |= entries

    return damage


def hf(**entries: Any) -> Damage:
    """Entries of ModelOpt's own file."""

    def damage(copy: Copy) -> None:
        with copy.json(HF) as config:
            config["quantization"] |= entries

    return damage


def formatted(form: str) -> Damage:
    """Another format of the only config group."""

    def damage(copy: Copy) -> None:
        with copy.json(CONFIG) as config:
            config["quantization_config"]["config_groups"]["group_0"]["format"] = form

    return damage


def along_columns(tensor: torch.Tensor) -> torch.Tensor:
    """The codes of rows [n / 2, k] packed along k instead: [n, k / 2]."""
    rows = one_in_each(tensor).view(torch.uint8)
    return (rows[:, 0::2] & 15 | rows[:, 1::2] << 4).view(torch.int8)


def one_in_each(tensor: torch.Tensor) -> torch.Tensor:
    """int8 [n / 2, k] -> [n, k]."""
    return torch.stack([tensor << 4 >> 4, tensor >> 4], 1).flatten(0, 1)


def renamed(old: str, new: str) -> Damage:
    """A tensor under another name."""

    def damage(copy: Copy) -> None:
        with copy.tensors() as tensors:
            tensors[new] = tensors.pop(old)

    return damage


def along_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Two codes of neighbouring rows in a byte: [n, k / 2] -> [n / 2, k]."""
    codes = torch.stack([tensor & 15, tensor >> 4], -1).flatten(1)
    return codes[0::2] | codes[1::2] << 4


def full_left(name: str) -> Damage:
    """A transform with a number outside of the blocks on its diagonal."""
    return put(name, (0, -1), 0.25)


def scaled(name: str, factor: float) -> Damage:
    return change(name, lambda tensor: tensor * factor)


def cache_scheme(**entries: Any) -> Damage:
    """Entries of `kv_cache_scheme`."""

    def damage(copy: Copy) -> None:
        with copy.json(CONFIG) as config:
            config["quantization_config"]["kv_cache_scheme"] |= entries

    return damage


def unscaled(copy: Copy) -> None:
    """Sums of codes without their scales."""
    with copy.tensors() as tensors:
        tensors[f"{W1}.scale_bias"] = tensors[f"{W1}.scale_bias"] / tensors[f"{W1}.weight_scale"]


ROWS = [
    # NVFP4 in compressed-tensors
    row("global scale of one sibling", "ct nvfp4", change(f"{K}.weight_global_scale", lambda t: 2 * t),
        "siblings", f"{K}.weight_global_scale"),
    row("multiplier for divisor", "ct nvfp4", of_all("weight_global_scale", lambda t: 1 / t, Q, K, V),
        "values", "as if it were their multiplier", most=3),
    row("global scale of another layer", "ct nvfp4",
        each(*(taken(m, "weight_global_scale", OUT) for m in (GATE, UP)),
             of_all("weight_global_scale", lambda t: 3 * t, GATE, UP)),
        "edits", GATE, most=2),
    row("global scale NaN", "ct nvfp4", put(f"{OUT}.weight_global_scale", (0,), float("nan")), "values",
        OUT),
    row("global scale zero", "ct nvfp4", put(f"{OUT}.weight_global_scale", (0,), 0.0), "values", OUT),
    row("global scale negative", "ct nvfp4", change(f"{OUT}.weight_global_scale", lambda t: -t),
        "values", OUT),
    row("global scale infinite", "ct nvfp4", put(f"{OUT}.weight_global_scale", (0,), float("inf")),
        "values", OUT),
    row("global scale for each row", "ct nvfp4",
        change(f"{OUT}.weight_global_scale", lambda t: t.repeat(64)), "parameters", OUT),
    row("global scale as float64", "ct nvfp4", change(f"{OUT}.weight_global_scale", to(torch.float64)),
        "parameters", OUT),
    row("no global scale", "ct nvfp4", drop(f"{OUT}.weight_global_scale", described=True), "parameters",
        OUT, "needs"),
    row("block scales as uint8", "ct nvfp4", change(f"{Q}.weight_scale", seen_as(torch.uint8)),
        "parameters", f"{Q}.weight_scale", "F8_E4M3"),
    row("block scales as float32", "ct nvfp4", change(f"{Q}.weight_scale", to(torch.float32)),
        "parameters", f"{Q}.weight_scale"),
    row("block scale zero", "ct nvfp4", byte(f"{Q}.weight_scale", 0), "values", f"{Q}.weight_scale"),
    row("block scale NaN", "ct nvfp4", byte(f"{Q}.weight_scale", 0x7F), "values", f"{Q}.weight_scale"),
    row("block scale negative", "ct nvfp4", byte(f"{Q}.weight_scale", 0xB8), "values",
        f"{Q}.weight_scale"),
    row("block scales swizzled", "ct nvfp4", change(f"{Q}.weight_scale", swizzled), "edits", Q),
    row("block scales of the next group", "ct nvfp4", change(f"{Q}.weight_scale", rolled), "sqnr", Q),
    row("block scales of another layer", "ct nvfp4",
        taken(GATE, "weight_scale", f"{OTHER}.mlp.gate_proj"), "sqnr", GATE, also={"edits"}, most=2),
    row("block scales of 32 columns", "ct nvfp4",
        change(f"{Q}.weight_scale", lambda t: t.view(torch.uint8)[:, ::2].view(torch.float8_e4m3fn)),
        "parameters", f"{Q}.weight_scale"),
    row("no block scales", "ct nvfp4", drop(f"{Q}.weight_scale", described=True), "parameters", Q),
    row("nibbles swapped", "ct nvfp4", change(f"{Q}.weight_packed", nibbles_swapped), "sqnr", Q),
    row("codes as int8", "ct nvfp4", change(f"{Q}.weight_packed", seen_as(torch.int8)), "parameters",
        f"{Q}.weight_packed"),
    row("packed along the wrong axis", "ct nvfp4", change(f"{DOWN}.weight_packed", lambda t: t.T),
        "parameters", DOWN, most=3),
    row("codes one byte off", "ct nvfp4", change(f"{Q}.weight_packed", lambda t: t.roll(1, 1)), "sqnr",
        Q),
    row("codes of a sibling", "ct nvfp4", swap(GATE, UP, "weight_packed"), "sqnr", GATE, most=2),
    row("codes without signs", "ct nvfp4", change(f"{Q}.weight_packed", lambda t: t & 0x77), "sqnr", Q),
    row("codes under `weight`", "ct nvfp4", renamed(f"{Q}.weight_packed", f"{Q}.weight"), "parameters",
        Q),
    row("input scale of one sibling", "ct nvfp4",
        change(f"{K}.input_global_scale", lambda t: 2 * t), "siblings", f"{K}.input_global_scale"),
    row("no input scale", "ct nvfp4", drop(f"{OUT}.input_global_scale", described=True), "parameters",
        OUT),
    row("input scale zero", "ct nvfp4", put(f"{OUT}.input_global_scale", (0,), 0.0), "values", OUT),
    row("input scale inverted", "ct nvfp4",
        of_all("input_global_scale", lambda t: 1 / t, f"{OTHER}.mlp.down_proj", DOWN), "layer outputs",
        also={"kl"}, most=3),
    row("groups without a tensor", "ct nvfp4", group(strategy="group"), "config", "tensor_group"),
    row("groups of 32", "ct nvfp4", group(group_size=32), "config", "group_0", most=9),
    row("5 bits", "ct nvfp4", group(num_bits=5), "config", "group_0", most=9),
    row("float scales", "ct nvfp4", group(scale_dtype="torch.bfloat16"), "config", most=9),
    row("a quantized module in `ignore`", "ct nvfp4", block(ignore=["lm_head", Q, K, V]), "loader",
        "is in `ignore`", "2 more like it"),
    row("the head not in `ignore`", "ct nvfp4", block(ignore=[]), "loader", "lm_head"),
    row("packed integers", "ct nvfp4",
        each(block(format="pack-quantized"), formatted("pack-quantized")), "config", most=9),
    row("w1 and w3 of an expert", "ct nvfp4 moe",
        change(f"{W3}.weight_global_scale", lambda t: 2 * t), "siblings", W3),
    row("inputs of w1 and w3", "ct nvfp4 moe", change(f"{W1}.input_global_scale", lambda t: 2 * t),
        "siblings", W1),
    row("expert without a global scale", "ct nvfp4 moe",
        drop(f"{W2}.weight_global_scale", described=True), "parameters", W2, also={"experts"}, most=2),
    row("w1 for w3", "ct nvfp4 moe", swap(W1, W3, "weight_packed", "weight_scale"), "sqnr", most=2),
    # MXFP4 and MXFP8 in compressed-tensors
    row("exponent NaN", "ct mxfp4", byte(f"{Q}.weight_scale", 255), "values", "E8M0", Q),
    row("exponents as e8m0", "ct mxfp4", change(f"{Q}.weight_scale", seen_as(torch.float8_e8m0fnu)),
        "parameters", Q, "U8"),
    row("exponents as int8", "ct mxfp4", change(f"{Q}.weight_scale", seen_as(torch.int8)), "parameters",
        Q),
    row("exponents without a bias", "ct mxfp4", change(f"{Q}.weight_scale", lambda t: t - 127), "sqnr",
        Q),
    row("exponents one up", "ct mxfp4", change(f"{Q}.weight_scale", lambda t: t + 1), "edits", Q),
    row("exponents swizzled", "ct mxfp4", change(f"{GATE}.weight_scale", swizzled), "edits", GATE),
    row("exponents of a sibling", "ct mxfp4", swap(Q, K, "weight_scale"), "parameters", Q, most=2),
    row("exponents of 64 columns", "ct mxfp4", change(f"{OUT}.weight_scale", lambda t: t[:, :1]),
        "parameters", OUT),
    row("nibbles swapped", "ct mxfp4", change(f"{Q}.weight_packed", nibbles_swapped), "sqnr", Q),
    row("exponents of codes flipped", "ct mxfp4", change(f"{Q}.weight_packed", lambda t: t ^ 0x22),
        "sqnr", Q),
    row("groups of 16", "ct mxfp4", group(group_size=16), "config", most=9),
    row("exponent NaN", "ct mxfp8", byte(f"{Q}.weight_scale", 255), "values", "E8M0", Q),
    row("code NaN", "ct mxfp8", byte(f"{Q}.weight", 0x7F), "values", Q),
    row("e5m2 codes", "ct mxfp8", change(f"{Q}.weight", seen_as(torch.float8_e5m2)), "parameters", Q),
    row("no type of scales", "ct mxfp8", group(scale_dtype=None), "config", most=9),
    row("exponents swizzled", "ct mxfp8", change(f"{GATE}.weight_scale", swizzled), "sqnr", GATE,
        also={"edits"}, most=2),
    row("exponents of rows", "ct mxfp8", change(f"{OUT}.weight_scale", lambda t: t[:, :1]),
        "parameters", OUT),
    # ModelOpt
    row("global scale of one sibling", "mo nvfp4", change(f"{K}.weight_scale_2", lambda t: t / 2),
        "siblings", K),
    row("divisor for multiplier", "mo nvfp4", of_all("weight_scale_2", lambda t: 1 / t, Q, K, V),
        "values", most=3),
    row("nibbles swapped", "mo nvfp4", change(f"{Q}.weight", nibbles_swapped), "sqnr", Q),
    row("block scales as uint8", "mo nvfp4", change(f"{Q}.weight_scale", seen_as(torch.uint8)),
        "parameters", Q),
    row("block scales swizzled", "mo nvfp4", change(f"{Q}.weight_scale", swizzled), "edits", Q),
    row("block scale zero", "mo nvfp4", byte(f"{Q}.weight_scale", 0), "values", Q),
    row("no block scales", "mo nvfp4", drop(f"{Q}.weight_scale", described=True), "parameters", Q),
    row("inputs of one sibling", "mo nvfp4", change(f"{UP}.input_scale", lambda t: 2 * t), "siblings",
        UP),
    row("no input scale", "mo nvfp4", drop(f"{OUT}.input_scale", described=True), "parameters", OUT),
    row("a part of a quantized name excluded", "mo nvfp4",
        each(hf(exclude_modules=["lm_head", "mlp.down"]), block(ignore=["lm_head", "mlp.down"])),
        "loader", "mlp.down_proj", "among the float modules"),
    row("the head not excluded", "mo nvfp4", each(hf(exclude_modules=[]), block(ignore=[])), "loader",
        "lm_head", most=9),
    row("another algorithm", "mo nvfp4", each(hf(quant_algo="FP8"), block(quant_algo="FP8")),
        "parameters", "FP8", most=200),
    row("an algorithm of no engine", "mo nvfp4",
        each(hf(quant_algo="NVFP4_SVD"), block(quant_algo="NVFP4_SVD")), "config", most=9),
    row("files that contradict each other", "mo nvfp4", hf(quant_algo="MXFP8"), "config", most=9),
    row("groups of 32", "mo nvfp4", hf(group_size=32), "config", most=9),
    row("exponent NaN", "mo mxfp8", byte(f"{Q}.weight_scale", 255), "values", Q),
    row("exponents as e8m0", "mo mxfp8", change(f"{Q}.weight_scale", seen_as(torch.float8_e8m0fnu)),
        "parameters", Q),
    row("a scale for each row", "mo fp8", change(f"{Q}.weight_scale", lambda t: t.expand(64).clone()),
        "parameters", Q),
    row("w1 and w3 of an expert", "mo nvfp4 moe", change(f"{W3}.weight_scale_2", lambda t: t / 2),
        "siblings", W3),
    row("inputs of w1 and w3", "mo nvfp4 moe", change(f"{W1}.input_scale", lambda t: 2 * t), "siblings",
        "input_scale", also={"experts"}, most=2),
    # MX types of Ascend
    row("exponent NaN", "mxfp4", byte(f"{Q}.weight_scale", 255), "values", Q),
    row("exponents as e8m0", "mxfp4", change(f"{Q}.weight_scale", seen_as(torch.float8_e8m0fnu)),
        "parameters", Q),
    row("exponents in pairs", "mxfp4", change(f"{Q}.weight_scale", lambda t: t.view(len(t), -1, 2)),
        "parameters", Q),
    row("nibbles swapped", "mxfp4", change(f"{Q}.weight", nibbles_swapped), "sqnr", Q),
    row("packed along rows", "mxfp4", change(f"{Q}.weight", along_rows), "parameters", Q, most=3),
    row("codes as int8", "mxfp4", change(f"{Q}.weight", seen_as(torch.int8)), "parameters", Q),
    row("groups of no size", "mxfp4", edit(DESCRIPTION, group_size=0), "description", "group_size",
        most=9),
    row("groups of 16", "mxfp4", edit(DESCRIPTION, group_size=16), "description", "group_size",
        most=99),
    row("W4A8_MXFP for one sibling", "mxfp4", relabel(K, "W4A8_MXFP"), "siblings", most=9),
    row("W4A16_MXFP4 for a linear", "mxfp4", relabel(OUT, "W4A16_MXFP4"), "loader", OUT,
        "for experts alone"),
    row("W8A8_MXFP8 for codes of four bits", "mxfp4", relabel(OUT, "W8A8_MXFP8"), "parameters", OUT,
        most=9),
    row("exponents of another expert", "mxfp4 moe",
        taken(W1, "weight_scale", f"{LAYER}.mlp.experts.4.up_proj"), "edits", W1),
    row("w1 for w3", "mxfp4 moe", swap(W1, W3, "weight", "weight_scale"), "sqnr", most=2),
    row("no exponents", "mxfp4 moe", drop(f"{W2}.weight_scale"), "parameters", W2, also={"experts"},
        most=2),
    row("exponent NaN", "mxfp4a16 moe", byte(f"{W2}.weight_scale", 255), "values", W2),
    row("float codes", "mxfp4a16 moe", change(f"{W2}.weight", seen_as(torch.float8_e4m3fn)),
        "parameters", W2, also={"experts"}, most=2),
    row("left transform of one block", "mxfp4 flatquant", full_left(f"{DOWN}.left_trans"), "arithmetic",
        DOWN),
    row("right transform of a sibling", "mxfp4 flatquant",
        change(f"{K}.right_trans", lambda t: t.flip(0)), "siblings", K),
    row("transforms transposed", "mxfp4 flatquant",
        each(*(change(f"{m}.{side}_trans", lambda t: t.mT) for m in (GATE, UP)
               for side in ("left", "right"))),
        "sqnr", most=9),
    row("clip ratio of 2", "mxfp4 flatquant",
        each(*(put(f"{m}.clip_ratio", (0,), 2.0) for m in (Q, K, V))), "values", most=3),
    # int4 with zero points
    row("zero points off by 8", "ct zeros",
        change(f"{Q}.weight_zero_point", lambda t: t ^ -0x77777778), "sqnr", Q, most=2),
    row("zero points packed along columns", "ct zeros",
        change(f"{Q}.weight_zero_point", lambda t: t.T), "parameters", f"{Q}.weight_zero_point"),
    row("zero points of another layer", "ct zeros",
        taken(Q, "weight_zero_point", f"{OTHER}.self_attn.q_proj"), "sqnr", Q, most=2),
    row("no zero points", "ct zeros", drop(f"{Q}.weight_zero_point", described=True), "parameters", Q),
    row("said to be symmetric", "ct zeros", group(symmetric=True), "parameters", most=99),
    row("zero points as int8", "ct zeros", change(f"{Q}.weight_zero_point", to(torch.int8)),
        "parameters", f"{Q}.weight_zero_point"),
    # the cache of keys and values
    row("scale of another layer", "kv fp8",
        each(taken(ATTENTION, "k_scale", f"{OTHER}.self_attn"), scaled(f"{ATTENTION}.k_scale", 1 / 64)),
        "rounded cache", ATTENTION, most=9),
    row("no scale of keys", "kv fp8", drop(f"{ATTENTION}.k_scale", described=True), "cache", ATTENTION,
        also={"layers"}, most=2),
    row("scale zero", "kv fp8", put(f"{ATTENTION}.v_scale", (0,), 0.0), "values", "v_scale"),
    row("scale NaN", "kv fp8", put(f"{ATTENTION}.v_scale", (0,), float("nan")), "values", "v_scale"),
    row("scale negative", "kv fp8", change(f"{ATTENTION}.k_scale", lambda t: -t), "values", "k_scale"),
    row("scale as int32", "kv fp8", change(f"{ATTENTION}.k_scale", to(torch.int32)), "cache", "I32"),
    row("scales of heads for one", "kv fp8", change(f"{ATTENTION}.k_scale", lambda t: t.repeat(2)),
        "cache", ATTENTION, most=2),
    row("a cache that is not declared", "kv fp8", block(kv_cache_scheme=None), "recomputed",
        "kv_cache_scheme"),
    row("an asymmetric cache", "kv fp8", cache_scheme(symmetric=False), "config", most=9),
    row("a cache of int8", "kv fp8", cache_scheme(type="int"), "config", most=9),
    row("a scale of a million times", "kv fp8", scaled(f"{ATTENTION}.k_scale", 2.0**20),
        "rounded cache", ATTENTION, most=9),
    row("values that are cut off", "kv fp8", scaled(f"{ATTENTION}.v_scale", 2.0**-6), "rounded cache",
        ATTENTION, most=9, also={"layer outputs", "kl"}),
    row("one scale for all heads", "kv heads", change(f"{ATTENTION}.k_scale", lambda t: t[:1]), "cache",
        ATTENTION, most=2),
    row("a scale NaN of one head", "kv heads", put(f"{ATTENTION}.k_scale", (1, 0, 0), float("nan")),
        "values", "k_scale"),
    row("no scale of values", "kv mo", drop(f"{ATTENTION}.v_proj.v_scale", described=True), "cache",
        ATTENTION, also={"layers"}, most=2),
    row("scale of each channel missing", "kv c8",
        change(f"{K}.kv_cache_scale", lambda t: t[:-1]), "cache", f"{K}.kv_cache_scale"),
    row("an offset", "kv c8", put(f"{K}.kv_cache_offset", (3,), 7.0), "cache", f"{K}.kv_cache_offset"),
    row("no offset", "kv c8", drop(f"{K}.kv_cache_offset"), "layers", "kv_cache_offset"),
    row("a cache of no type", "kv c8", edit(DESCRIPTION, kv_cache_type=None), "cache", most=99),
    row("a scale of zero", "kv c8", put(f"{V}.kv_cache_scale", (0,), 0.0), "values", V),
    # int4 experts of Ascend
    row("scale_bias of another slice", "w4a8 moe", change(f"{W2}.scale_bias", lambda t: t.roll(1, 1)),
        "arithmetic", W2, "scale_bias", "in slice"),
    row("scale_bias of another expert", "w4a8 moe",
        taken(W1, "scale_bias", f"{LAYER}.mlp.experts.4.gate_proj"), "arithmetic", W1,
        "scale_bias of row"),
    row("scale_bias of half the size", "w4a8 moe", change(f"{W1}.scale_bias", lambda t: t / 2),
        "arithmetic", W1, "scale_bias of row"),
    row("scale_bias without scales", "w4a8 moe", unscaled, "arithmetic", W1, "scale_bias of row"),
    row("scale_bias of each row in one", "w4a8 moe",
        change(f"{W2}.scale_bias", lambda t: t.sum(1, keepdim=True)), "parameters", W2,
        "has [64, 16]", also={"experts"}, most=2),
    row("no scale_bias", "w4a8 moe", drop(f"{W1}.scale_bias"), "parameters", W1, also={"experts"},
        most=2),
    row("codes packed along columns", "w4a8 moe", change(f"{W1}.weight", along_columns), "parameters",
        W1, also={"experts"}, most=4),
    row("nibbles swapped", "w4a8 moe", change(f"{W1}.weight", nibbles_swapped), "arithmetic", W1),
    row("one code in each byte", "w4a8 moe", change(f"{W1}.weight", one_in_each), "parameters", W1,
        also={"experts"}, most=4),
    row("an offset of weights", "w4a8 moe", put(f"{W1}.weight_offset", (0, 0), 8.0), "values", W1),
    row("groups in the description", "w4a8 moe", edit(DESCRIPTION, group_size=256), "description",
        "group_size", most=9),
    row("codes of w1 for w3", "w4a8 moe", swap(W1, W3, "weight"), "arithmetic", most=2),
    row("offset-binary codes as signed", "w4a16 moe",
        change(f"{W1}.weight_packed", lambda t: t ^ -0x77777778), "sqnr", W1),
    row("words in another order", "w4a16 moe", change(f"{W1}.weight_packed", lambda t: t.flip(1)),
        "sqnr", W1, most=2),
    row("another shape on record", "w4a16 moe", change(f"{W1}.weight_shape", lambda t: t.flip(0)),
        "parameters", W1),
    row("packed along rows", "w4a16 moe", change(f"{W1}.weight_packed", lambda t: t.T), "parameters",
        W1, also={"experts"}, most=3),
    row("groups of no size", "w4a16 moe", edit(DESCRIPTION, group_size=0), "description", "group_size",
        most=9),
    row("groups of another size", "w4a16 moe", edit(DESCRIPTION, group_size=64), "parameters", most=99),
    row("scale NaN", "w4a16 moe", put(f"{W1}.weight_scale", (0, 0), float("nan")), "values", W1),
    row("scales of one group missing", "w4a16 moe",
        change(f"{W1}.weight_scale", lambda t: t[:, :1]), "parameters", W1, also={"experts"}, most=2),
]  # fmt: skip


@pytest.mark.parametrize(**table(ROWS))
def test_caught(stock, row, tmp_path):
    assert_caught(stock, row, tmp_path)


# No false alarm, on a dense model and one with experts, down to a comparison with the source.
SOUND = [
    *((family, f"ct_{scheme}")
      for family in ("llama", "qwen3_moe")
      for scheme in ("nvfp4a16", "mxfp4", "mxfp4a16", "mxfp4_fp8", "mxfp8")),
    *((family, f"mo_{scheme}")
      for family in ("llama", "qwen3_moe")
      for scheme in ("nvfp4a16", "mxfp8")),
    ("llama", "ct_nvfp4"), ("qwen3_moe", "ct_nvfp4_moe"), ("qwen2", "ct_nvfp4"), ("gemma2", "ct_mxfp4"),
    ("llama", "mo_nvfp4"), ("qwen3_moe", "mo_nvfp4_moe"), ("llama", "mo_fp8_static"),
    ("phi3", "ct_nvfp4a16"), ("phi3", "mo_nvfp4a16"), ("mixtral", "ct_nvfp4a16"),
    ("llama:wide", "mxfp4"), ("qwen3_moe:wide", "mxfp4_fp8"), ("qwen3_moe:wide", "mxfp4a16_moe"),
    ("qwen3_moe:wide", "mxfp4"), ("llama:wide", "mxfp8"), ("llama:wide", "mx_flatquant"),
    ("llama", "ct_zeros"), ("llama", "ct_kv_fp8"), ("llama", "ct_kv_fp8_per_head"),
    ("llama", "mo_kv_fp8"), ("llama:wide", "ascend_kv_c8"),
    ("llama:float16", "ct_nvfp4a16"), ("llama:float16", "ct_mxfp4"), ("mixtral", "ct_mxfp8"),
]  # fmt: skip


@pytest.mark.parametrize("case", SOUND, ids=" ".join)
def test_sound(stock, case):
    good = stock.good(*case)
    report = verify(VerifyOptions(good.path, full=True, against=str(good.source)))
    assert [(f.check, f.what, f.where) for f in report.errors] == []
    assert report.modules


def test_a_scale_of_the_cache_is_made_again(stock, tmp_path):
    """One a little larger than measured does no harm that a run sees; calibration tells."""
    changed = row("", "kv fp8", scaled(f"{ATTENTION}.k_scale", 1.05), "recomputed")
    copy = harmed(stock, changed, tmp_path)
    measured = stock.good("llama", "ct_kv_fp8").path.with_suffix(".calibration")
    options = VerifyOptions(copy.path, against=str(copy.source), calibration=measured)
    found = [f for f in verify(options).errors if f.check == "recomputed"]
    assert [f"{ATTENTION}.k_scale" in str(f.where) for f in found] == [True]
