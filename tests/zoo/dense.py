"""Decoders without experts: attention, state spaces, convolutions and mixtures of these."""

from __future__ import annotations

from tests.zoo.parts import (
    BASE,
    HEADS,
    HIDDEN,
    LATENT,
    LINEAR,
    MAMBA,
    MIXED,
    SLIDING,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Family,
    text,
)

_TIED = {"tie_word_embeddings": True}
_ATTENTION = ["attention"] * 3
_OPENAI = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 512,
           **TOKENS}  # fmt: skip

DENSE: dict[str, Family] = {
    "llama": Family("LlamaConfig", BASE),
    "llama_tied": Family("LlamaConfig", text(_TIED)),
    "llama_bias": Family("LlamaConfig", text(attention_bias=True, mlp_bias=True)),
    "llama_odd": Family("LlamaConfig", text(hidden_size=192, intermediate_size=320)),
    "qwen2": Family("Qwen2Config", BASE),
    "qwen3": Family("Qwen3Config", text(HEADS)),
    "qwen3_5_text": Family("Qwen3_5TextConfig", text(HEADS, LINEAR)),
    "mistral": Family("MistralConfig", text(HEADS)),
    "ministral": Family("MinistralConfig", text(HEADS, SLIDING)),
    "ministral3_text": Family("Ministral3Config", text(HEADS)),
    "gemma": Family("GemmaConfig", text(HEADS)),
    "gemma2": Family("Gemma2Config", text(HEADS, SLIDING)),
    "gemma3_text": Family("Gemma3TextConfig", text(HEADS, SLIDING)),
    "gemma3n_text": Family("Gemma3nTextConfig", text(
        HEADS, SLIDING, num_hidden_layers=4, vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=32, num_kv_shared_layers=1, laurel_rank=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4)),
    "vaultgemma": Family("VaultGemmaConfig", text(HEADS, SLIDING)),
    "phi": Family("PhiConfig", BASE),
    "phi3": Family("Phi3Config", BASE),
    "olmo": Family("OlmoConfig", BASE),
    "olmo2": Family("Olmo2Config", BASE),
    "olmo3": Family("Olmo3Config", text(SLIDING)),
    "granite": Family("GraniteConfig", BASE),
    "granite4_dense": Family("GraniteMoeHybridConfig", text(
        _TIED, num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=WIDTH,
        layer_types=_ATTENTION, layers_block_type=_ATTENTION, position_embedding_type="rope")),
    "glm": Family("GlmConfig", text(HEADS)),
    "glm4": Family("Glm4Config", text(HEADS)),
    "smollm3": Family("SmolLM3Config", text(_TIED)),
    "hunyuan_dense": Family("HunYuanDenseV1Config", text(HEADS)),
    "ernie4_5": Family("Ernie4_5Config", text(HEADS)),
    "exaone4": Family("Exaone4Config", text(
        HEADS, SLIDING, sliding_window_pattern=4, num_hidden_layers=4)),
    "cohere": Family("CohereConfig", text(head_dim=64)),
    "cohere2": Family("Cohere2Config", text(HEADS, SLIDING)),
    "nemotron": Family("NemotronConfig", text(HEADS)),
    "starcoder2": Family("Starcoder2Config", BASE),
    "stablelm": Family("StableLmConfig", text(use_qkv_bias=True)),
    "seed_oss": Family("SeedOssConfig", text(HEADS)),
    "apertus": Family("ApertusConfig", BASE),
    "arcee": Family("ArceeConfig", text(HEADS)),
    "helium": Family("HeliumConfig", text(HEADS)),
    "cwm": Family("CwmConfig", text(HEADS, MIXED)),
    "diffllama": Family("DiffLlamaConfig", BASE),
    "doge": Family("DogeConfig", BASE),
    "youtu": Family("YoutuConfig", text(LATENT)),
    "minicpm3": Family("MiniCPM3Config", text(LATENT, qk_nope_head_dim=32)),
    "internlm3": Family("InternLM3Config", text(HEADS)),
    "nanochat": Family("NanoChatConfig", BASE),
    "bitnet": Family("BitNetConfig", BASE),
    # names and fused matrices of an older generation
    "gpt2": Family("GPT2Config", _OPENAI),
    "gpt_neo": Family("GPTNeoConfig", {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_layers": 2, "num_heads": 4,
        "intermediate_size": WIDTH, "max_position_embeddings": 512,
        "attention_types": [[["global", "local"], 1]], **TOKENS}),
    "gpt_neox": Family("GPTNeoXConfig", text(num_hidden_layers=2)),
    "gptj": Family("GPTJConfig", _OPENAI | {"rotary_dim": 32}),
    "gpt_bigcode": Family("GPTBigCodeConfig", _OPENAI),
    "codegen": Family("CodeGenConfig", _OPENAI | {"n_ctx": 512, "rotary_dim": 32}),
    "falcon": Family("FalconConfig", {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2,
        "num_attention_heads": 4, "new_decoder_architecture": True, "num_kv_heads": 2, **TOKENS}),
    "falcon_7b": Family("FalconConfig", {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2,
        "num_attention_heads": 4, "multi_query": True, **TOKENS}),
    "opt": Family("OPTConfig", {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "ffn_dim": WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 512, "word_embed_proj_dim": HIDDEN,
        **TOKENS}),
    "bloom": Family("BloomConfig", {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": 2, "n_head": 4, **TOKENS}),
    "mpt": Family("MptConfig", {
        "vocab_size": VOCABULARY, "d_model": HIDDEN, "n_layers": 2, "n_heads": 4, "max_seq_len": 512,
        **TOKENS}),
    "persimmon": Family("PersimmonConfig", BASE),
    "xglm": Family("XGLMConfig", {
        "vocab_size": VOCABULARY, "d_model": HIDDEN, "ffn_dim": WIDTH, "num_layers": 2,
        "attention_heads": 4, "max_position_embeddings": 512, **TOKENS}),
    "biogpt": Family("BioGptConfig", text(num_hidden_layers=2)),
    # state spaces and convolutions
    "falcon_h1": Family("FalconH1Config", text(HEADS, MAMBA, mamba_d_ssm=512)),
    "nemotron_h": Family("NemotronHConfig", text(
        HEADS, num_hidden_layers=5, mamba_num_heads=8, mamba_head_dim=64, ssm_state_size=16, n_groups=1,
        layers_block_type=["mamba", "mlp", "mamba", "attention", "mlp"])),
    "bamba": Family("BambaConfig", text(MAMBA, attn_layer_indices=[1])),
    "mamba": Family("MambaConfig", {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, **TOKENS}),
    "mamba2": Family("Mamba2Config", {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_heads": 8,
        "head_dim": 64, "state_size": 16, "n_groups": 1, **TOKENS}),
    "falcon_mamba": Family("FalconMambaConfig", {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, **TOKENS}),
    "zamba2": Family("Zamba2Config", text(
        num_hidden_layers=4, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], n_mamba_heads=8,
        mamba_d_state=16, use_mamba_kernels=False)),
    "lfm2": Family("Lfm2Config", text(
        layer_types=["conv", "conv", "full_attention"], block_auto_adjust_ff_dim=False,
        conv_dim=HIDDEN, conv_dim_out=HIDDEN, block_dim=HIDDEN, block_ff_dim=WIDTH)),
    "olmo_hybrid": Family("OlmoHybridConfig", text(
        LINEAR, layer_types=["linear_attention"] * 3 + ["full_attention"])),
    "recurrent_gemma": Family("RecurrentGemmaConfig", text(HEADS, lru_width=HIDDEN)),
}  # fmt: skip
