"""Encoders, classifiers, and models of an encoder and a decoder."""

from __future__ import annotations

from tests.zoo.parts import BASE, ENCODER, HIDDEN, STACKS, TOKENS, VOCABULARY, WIDTH, Family, text

_CLASSES = "AutoModelForSequenceClassification"
_T5 = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 64, "d_ff": WIDTH, "num_layers": 2,
       "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
_SPEECH = {"num_mel_bins": 80, "max_source_positions": 64, "max_target_positions": 512}
_TOWER = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": WIDTH,
          "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 128}  # fmt: skip
_EYE = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
        "projection_dim": 128}  # fmt: skip

ENCODERS: dict[str, Family] = {
    "bert": Family("BertConfig", ENCODER, _CLASSES),
    "modernbert": Family("ModernBertConfig", ENCODER | TOKENS | {
        "cls_token_id": 0, "sep_token_id": 1}, _CLASSES),
    "roberta": Family("RobertaConfig", ENCODER | TOKENS, "RobertaForMaskedLM"),
    "xlm_roberta": Family("XLMRobertaConfig", ENCODER | TOKENS, "XLMRobertaForSequenceClassification"),
    "distilbert": Family("DistilBertConfig", {
        "vocab_size": VOCABULARY, "dim": HIDDEN, "hidden_dim": WIDTH, "n_layers": 2, "n_heads": 4,
        "max_position_embeddings": 512}, "DistilBertForMaskedLM"),
    "electra": Family("ElectraConfig", ENCODER | {"embedding_size": HIDDEN}, "ElectraForMaskedLM"),
    "deberta_v2": Family("DebertaV2Config", ENCODER, _CLASSES),
    "mpnet": Family("MPNetConfig", ENCODER, "MPNetModel"),
    "albert": Family("AlbertConfig", ENCODER | {"embedding_size": 128}, "AlbertForMaskedLM"),
    "t5": Family("T5Config", _T5 | {"feed_forward_proj": "gated-gelu"}, "T5ForConditionalGeneration"),
    "t5_relu": Family("T5Config", _T5 | {"feed_forward_proj": "relu", "tie_word_embeddings": True},
                      "T5ForConditionalGeneration"),
    "umt5": Family("UMT5Config", _T5 | {"feed_forward_proj": "gated-gelu"},
                   "UMT5ForConditionalGeneration"),
    "bart": Family("BartConfig", STACKS | {"forced_eos_token_id": 1}, "BartForConditionalGeneration"),
    "mbart": Family("MBartConfig", STACKS, "MBartForConditionalGeneration"),
    "marian": Family("MarianConfig", STACKS, "MarianMTModel"),
    "m2m_100": Family("M2M100Config", STACKS, "M2M100ForConditionalGeneration"),
    "whisper": Family("WhisperConfig", STACKS | _SPEECH | {
        "suppress_tokens": None, "begin_suppress_tokens": None}, "WhisperForConditionalGeneration"),
    "clip": Family("CLIPConfig", {
        "text_config": _TOWER | TOKENS, "vision_config": _EYE, "projection_dim": 128}, "CLIPModel"),
    "siglip": Family("SiglipConfig", {
        "text_config": _TOWER | TOKENS, "vision_config": _EYE}, "SiglipModel"),
    "llama_seqcls": Family("LlamaConfig", BASE | {"num_labels": 1}, _CLASSES),
    "qwen2_tokencls": Family("Qwen2Config", text(num_labels=3), "AutoModelForTokenClassification"),
}  # fmt: skip
