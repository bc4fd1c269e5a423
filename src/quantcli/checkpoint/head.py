"""The lm_head of a checkpoint: stored, tied to the embedding, lost, or not a part of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, TypeAlias

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.detect import draft_of
from quantcli.checkpoint.spec import TensorSpec

Head: TypeAlias = Literal["stored", "tied", "none", "lost"]

# ends of names of tensors that go with codes
_OF_CODES = ("scale", "scales", "scale_inv", "offset", "zero_point", "qzeros", "scale_second")
# Classes of models that put out the next token.
# Source: transformers 5.23, models/auto/modeling_auto.py, the names of the mappings for generation.
_GENERATES = re.compile(
    r"(?!.*MTP).*(ForCausalLM|LMHeadModel|ForConditionalGeneration|ForVision2Seq|ForImageTextToText)"
)
# Last parts of the names of heads that are not an lm_head: under another name, or with other outputs.
# Sources: transformers 5.23, models/gpt_neox, models/rwkv and its ...ForSequenceClassification,
# ...ForTokenClassification, ...ForQuestionAnswering; remote code of ChatGLM and InternLM2.
_OTHER = frozenset(
    {
        "embed_out", "head", "output", "output_layer", "score", "classifier", "qa_outputs", "v_head",
        "value_head", "reward_head", "regression_head", "classification_head",
    }
)  # fmt: skip
# A file of sentence-transformers: the model puts out embeddings.
_EMBEDDING_MODEL = "modules.json"


def lm_head(checkpoint: Checkpoint) -> Head:
    """How config.json and the tensors account for the lm_head.

    lost: neither stored nor tied, in a model of a class that has one.
    """
    if head_weight(stored.spec for stored in checkpoint.tensors.values()):
        return "stored"
    if tied(checkpoint) is not False and not draft_of(checkpoint):
        return "tied"
    if not generates(checkpoint) or (checkpoint.path / _EMBEDDING_MODEL).is_file():
        return "none"
    outside_of_layers = {name for name in checkpoint.tensors if not re.search(r"\.\d+\.", name)}
    if any(name.split(".")[-2:-1] == [other] for name in outside_of_layers for other in _OTHER):
        return "none"
    # a backbone that was saved alone: a model with a head has it under a name, such as `model`
    return "none" if "embed_tokens.weight" in checkpoint.tensors else "lost"


def head_weight(specs: Iterable[TensorSpec]) -> str | None:
    """Name of the tensor with the weight of the lm_head, or its codes under any name; None if there is
    none."""
    own = []
    for spec in specs:
        module, _, suffix = spec.name.rpartition(".")
        if module.endswith("lm_head") and len(spec.shape) == 2 and not suffix.endswith(_OF_CODES):
            own.append(spec)
    return max(own, key=lambda spec: spec.numel).name if own else None


def tied(checkpoint: Checkpoint) -> bool | None:
    """Whether config.json ties the lm_head to the embedding; None if it does not say."""
    value = checkpoint.config.flag("tie_word_embeddings")
    return checkpoint.text_config.flag("tie_word_embeddings") if value is None else value


def generates(checkpoint: Checkpoint) -> bool:
    """Whether a class in `architectures` has an lm_head; true if config.json names no class.

    A draft takes the head and the embeddings of the model that it drafts for, unless it has its own.
    """
    if draft_of(checkpoint):
        return False
    names = checkpoint.config.texts("architectures")
    return not names or any(_GENERATES.fullmatch(name) for name in names)
