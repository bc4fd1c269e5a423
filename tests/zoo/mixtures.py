"""Mixtures of experts: one matrix per expert, or stacks of them."""

from __future__ import annotations

from tests.zoo.parts import (
    EXPERT_WIDTH,
    EXPERTS,
    GROUPED,
    HEADS,
    HIDDEN,
    INDEXER,
    LATENT,
    LINEAR,
    LOCAL,
    MAMBA,
    MIXED,
    MOE,
    ROUTED,
    SLIDING,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Family,
    text,
)

_SHARED = {"shared_expert_intermediate_size": EXPERT_WIDTH}
_GRANITE_TYPES = ["mamba", "mamba", "attention"]
_SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_FULL = {"layer_types": ["full_attention"] * 3}

MIXTURES: dict[str, Family] = {
    "mixtral": Family("MixtralConfig", text(LOCAL)),
    "qwen2_moe": Family("Qwen2MoeConfig", text(MOE, _SHARED)),
    "qwen3_moe": Family("Qwen3MoeConfig", text(MOE, HEADS)),
    "qwen3_next": Family("Qwen3NextConfig", text(MOE, HEADS, _SHARED, LINEAR)),
    "qwen3_5_moe_text": Family("Qwen3_5MoeTextConfig", text(MOE, HEADS, _SHARED, LINEAR)),
    "qwen4_exp_text": Family("Qwen4ExpTextConfig", text(
        MOE, HEADS, _SHARED, LINEAR, hc_lowrank=32, ple_layer_ids=[], ple_embed_dim=64,
        ngram_vocab_size_base=997, make_ngram_vocab_size_divisible_by=8, split_ngram_parts=1,
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=64, indexer_budget=32,
        indexer_compress_ratio=1)),
    "deepseek_v2": Family("DeepseekV2Config", text(GROUPED, LATENT, n_group=1)),
    "deepseek_v2_lite": Family("DeepseekV2Config", text(GROUPED, LATENT, n_group=1, q_lora_rank=None)),
    "deepseek_v3": Family("DeepseekV3Config", text(GROUPED, LATENT, topk_method="noaux_tc")),
    "deepseek_v32": Family("DeepseekV32Config", text(GROUPED, LATENT, INDEXER)),
    "deepseek_v4": Family("DeepseekV4Config", text(
        ROUTED, HEADS, num_key_value_heads=1, q_lora_rank=128)),
    "glm4_moe": Family("Glm4MoeConfig", text(GROUPED, HEADS, n_group=1)),
    "glm4_moe_lite": Family("Glm4MoeLiteConfig", text(GROUPED, LATENT)),
    "glm5_dsa": Family("GlmMoeDsaConfig", text(GROUPED, LATENT, INDEXER)),
    "minimax": Family("MiniMaxConfig", text(
        LOCAL, HEADS, layer_types=["linear_attention", "linear_attention", "full_attention"])),
    "minimax_m2": Family("MiniMaxM2Config", text(
        LOCAL, HEADS, rotary_dim=32, scoring_func="sigmoid", use_routing_bias=True)),
    "minimax_m3_text": Family("MiniMaxM3VLTextConfig", text(
        LOCAL, HEADS, _SPARSE, _FULL, dense_intermediate_size=WIDTH, intermediate_size=EXPERT_WIDTH,
        shared_intermediate_size=EXPERT_WIDTH, rotary_dim=32, index_n_heads=2, index_head_dim=64)),
    "gpt_oss": Family("GptOssConfig", text(LOCAL, HEADS, SLIDING)),
    "jamba": Family("JambaConfig", text(
        MOE, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        mamba_d_state=16, mamba_dt_rank=16, use_mamba_kernels=False)),
    "olmoe": Family("OlmoeConfig", text(num_experts=EXPERTS, num_experts_per_tok=2)),
    "flex_olmo": Family("FlexOlmoConfig", text(num_experts=EXPERTS, num_experts_per_tok=2)),
    "phimoe": Family("PhimoeConfig", text(LOCAL)),
    "dbrx": Family("DbrxConfig", {
        "vocab_size": VOCABULARY, "d_model": HIDDEN, "n_heads": 4, "n_layers": 2, "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": WIDTH, "moe_num_experts": EXPERTS, "moe_top_k": 2,
                       "hidden_size": HIDDEN}, **TOKENS}),
    "ernie4_5_moe": Family("Ernie4_5_MoeConfig", text(
        HEADS, moe_num_experts=EXPERTS, moe_k=2, moe_intermediate_size=EXPERT_WIDTH,
        moe_num_shared_experts=1)),
    "hunyuan_moe": Family("HunYuanMoEV1Config", text(HEADS, num_experts=EXPERTS, moe_topk=2)),
    "jetmoe": Family("JetMoeConfig", text(LOCAL, kv_channels=64, num_key_value_heads=2)),
    "exaone_moe": Family("ExaoneMoeConfig", text(MOE, HEADS, SLIDING, num_hidden_layers=4)),
    "granitemoe": Family("GraniteMoeConfig", text(LOCAL)),
    "granitemoeshared": Family("GraniteMoeSharedConfig", text(LOCAL, shared_intermediate_size=512)),
    "granitemoe_swa": Family("GraniteMoeSWAConfig", text(LOCAL, SLIDING)),
    "granite4_hybrid": Family("GraniteMoeHybridConfig", text(
        LOCAL, MAMBA, shared_intermediate_size=512, layer_types=_GRANITE_TYPES,
        layers_block_type=_GRANITE_TYPES, position_embedding_type="nope", tie_word_embeddings=True)),
    "afmoe": Family("AfmoeConfig", text(
        MOE, HEADS, MIXED, num_shared_experts=1, num_dense_layers=1, score_func="sigmoid")),
    "dots1": Family("Dots1Config", text(GROUPED, HEADS, n_group=1, **SLIDING)),
    "lfm2_moe": Family("Lfm2MoeConfig", text(
        MOE, layer_types=["conv", "conv", "full_attention"], num_dense_layers=1)),
    "longcat_flash": Family("LongcatFlashConfig", text(
        LATENT, num_layers=2, num_hidden_layers=4, ffn_hidden_size=WIDTH, head_dim=32, moe_topk=2,
        n_routed_experts=EXPERTS, zero_expert_num=0, expert_ffn_hidden_size=EXPERT_WIDTH,
        mla_scale_q_lora=True, mla_scale_kv_lora=True)),
    "hy_v3": Family("HYV3Config", text(MOE, HEADS, _SPARSE, num_shared_experts=1)),
    "hy_v4": Family("HYV4Config", text(
        ROUTED, LATENT, INDEXER, _SPARSE, head_dim=96, hc_mult=2)),
    "mistral4": Family("Mistral4Config", text(GROUPED, LATENT, n_group=1)),
    "zaya": Family("ZayaConfig", text(
        HEADS, num_experts=EXPERTS, moe_intermediate_size=EXPERT_WIDTH, router_hidden_size=64)),
    "cohere2_moe": Family("Cohere2MoeConfig", text(
        HEADS, SLIDING, num_experts=EXPERTS, num_experts_per_tok=2)),
    "mimo_v2_flash": Family("MiMoV2FlashConfig", text(
        ROUTED, SLIDING, _SPARSE, head_dim=64, v_head_dim=64)),
    "solar_open": Family("SolarOpenConfig", text(ROUTED, HEADS)),
    "kimi_linear": Family("KimiLinearConfig", text(
        LATENT, LOCAL, n_shared_experts=1, moe_intermediate_size=EXPERT_WIDTH, q_lora_rank=None,
        linear_head_dim=64, linear_num_heads=4, mlp_layer_types=["dense", "sparse", "sparse"],
        layer_types=["linear_attention", "linear_attention", "full_attention"])),
    "bailing_hybrid": Family("BailingHybridConfig", text(
        LATENT, LOCAL, n_shared_experts=1, moe_intermediate_size=EXPERT_WIDTH, n_group=2, topk_group=1,
        first_k_dense_replace=1, head_dim=64, layer_group_size=3)),
    "laguna": Family("LagunaConfig", text(MOE, HEADS, _SHARED, **SLIDING)),
    "axk1": Family("AXK1Config", text(GROUPED, LATENT, _SPARSE)),
    "aria_text": Family("AriaTextConfig", text(moe_num_experts=EXPERTS, moe_topk=2)),
    "llama4_text": Family("Llama4TextConfig", text(
        HEADS, num_local_experts=EXPERTS, num_experts_per_tok=1, intermediate_size=EXPERT_WIDTH,
        intermediate_size_mlp=WIDTH, interleave_moe_layer_step=1)),
    "nemotron_h_moe": Family("NemotronHConfig", text(
        ROUTED, HEADS, num_hidden_layers=4, mamba_num_heads=8, mamba_head_dim=64, ssm_state_size=16,
        n_groups=1, layers_block_type=["mamba", "moe", "attention", "moe"],
        moe_shared_expert_intermediate_size=EXPERT_WIDTH)),
    "privacy_filter": Family("OpenAIPrivacyFilterConfig", text(LOCAL, HEADS, SLIDING)),
    "inkling_text": Family("InklingTextConfig", text(
        HEADS, n_routed_experts=EXPERTS, num_experts_per_tok=2, n_shared_experts=1,
        moe_intermediate_size=EXPERT_WIDTH, swa_num_attention_heads=4, swa_num_key_value_heads=2,
        swa_head_dim=64, sliding_window_size=64, d_rel=16, rel_extent=32)),
    "switch_transformers": Family("SwitchTransformersConfig", {
        "vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 64, "d_ff": WIDTH, "num_layers": 2,
        "num_sparse_encoder_layers": 1, "num_decoder_layers": 2, "num_sparse_decoder_layers": 1,
        "num_heads": 4, "num_experts": EXPERTS, "decoder_start_token_id": 0, **TOKENS}),
    "nllb_moe": Family("NllbMoeConfig", {
        "vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": WIDTH,
        "decoder_ffn_dim": WIDTH, "encoder_sparse_step": 2, "decoder_sparse_step": 2,
        "num_experts": EXPERTS, "max_position_embeddings": 512, **TOKENS}),
}  # fmt: skip
