"""Keys and values on their way into the cache: seen in every family, and rounded as engines do it."""

import math
from dataclasses import replace

import pytest
import torch

from quantcli.calibration.replay.cache import entering
from quantcli.checkpoint.roles import roles_of
from quantcli.core.errors import InputError
from quantcli.core.numerics import CACHES
from quantcli.schemes.arithmetic.cache import (
    LEAST,
    Magnitudes,
    absorbed_amax,
    paired,
    rounded,
    units_of,
)
from quantcli.schemes.arithmetic.observers import Observer
from quantcli.targets.kv_cache import attention_layers
from tests.replaying import CPU, Memory, Replayed, make_batches
from tests.tiny_models import make_tiny

FP8, HEADS, C8 = CACHES["fp8"], CACHES["fp8_per_head"], CACHES["c8"]
HYBRID = {"granitemoehybrid": 3, "qwen3_5_moe": 1}  # layers of attention among others
PLAIN = ["llama", "gemma2", "phi3", "qwen3_moe", *HYBRID, "llama4_text", "gemma4_text", "stablelm"]


def configured(checkpoint, **changes):
    return replace(checkpoint, config=checkpoint.config.with_values(**changes))


def layers_of(run, **changes):
    checkpoint = configured(run.skeleton.checkpoint, **changes)
    shapes = {name.removesuffix(".weight"): t.spec.shape for name, t in checkpoint.tensors.items()}
    return attention_layers(checkpoint, roles_of(checkpoint), shapes)


def through(run, enter):
    """Run all layers with `enter` at the cache; the logits."""
    layers = layers_of(run)
    for index, (name, _) in enumerate(run.skeleton.layers):
        after = Memory()
        with (
            run.skeleton.loaded(index, run.read, CPU) as layer,
            entering(name, layer, run.skeleton.segments(index), layers, enter),
        ):
            run.replay.run(index, layer, run.states, after.put)
        run.states = after
    return run.logits()


@pytest.mark.parametrize("family", PLAIN)
def test_every_attention_shows_what_it_caches_and_computes_the_same_bits(tmp_path, family):
    path, batches = make_tiny(tmp_path / "m", family), make_batches()
    before = Replayed(path, batches)
    before.layers()
    run, seen = Replayed(path, batches), {}

    def enter(layer, key, value):
        assert key.shape[:3] == value.shape[:3]
        seen.setdefault(
            layer, (key.shape[1], key.shape[1] * key.shape[3], value.shape[1] * value.shape[3])
        )
        return key, value

    same = [torch.equal(a, b) for a, b in zip(before.logits(), through(run, enter), strict=True)]
    assert all(same)
    layers = layers_of(run)
    assert len(layers) == HYBRID.get(family, len(run.skeleton.layers))
    assert seen == {name: (layer.heads, *layer.widths) for name, layer in layers.items()}


def test_keys_are_seen_after_their_rotation(tmp_path):
    """A token alone at the first position is not rotated; the same token later is, by its place."""
    path = make_tiny(tmp_path / "m", "llama")
    keys = []

    def enter(layer, key, value):
        keys.append(key)
        return key, value

    batches = make_batches(padded=False)[:1]
    batches[0].input_ids[:] = 7
    run = Replayed(path, batches, workers=1)
    through(run, enter)
    first = keys[0].float()
    assert not torch.allclose(first[:, :, 0], first[:, :, 5], atol=1e-3)
    norms = first.square().sum(-1)
    assert torch.allclose(norms[:, :, :1].expand_as(norms), norms, rtol=0.02)


def test_what_comes_out_of_the_cache_is_what_attention_reads(tmp_path):
    path, batches = make_tiny(tmp_path / "m", "llama"), make_batches(padded=False)
    plain = through(Replayed(path, batches), lambda layer, key, value: (key, value))
    zeros = through(Replayed(path, batches), lambda layer, key, value: (key, value * 0))
    assert not any(torch.equal(a, b) for a, b in zip(plain, zeros, strict=True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_encoder_decoder": True}, "has an encoder"),
        ({"architectures": ["BertModel"]}, "has an encoder"),
    ],
)
def test_models_without_a_cache_of_a_decoder(tmp_path, changes, said):
    run = Replayed(make_tiny(tmp_path / "m", "llama"), make_batches())
    with pytest.raises(InputError, match=said):
        layers_of(run, **changes)


