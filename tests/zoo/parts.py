"""What entries of the zoo are made of: sizes that many families share.

Hidden size, widths of MLPs and of experts, and twice these are all different, so that a matrix that is
turned over or cut in the wrong place has a wrong shape. All are multiples of 128, for tiles and groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VOCABULARY, HIDDEN, WIDTH, EXPERT_WIDTH, EXPERTS = 512, 256, 384, 128, 4


@dataclass(frozen=True)
class Family:
    """A model that transformers writes: its config class, what that is given, and its model class.

    model: None for the class that transformers has for the config, see `judge.class_of`.
    """

    config: str
    table: dict[str, Any]
    model: str | None = None


TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, **TOKENS,
}  # fmt: skip


def text(*parts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A decoder's config: BASE, then the parts, then the changes."""
    table = dict(BASE)
    for part in (*parts, changes):
        table |= part
    return table


HEADS = {"head_dim": 64}
SLIDING = {"sliding_window": 64}
MIXED = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], **SLIDING}
MOE = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_WIDTH}
LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2,
          "moe_intermediate_size": EXPERT_WIDTH}  # fmt: skip
GROUPED = ROUTED | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_rope_head_dim": 32,
          "qk_nope_head_dim": 64, "v_head_dim": 64}  # fmt: skip
INDEXER = {"index_n_heads": 2, "index_head_dim": 64, "index_topk": 32}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64,
          "linear_value_head_dim": 64, "num_hidden_layers": 4}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_n_groups": 1}
MROPE = {"rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [8, 12, 12],
                          "rope_theta": 10000.0}}  # fmt: skip
IMAGES = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502,
          "vision_end_token_id": 503}  # fmt: skip
VISION = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
          "num_attention_heads": 4, "image_size": 28, "patch_size": 14}  # fmt: skip
QWEN2_VISION = {"depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4,
                "out_hidden_size": HIDDEN, "patch_size": 14, "fullatt_block_indexes": [1]}  # fmt: skip
QWEN3_VISION = {"depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4,
                "out_hidden_size": HIDDEN, "patch_size": 16, "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0]}  # fmt: skip
GLM_VISION = {"depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4,
              "out_hidden_size": HIDDEN, "patch_size": 14, "image_size": 28}  # fmt: skip
# encoders and encoder-decoders, whose configs have names of their own
ENCODER = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": WIDTH,
           "num_hidden_layers": 3, "num_attention_heads": 4,
           "max_position_embeddings": 512}  # fmt: skip
STACKS = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2,
          "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": WIDTH,
          "decoder_ffn_dim": WIDTH, "max_position_embeddings": 512, "decoder_start_token_id": 0,
          **TOKENS}  # fmt: skip
