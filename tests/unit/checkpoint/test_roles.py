"""The role of each matrix of a model, by layouts of several families."""

import json

import pytest

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.roles import BODY, LINEAR, MEANINGS, ROLES, roles_of
from tests.builders import tensor, write_safetensors

H, N, V = 64, 96, 200
CONFIG = {"hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V}
MIXTURE = {**CONFIG, "num_experts": 20}


def layers(name):
    return (0, 1) if "{i}" in name else (0,)


def roles(tmp_path, config, shapes):
    """The role of each module; shapes by name, those in `{i}` for both layers."""
    names = {name.format(i=i): shape for name, shape in shapes.items() for i in layers(name)}
    table = {
        name if name.endswith("!") else f"{name}.weight": tensor("BF16", *shape)
        for name, shape in names.items()
    }
    table = {name.removesuffix("!"): value for name, value in table.items()}
    write_safetensors(tmp_path / "model.safetensors", table)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return roles_of(open_checkpoint(tmp_path))


def test_every_role_is_explained():
    assert list(MEANINGS) == list(ROLES)
    assert BODY < LINEAR == set(ROLES) - {"router", "embedding"}


CASES = {
    "names that no other family has": (
        CONFIG,
        {
            "net.blocks.{i}.attention.mix": ((H * 3, H), "attention"),
            "net.blocks.{i}.attention.back": ((H, 2 * H), "attention.out"),
            "net.blocks.{i}.ff.a": ((N, H), "mlp"),
            "net.blocks.{i}.ff.b": ((H, N), "mlp.out"),
            "net.tok_embeddings": ((V, H), "embedding"),
            "net.lm_head": ((V, H), "head"),
        },
    ),
    "square matrices": (
        CONFIG,
        {
            "model.layers.{i}.self_attn.q_proj": ((H, H), "attention"),
            "model.layers.{i}.self_attn.out_proj": ((H, H), "attention.out"),
            "model.layers.{i}.feed_forward.w1": ((H, H), "mlp"),
            "model.layers.{i}.feed_forward.w2": ((H, H), "mlp.out"),
        },
    ),
    "a mixture": (
        MIXTURE,
        {
            "model.layers.{i}.mlp.experts.0.w1": ((N, H), "expert"),
            "model.layers.{i}.mlp.choice": ((20, H), "router"),
            "model.layers.{i}.mlp.gate": ((20, H), "router"),
            "model.layers.{i}.mlp.shared_expert_gate": ((1, H), "router"),
            "model.layers.{i}.mlp.shared_expert.up_proj": ((N, H), "shared_expert"),
            "model.layers.{i}.self_attn.gate": ((H, H), "attention"),
        },
    ),
    "adapters": (
        CONFIG,
        {
            "model.layers.{i}.self_attn.o_proj.base_layer": ((H, H), "attention.out"),
            "model.layers.{i}.self_attn.o_proj.lora_A.vision": ((32, H), "other"),
            "model.layers.{i}.self_attn.o_proj.lora_B.vision": ((H, 32), "other"),
        },
    ),
    "a shared MLP without experts": (
        CONFIG,
        {"model.layers.{i}.shared_mlp.input_linear": ((N, H), "mlp")},
    ),
    "stacked experts": (
        MIXTURE,
        {"model.layers.{i}.mlp.experts.gate_up_proj!": ((20, N, H), "expert")},
    ),
    "a recurrent mixer": (
        {**CONFIG, "linear_num_value_heads": 24},
        {
            "model.layers.{i}.mixer.A_log!": ((24,), None),
            "model.layers.{i}.mixer.in_proj": ((N, H), "ssm"),
            "model.layers.{i}.mixer.in_proj_ba": ((48, H), "router"),
            "model.layers.{i}.other.in_proj": ((N, H), "mlp"),
        },
    ),
    "a short convolution": (
        CONFIG,
        {
            "model.layers.{i}.conv.conv": ((H, 1, 3), None),
            "model.layers.{i}.conv.in_proj": ((3 * H, H), "ssm"),
        },
    ),
    "draft layers at the end": (
        {**CONFIG, "num_hidden_layers": 1, "num_nextn_predict_layers": 1},
        {
            "model.layers.0.mlp.up_proj": ((N, H), "mlp"),
            "model.layers.1.mlp.up_proj": ((N, H), "mtp"),
            "model.layers.1.eh_proj": ((H, 2 * H), "mtp"),
            "model.layers.1.embed_tokens": ((V, H), "embedding"),
            "model.layers.1.shared_head.head": ((V, H), "head"),
        },
    ),
    "draft layers apart": (
        CONFIG,
        {
            "model.layers.{i}.mlp.up_proj": ((N, H), "mlp"),
            "mtp.layers.0.mlp.up_proj": ((N, H), "mtp"),
            "mtp.fc": ((H, 2 * H), "mtp"),
        },
    ),
    "models next to the language model": (
        {"text_config": CONFIG, "vision_config": {}, "ear_config": {}},
        {
            "model.layers.{i}.mlp.up_proj": ((N, H), "mlp"),
            "ear.layers.{i}.mlp.up_proj": ((N, H), "tower"),  # as many layers, as wide
            "model.visual.blocks.{i}.mlp.up_proj": ((N, H), "tower"),
            "bridge.0": ((H, H), "tower"),
        },
    ),
    "a thinker and a talker": (
        {"thinker_config": {"text_config": CONFIG, "audio_config": {}}, "talker_config": CONFIG},
        {
            "thinker.model.layers.{i}.mlp.up_proj": ((N, H), "mlp"),
            "talker.model.layers.{i}.mlp.up_proj": ((N, H), "tower"),
        },
    ),
    "two stacks": (
        {"d_model": H, "num_layers": 2, "num_decoder_layers": 1, "is_encoder_decoder": True},
        {
            "encoder.block.{i}.layer.0.SelfAttention.q": ((H, H), "attention"),
            "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias": ((32, 4), "embedding"),
            "decoder.block.0.layer.1.EncDecAttention.o": ((H, H), "attention.out"),
            "decoder.block.0.layer.2.DenseReluDense.wo": ((H, N), "mlp.out"),
            "shared": ((V, H), "embedding"),
        },
    ),
    "a classifier": (
        CONFIG,
        {
            "model.layers.{i}.mlp.up_proj": ((N, H), "mlp"),
            "score.0": ((H, H), "head"),
            "pooler.dense": ((H, H), "head"),
        },
    ),
    "no config": ({}, {"model.layers.{i}.mlp.up_proj": ((N, H), "mlp"), "lm_head": ((V, H), "head")}),
}


@pytest.mark.parametrize("case", CASES)
def test_roles(tmp_path, case):
    config, table = CASES[case]
    found = roles(tmp_path, config, {name: shape for name, (shape, _) in table.items()})
    expected = {
        name.format(i=i).removesuffix("!"): role
        for name, (_, role) in table.items()
        for i in layers(name)
        if role
    }
    assert found == expected


@pytest.mark.parametrize("odd", [[4], None, 0])
def test_a_config_that_says_little(tmp_path, odd):
    config = {"hidden_size": odd, "num_hidden_layers": odd, "num_experts": odd, "text_config": None}
    shapes = {"model.layers.{i}.mlp.up_proj": (N, H)}
    assert set(roles(tmp_path, config, shapes).values()) == {"mlp"}