def test_latents_are_seen_and_replaced(tmp_path):
    """One head of kv_lora_rank numbers; what comes back is what attention reads."""
    path, batches = make_tiny(tmp_path / "m", "deepseek_v3"), make_batches()
    before = Replayed(path, batches)
    before.layers()
    seen = {}

    def enter(layer, key, value):
        assert torch.equal(key, value)
        seen[layer] = (key.shape[0], *key.shape[1::2])
        return key, value

    run = Replayed(path, batches)
    after = through(run, enter)
    assert all(torch.equal(a, b) for a, b in zip(before.logits(), after, strict=True))
    layers = layers_of(run)
    assert set(seen) == set(layers)
    for layer in layers.values():
        assert (layer.heads, layer.widths, layer.queries) == (1, (16, 16), 4)
        assert seen[layer.name][1:] == (1, 16)
    zeros = through(Replayed(path, batches), lambda layer, key, value: (key * 0, value))
    assert not any(torch.equal(a, b) for a, b in zip(after, zeros, strict=True))


def test_latents_of_other_sizes_than_config_json_gives(tmp_path):
    run = Replayed(make_tiny(tmp_path / "m", "deepseek_v3"), make_batches())
    with pytest.raises(InputError, match=r"kv_b_proj \[128, 16\] is not of the sizes"):
        layers_of(run, v_head_dim=24)


def test_queries_that_meet_latents():
    """Of each head the plain part alone, times the rows of the weight that make keys."""
    draw = torch.Generator().manual_seed(3)
    queries = torch.randn(5, 2 * (4 + 3), generator=draw)
    weight = torch.randn(2 * (4 + 6), 8, generator=draw)
    expected = []
    for head in range(2):
        q, w = queries[:, head * 7 : head * 7 + 4], weight[head * 10 : head * 10 + 4]
        expected.append(float((q @ w).abs().max()))
    assert torch.allclose(absorbed_amax(queries, weight, 2, 4), torch.tensor(expected), rtol=1e-6)


def test_layers_that_share_a_cache_have_none(tmp_path):
    run = Replayed(make_tiny(tmp_path / "m", "llama"), make_batches())
    assert list(layers_of(run, num_kv_shared_layers=1)) == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]


@pytest.mark.parametrize(
    ("family", "changes", "module", "rows", "heads", "width"),
    [
        ("llama", {}, "self_attn.k_proj", 64, 4, 64),  # heads are of one size, their number differs
        ("llama", {"swa_num_key_value_heads": 8, "swa_head_dim": 8}, "self_attn.k_proj", 64, 8, 64),
        (
            "llama",
            {"num_global_key_value_heads": 1, "global_head_dim": 64},
            "self_attn.k_proj",
            64,
            1,
            64,
        ),
        ("llama", {"head_dim": None, "hidden_size": 60}, "self_attn.k_proj", 64, 2, 64),
        # Falcon says num_kv_heads 71 of a model whose queries share one head
        ("phi3", {"num_key_value_heads": 4}, "self_attn.qkv_proj", 96, 1, 16),
        ("phi3", {"num_key_value_heads": None}, "self_attn.qkv_proj", 192, 4, 64),
    ],
)
def test_heads_by_layer(tmp_path, family, changes, module, rows, heads, width):
    checkpoint = Replayed(make_tiny(tmp_path / "m", family), make_batches()).skeleton.checkpoint
    roles, shapes = roles_of(checkpoint), {n.removesuffix(".weight"): t.spec.shape
                                           for n, t in checkpoint.tensors.items()}  # fmt: skip
    checkpoint = configured(checkpoint, **changes)
    shapes[f"model.layers.1.{module}"] = (rows, 64)
    layer = attention_layers(checkpoint, roles, shapes)["model.layers.1.self_attn"]
    assert (layer.heads, layer.widths[0]) == (heads, width)


def test_rows_that_are_no_queries_keys_and_values(tmp_path):
    checkpoint = Replayed(make_tiny(tmp_path / "m", "phi3"), make_batches()).skeleton.checkpoint
    roles = roles_of(checkpoint)
    for rows in (100, 64, 32):
        shapes = {"model.layers.1.self_attn.qkv_proj": (rows, 64)}
        with pytest.raises(InputError, match="no number of heads"):
            attention_layers(checkpoint, roles, shapes)


# -- scales ------------------------------------------------------------------------------------------


def states(tokens=64, heads=2, width=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, heads, width, generator=draw)
    x[..., 3] *= 20  # an outlier channel
    return x.bfloat16()


def scales(x, cache, chosen_by="minmax", percent=99.99, dtype=torch.float32, parts=1):
    summary = Magnitudes(cache, counted=chosen_by != "minmax")
    observer = Observer(summary)
    for number, part in enumerate(x.chunk(parts)):
        observer.update(part, number)
    return summary.scales(chosen_by, percent, dtype)


@pytest.mark.parametrize(("cache", "dims"), [(FP8, (0, 1, 2)), (HEADS, (0, 2)), (C8, (0,))])
def test_the_range_is_that_of_each_unit(cache, dims):
    x = states()
    expected = x.float().abs().amax(dims).flatten() / cache.element.largest
    assert torch.equal(scales(x, cache), expected)
    assert torch.equal(scales(x, cache, parts=5), expected)


