"""Models with towers: images, video, speech."""

from __future__ import annotations

from typing import Any

from tests.zoo.parts import (
    BASE,
    EXPERT_WIDTH,
    EXPERTS,
    GLM_VISION,
    GROUPED,
    HEADS,
    HIDDEN,
    IMAGES,
    LATENT,
    LINEAR,
    MOE,
    MROPE,
    QWEN2_VISION,
    QWEN3_VISION,
    ROUTED,
    SLIDING,
    VISION,
    VOCABULARY,
    WIDTH,
    Family,
    text,
)

_LLAMA = {"model_type": "llama", **BASE}
_QWEN = {"model_type": "qwen2", **BASE}
_CLIP = {"model_type": "clip_vision_model", "projection_dim": 64, **VISION}
_SIGLIP = {"model_type": "siglip_vision_model", **VISION}
_IMAGE = {"image_token_index": 500}
_EYE3_5 = QWEN3_VISION | {"deepstack_visual_indexes": []}
_IMAGE_ID = {"image_token_id": 500}
_SHARED = {"shared_expert_intermediate_size": EXPERT_WIDTH}
_ROPE = {"rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [4, 6, 6],
                          "rope_theta": 10000.0}}  # fmt: skip
_GEMMA4_VISION = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}  # fmt: skip
_GEMMA4_IDS = {
    "image_token_id": 500,
    "video_token_id": 501,
    "audio_token_id": 502,
    "audio_config": None,
}
_GEMMA4 = {"global_head_dim": 64, "num_hidden_layers": 4, "sliding_window": 64,
           "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
_AUDIO: dict[str, Any] = {"d_model": 128, "encoder_layers": 2, "encoder_attention_heads": 4,
                          "encoder_ffn_dim": 256, "num_mel_bins": 80}  # fmt: skip

MULTIMODAL: dict[str, Family] = {
    "qwen2_vl": Family("Qwen2VLConfig", {
        "text_config": text(MROPE), **IMAGES,
        "vision_config": {"depth": 2, "embed_dim": 128, "hidden_size": HIDDEN, "num_heads": 4,
                          "mlp_ratio": 2, "patch_size": 14}}),
    "qwen2_5_vl": Family("Qwen2_5_VLConfig", {
        "text_config": text(MROPE), "vision_config": QWEN2_VISION, **IMAGES}),
    "qwen3_vl": Family("Qwen3VLConfig", {
        "text_config": text(HEADS, MROPE), "vision_config": QWEN3_VISION, **IMAGES}),
    "qwen3_vl_moe": Family("Qwen3VLMoeConfig", {
        "text_config": text(HEADS, MOE, MROPE, norm_topk_prob=True), **IMAGES,
        "vision_config": QWEN3_VISION}),
    "qwen3_5": Family("Qwen3_5Config", {
        "text_config": text(HEADS, LINEAR), "vision_config": _EYE3_5, **IMAGES}),
    "qwen3_5_moe": Family("Qwen3_5MoeConfig", {
        "text_config": text(MOE, HEADS, _SHARED, LINEAR), "vision_config": _EYE3_5, **IMAGES}),
    "gemma3_mm": Family("Gemma3Config", {
        "text_config": text(HEADS, SLIDING), "vision_config": VISION, "mm_tokens_per_image": 4,
        "image_token_index": 500, "boi_token_index": 501, "eoi_token_index": 502}),
    "gemma4": Family("Gemma4Config", {
        "text_config": text(
            HEADS, _GEMMA4, num_hidden_layers=6,
            layer_types=["sliding_attention", "full_attention"] * 3,
            vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=32,
            num_kv_shared_layers=2),
        "vision_config": _GEMMA4_VISION, **_GEMMA4_IDS}),
    "gemma4_moe": Family("Gemma4Config", {
        "text_config": text(
            HEADS, _GEMMA4, hidden_size_per_layer_input=0, num_kv_shared_layers=0,
            enable_moe_block=True, num_experts=EXPERTS, top_k_experts=2,
            moe_intermediate_size=EXPERT_WIDTH),
        "vision_config": _GEMMA4_VISION, **_GEMMA4_IDS}),
    "llava": Family("LlavaConfig", {"text_config": _LLAMA, "vision_config": _CLIP, **_IMAGE}),
    "llava_next": Family("LlavaNextConfig", {
        "text_config": _LLAMA, "vision_config": _CLIP, **_IMAGE,
        "image_grid_pinpoints": [[28, 56]]}),
    "llava_onevision": Family("LlavaOnevisionConfig", {
        "text_config": _QWEN, "vision_config": _SIGLIP, **_IMAGE, "video_token_index": 501}),
    "llama4": Family("Llama4Config", {
        "text_config": text(
            HEADS, num_local_experts=EXPERTS, num_experts_per_tok=1, intermediate_size=EXPERT_WIDTH,
            intermediate_size_mlp=WIDTH, interleave_moe_layer_step=1),
        "vision_config": VISION | {"intermediate_size": 512, "vision_output_dim": 128,
                                   "projector_input_dim": 128, "projector_output_dim": 128},
        **_IMAGE}),
    "mllama": Family("MllamaConfig", {
        "text_config": text(cross_attention_layers=[1], num_hidden_layers=3),
        "vision_config": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
                          "num_global_layers": 1, "attention_heads": 4, "image_size": 28,
                          "patch_size": 14, "vision_output_dim": 256,
                          "intermediate_layers_indices": [0]}, **_IMAGE}),
    "mistral3": Family("Mistral3Config", {
        "text_config": {"model_type": "mistral", **text(HEADS)}, **_IMAGE,
        "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 32}}),
    "ministral3": Family("Mistral3Config", {
        "text_config": {"model_type": "ministral3", **text(HEADS)}, **_IMAGE,
        "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 32}}),
    "pixtral": Family("LlavaConfig", {
        "text_config": {"model_type": "mistral", **text(HEADS)}, **_IMAGE,
        "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 32}}),
    "glm4v": Family("Glm4vConfig", {
        "text_config": text(HEADS, MROPE), "vision_config": GLM_VISION, **IMAGES}),
    "glm4_5v": Family("Glm4vMoeConfig", {
        "text_config": text(GROUPED, HEADS, _ROPE, n_group=1), "vision_config": GLM_VISION, **IMAGES}),
    "kimi_k25": Family("Kimi_K25Config", {
        "text_config": {"model_type": "deepseek_v3", **text(GROUPED, LATENT)},
        "vision_config": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
                          "num_attention_heads": 4}}),
    "internvl": Family("InternVLConfig", {
        "text_config": _QWEN, **_IMAGE_ID,
        "vision_config": VISION | {"image_size": [28, 28], "patch_size": [14, 14]}}),
    "idefics3": Family("Idefics3Config", {
        "text_config": _LLAMA, "vision_config": VISION, **_IMAGE_ID}),
    "smolvlm": Family("SmolVLMConfig", {
        "text_config": _LLAMA, "vision_config": VISION, **_IMAGE_ID}),
    "paligemma": Family("PaliGemmaConfig", {
        "text_config": {"model_type": "gemma", **text(HEADS)}, "projection_dim": HIDDEN,
        "vision_config": _SIGLIP, **_IMAGE}),
    "aya_vision": Family("AyaVisionConfig", {
        "text_config": {"model_type": "cohere2", **text(HEADS, SLIDING)}, "vision_config": _SIGLIP,
        **_IMAGE}),
    "cohere2_vision": Family("Cohere2VisionConfig", {
        "text_config": {"model_type": "cohere2", **text(HEADS, SLIDING)}, "vision_config": _SIGLIP,
        "alignment_intermediate_size": 256}),
    "lfm2_vl": Family("Lfm2VlConfig", {
        "text_config": {"model_type": "lfm2", **text(
            layer_types=["conv", "conv", "full_attention"], block_auto_adjust_ff_dim=False)},
        "vision_config": {"model_type": "siglip2_vision_model", "hidden_size": 128,
                          "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "num_patches": 16, "patch_size": 14}, **_IMAGE_ID}),
    "ovis2": Family("Ovis2Config", {
        "text_config": _QWEN, "vision_config": VISION | {"vocab_size": 64, "hidden_stride": 1},
        "hidden_size": HIDDEN, **_IMAGE_ID, "visual_indicator_token_ids": [504, 505, 506, 507, 508]}),
    "got_ocr2": Family("GotOcr2Config", {
        "text_config": _QWEN, **_IMAGE,
        "vision_config": {"hidden_size": 128, "output_channels": 64, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "image_size": 64, "patch_size": 16, "mlp_dim": 256,
                          "global_attn_indexes": [1], "window_size": 2}}),
    "aria": Family("AriaConfig", {
        "text_config": text(moe_num_experts=EXPERTS, moe_topk=2), **_IMAGE,
        "vision_config": {"model_type": "idefics3_vision", **VISION},
        "projector_patch_to_query_dict": {4: 4}}),
    "ernie4_5_vl_moe": Family("Ernie4_5_VLMoeConfig", {
        "text_config": text(
            HEADS, moe_num_experts=EXPERTS, moe_k=2, moe_intermediate_size=[EXPERT_WIDTH, 64],
            moe_num_shared_experts=1, rope_scaling={"rope_type": "default", "rope_theta": 10000.0,
                                                    "mrope_section": [12, 12, 8]}),
        "vision_config": {"depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4,
                          "patch_size": 14}, "image_token_id": 500, "video_token_id": 501}),
    "step3p7": Family("Step3p7Config", {
        "text_config": text(ROUTED, HEADS, SLIDING, share_expert_dim=EXPERT_WIDTH,
                            mlp_layer_types=["sparse"] * 3),
        "vision_config": {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
                          "image_size": 28, "patch_size": 14, "mlp_ratio": 2.0,
                          "max_position_embeddings": 4}}),
    "phi4_multimodal": Family("Phi4MultimodalConfig", text(
        vision_config=VISION, image_token_id=500, audio_token_id=501,
        audio_config={"hidden_size": 128, "intermediate_size": 256, "num_blocks": 2,
                      "num_attention_heads": 4, "nemo_conv_channels": 64, "input_size": 80})),
    "qwen2_audio": Family("Qwen2AudioConfig", {
        "text_config": _QWEN, "audio_config": {"model_type": "qwen2_audio_encoder", **_AUDIO},
        "audio_token_index": 500}),
    "voxtral": Family("VoxtralConfig", {
        "text_config": _LLAMA, "audio_token_id": 500,
        "audio_config": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_mel_bins": 80}}),
    "granite_speech": Family("GraniteSpeechConfig", {
        "text_config": {"model_type": "granite", **BASE}, "audio_token_index": 500,
        "encoder_config": {"hidden_dim": 128, "num_layers": 2, "num_heads": 4, "dim_head": 32,
                           "input_dim": 80, "output_dim": 64},
        "projector_config": {"model_type": "blip_2_qformer", "hidden_size": 128, "num_hidden_layers": 1,
                             "num_attention_heads": 4, "intermediate_size": 256,
                             "encoder_hidden_size": 128}, "has_lora_adapter": False}),
}  # fmt: skip
