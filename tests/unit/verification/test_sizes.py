"""Heads in config.json against the projections of attention: no alarm for attention of other kinds."""

from types import SimpleNamespace

import pytest

from quantcli.checkpoint.config.settings import Settings
from quantcli.verification.sizes import check_sizes

HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
PLAIN = {"q": (128, 64), "k": (64, 64), "v": (64, 64), "o": (64, 128)}


def findings(config, shapes, stack="model.layers.0"):
    tensors = {
        f"{stack}.self_attn.{name}_proj.weight": SimpleNamespace(
            spec=SimpleNamespace(shape=shape, dtype="BF16")
        )
        for name, shape in shapes.items()
    }
    checkpoint = SimpleNamespace(text_config=Settings(config), tensors=tensors, problems=[])
    model = SimpleNamespace(checkpoint=checkpoint, modules={}, unchecked={})
    return [f.what for f in check_sizes(model)]


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        (HEADS, PLAIN),
        ({**HEADS, "head_dim": None, "hidden_size": 128}, PLAIN),
        ({**HEADS, "model_type": "qwen3_next"}, PLAIN | {"q": (256, 64)}),
        ({**HEADS, "attn_output_gate": True}, PLAIN | {"q": (256, 64)}),
        ({**HEADS, "kv_lora_rank": 16}, {"q": (192, 64), "o": (64, 96)}),
        ({**HEADS, "v_head_dim": 16}, PLAIN | {"v": (32, 64), "o": (64, 64)}),
        ({"hidden_size": 64}, PLAIN),
    ],
)
def test_sound(config, shapes):
    assert findings(config, shapes) == []


def test_heads_of_another_tower_are_not_those_of_the_text():
    towers = dict.fromkeys("qkvo", (48, 48))
    assert findings(HEADS, towers, "model.vision_tower.layers.0") == []
    assert findings(HEADS, towers, "model.encoder.layers.0") == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q": (256, 64)}, "it makes `model.layers.0.self_attn.q_proj` 128 rows; it has 256"),
        ({"k": (128, 64)}, "it makes `model.layers.0.self_attn.k_proj` 64 rows; it has 128"),
        ({"v": (32, 64)}, "it makes `model.layers.0.self_attn.v_proj` 64 rows; it has 32"),
        ({"o": (64, 64)}, "it makes `model.layers.0.self_attn.o_proj` 128 columns; it has 64"),
    ],
)
def test_other_heads(change, said):
    assert findings(HEADS, PLAIN | change) == [said]
