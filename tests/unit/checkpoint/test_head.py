"""The lm_head of a model: by the class in config.json, and by the tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.head import Head, generates, head_weight, lm_head, tied
from quantcli.checkpoint.inspection import tied_embeddings
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.errors import InputError
from tests.builders import make_model, tensor

EMBEDDING = "model.embed_tokens.weight"
UNTIED = {"tie_word_embeddings": False}


def model(tmp_path: Path, *names: str, files: dict[str, str] | None = None, **config: Any) -> Any:
    tensors = dict.fromkeys((*names, "model.layers.0.mlp.score.weight"), tensor("BF16", 4, 2))
    path = make_model(tmp_path / "m", {"model.safetensors": tensors}, config=config, files=files)
    return open_checkpoint(path)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["LlamaForCausalLM"], True),
        (["GPT2LMHeadModel"], True),
        (["Qwen3VLForConditionalGeneration"], True),
        (["MyForSequenceClassification", "MyForCausalLM"], True),
        ([], True),
        (None, True),
        (["LlamaForSequenceClassification"], False),
        (["BertForTokenClassification"], False),
        (["InternLM2ForRewardModel"], False),
        (["Qwen2ForProcessRewardModel"], False),
        (["MistralModel"], False),
        (["T5EncoderModel"], False),
        (["ColQwen2ForRetrieval"], False),
        (["LlamaForCausalLMEagle3"], False),
        (["EagleLlamaForCausalLM"], False),
        (["DeepSeekMTPModel"], False),
    ],
)
def test_classes_that_generate(tmp_path: Path, names: Any, found: bool) -> None:
    assert generates(model(tmp_path, EMBEDDING, architectures=names)) == found


@pytest.mark.parametrize(
    ("names", "config", "found"),
    [
        ([EMBEDDING, "lm_head.weight"], UNTIED, "stored"),
        ([EMBEDDING, "language_model.lm_head.weight_packed"], UNTIED, "stored"),
        ([EMBEDDING], {}, "tied"),
        ([EMBEDDING], {"tie_word_embeddings": True}, "tied"),
        ([EMBEDDING], UNTIED, "lost"),
        ([EMBEDDING], {"text_config": UNTIED, "architectures": ["XForCausalLM"]}, "lost"),
        ([EMBEDDING], {**UNTIED, "architectures": ["XForSequenceClassification"]}, "none"),
        ([EMBEDDING, "score.weight"], UNTIED, "none"),
        ([EMBEDDING, "v_head.weight"], {**UNTIED, "architectures": ["XForCausalLM"]}, "none"),
        (["gpt_neox.embed_in.weight", "embed_out.weight"], UNTIED, "none"),
        (["transformer.output_layer.weight", EMBEDDING], UNTIED, "none"),
        (["embed_tokens.weight"], UNTIED, "none"),
    ],
)
def test_lm_head(tmp_path: Path, names: list[str], config: dict[str, Any], found: Head) -> None:
    checkpoint = model(tmp_path, *names, **config)
    assert lm_head(checkpoint) == found
    assert (tied_embeddings(checkpoint) == "no: the model has no lm_head") == (found == "none")


def test_a_model_of_sentence_transformers_puts_out_embeddings(tmp_path: Path) -> None:
    assert lm_head(model(tmp_path, EMBEDDING, files={"modules.json": "[]"}, **UNTIED)) == "none"


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, None),
        ({"tie_word_embeddings": None, "text_config": UNTIED}, False),
        ({"tie_word_embeddings": True, "text_config": UNTIED}, True),
    ],
)
def test_tied(tmp_path: Path, config: dict[str, Any], found: bool | None) -> None:
    assert tied(model(tmp_path, EMBEDDING, **config)) is found


OTHERS = [
    TensorSpec("model.norm.weight", "BF16", (8,)),
    TensorSpec("model.embed_tokens.weight", "BF16", (64, 8)),
]


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"lm_head.weight": ("BF16", (64, 8))}, "lm_head.weight"),
        ({"lm_head.weight": ("I8", (64, 8)), "lm_head.weight_scale": ("F32", (64, 1))},
         "lm_head.weight"),
        ({"lm_head.qweight": ("I32", (1, 64)), "lm_head.qzeros": ("I32", (1, 8)),
          "lm_head.scales": ("F16", (1, 64)), "lm_head.g_idx": ("I32", (8,))}, "lm_head.qweight"),
        ({"lm_head.weight_packed": ("I32", (64, 1)), "lm_head.weight_shape": ("I64", (2,)),
          "lm_head.weight_scale": ("BF16", (64, 4))}, "lm_head.weight_packed"),
        ({"thinker.lm_head.codes": ("U8", (64, 4))}, "thinker.lm_head.codes"),
        ({"lm_head.weight_scale": ("F32", (64, 1))}, None),  # its codes are lost
        ({"lm_head.bias": ("BF16", (64,))}, None),
        ({"lm_head.norm.weight": ("BF16", (64, 8))}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_the_weight_of_the_head(tensors, found):
    specs = [TensorSpec(name, *rest) for name, rest in tensors.items()]
    assert head_weight([*OTHERS, *specs]) == found


@pytest.mark.parametrize("key", ["tie_word_embeddings", "is_encoder_decoder", "num_key_value_heads"])
@pytest.mark.parametrize("level", [None, "text_config"])
def test_what_is_read_late_has_its_type_checked_at_once(tmp_path, key, level):
    """Else a conversion would write all weights first."""
    config = {key: {}} if level is None else {level: {key: {}, "hidden_size": 2}}
    path = key if level is None else f"{level}.{key}"
    with pytest.raises(InputError, match=f"`{path}` should be "):
        model(tmp_path, EMBEDDING, **config)