def test_scales_of_int8_are_numbers_of_the_serving_dtype_that_clip_nothing():
    x = states()
    found = scales(x, C8, dtype=torch.bfloat16)
    assert torch.equal(found, found.bfloat16().float())
    amax = x.float().abs().amax(0).flatten()
    assert bool((found * 127 >= amax).all())
    assert bool((found * 127 <= amax * 1.01).all())


@pytest.mark.parametrize("cache", [FP8, HEADS, C8])
@pytest.mark.parametrize("chosen_by", ["minmax", "percentile", "mse"])
def test_parts_and_their_order_change_nothing(cache, chosen_by):
    x = states(tokens=96)
    whole = scales(x, cache, chosen_by, 99.0)
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    assert torch.equal(scales(shuffled, cache, chosen_by, 99.0, parts=7), whole)


def test_a_percentile_leaves_out_the_largest():
    x = torch.ones(1000, 1, 1)
    x[0] = 100.0
    assert float(scales(x, FP8, "percentile", 99.5)) == float(torch.tensor(1.0) / 448)
    assert float(scales(x, FP8, "percentile", 100.0)) == float(torch.tensor(100.0) / 448)
    rare = torch.zeros(1000, 1, 1)
    rare[5] = 3.0
    assert float(scales(rare, FP8, "percentile", 99.5)) == float(
        torch.tensor(3.0) / 448
    )  # nearly all are 0


@pytest.mark.parametrize("cache", [FP8, HEADS, C8])
def test_the_scale_of_least_error_has_less_than_that_of_the_range(cache):
    x = states(tokens=20_000 if cache is C8 else 512)
    if cache is not C8:
        x[0, 0] = 90.0  # once
    units = units_of(x, cache)

    def error(scale):
        return float(
            (rounded(units.float(), scale.unsqueeze(-1), cache) - units.float()).square().sum()
        )

    least, whole = scales(x, cache, "mse"), scales(x, cache)
    assert error(least) < 0.995 * error(whole)


@pytest.mark.parametrize("cache", [FP8, C8])
@pytest.mark.parametrize("chosen_by", ["minmax", "percentile", "mse"])
def test_nothing_but_zeros_has_the_smallest_scale(cache, chosen_by):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = scales(torch.zeros(4, 2, 8, dtype=torch.bfloat16), cache, chosen_by, dtype=dtype)
        assert bool((found == LEAST[dtype]).all())
        assert bool(torch.isfinite(1 / found.to(dtype)).all())


def test_nan_and_inf_are_told():
    for value in (math.nan, math.inf):
        x = states()
        x[5, 1, 2] = value
        observer = Observer(Magnitudes(FP8, counted=True))
        observer.update(x, 0)
        assert not observer.finite


def test_pairs_of_rotated_channels_share_the_larger_scale():
    scale = torch.arange(1.0, 17.0)  # two heads of 8
    assert paired(scale, 2, 8).tolist() == [5, 6, 7, 8, 5, 6, 7, 8, 13, 14, 15, 16, 13, 14, 15, 16]
    assert paired(scale, 2, 4).tolist() == [3, 4, 3, 4, 5, 6, 7, 8, 11, 12, 11, 12, 13, 14, 15, 16]


# -- what comes out ------------------------------------------------------------------------------------


def test_fp8_clips_and_rounds_to_codes():
    x = torch.tensor([0.0, 1.0, 1.04, 1.07, 500.0, -1e9, 2.0**-9, 2.0**-11])
    out = rounded(x, torch.ones(1), FP8)
    assert out.tolist() == [0.0, 1.0, 1.0, 1.125, 448.0, -448.0, 2.0**-9, 0.0]
    assert rounded(x * 0.5, torch.full((1,), 0.5), FP8).tolist() == (out * 0.5).tolist()


def test_int8_is_computed_in_the_serving_dtype():
    """x * (1 / s), with 1 / s and the product rounded to bfloat16 each, as the engine's Python does."""
    scale = torch.tensor([0.0199, 0.37, 1.0]).bfloat16()
    x = torch.tensor([[1.234, -20.0, 300.0], [0.009, 3.3, -1e4]])
    codes = [[int(max(-128, min(127, round(float(
        (torch.tensor(v).bfloat16() * (torch.tensor(1.0).bfloat16() / s)).bfloat16()))))) 
        for v, s in zip(row, scale, strict=True)] for row in x.tolist()]  # fmt: skip
    expected = (torch.tensor(codes).bfloat16() * scale).float()
    assert torch.equal(rounded(x, scale, C8), expected)
