"""Which modules the calibration text reaches, as far as names of tensors tell it.

Next-token layers stand behind the model: they read its last hidden states and the token that follows.
The library leaves them out. Their layouts are listed here, with the families whose replay follows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.roles import Role
from quantcli.core.untrusted.patterns import own


@dataclass(frozen=True)
class NextToken:
    """How the checkpoints of some families hold next-token layers.

    families:  model types whose layer is an ordinary decoder layer behind two norms and a projection.
    layer:     regular expression of the beginning of the names of a layer, with its number.
    numbered:  whether layers are counted on from those of the model.
    names:     the stored names of the norm of embeddings, the norm of hidden states and the projection
               of both, one after the other; `{layer}` is the layer's beginning.
    masked:    whether the engine puts zeros in place of the embedding at the first position.
    """

    families: frozenset[str]
    layer: str
    numbered: bool
    names: tuple[str, str, str]
    masked: bool


# Sources: vLLM 0.32, model_executor/models: deepseek_mtp.py, glm4_moe_mtp.py; qwen3_next_mtp.py,
# qwen3_5_mtp.py. All concatenate the embedding first, then the hidden states behind the last norm.
LAYOUTS = (
    NextToken(
        families=frozenset({"deepseek_v3", "kimi_k2", "glm4_moe"}),
        layer=r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.",
        numbered=True,
        names=("{layer}enorm.weight", "{layer}hnorm.weight", "{layer}eh_proj.weight"),
        masked=True,
    ),
    NextToken(
        families=frozenset(
            {"qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"}
        ),
        layer=r"mtp\.layers\.(\d+)\.",
        numbered=False,
        names=("mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight", "mtp.fc.weight"),
        masked=False,
    ),
)


@dataclass(frozen=True)
class NextTokenLayer:
    """The first next-token layer of a checkpoint. prefix: of its names, with a dot."""

    layout: NextToken
    prefix: str

    @property
    def names(self) -> tuple[str, str, str]:
        """Stored names of both norms and the projection, see `NextToken.names`."""
        embedding, hidden, projection = (n.format(layer=self.prefix) for n in self.layout.names)
        return embedding, hidden, projection

    def reads(self, module: str) -> bool:
        """Whether a replay of the layer multiplies with a module's weight."""
        if f"{module}.weight" in self.names:
            return True
        rest = module.removeprefix(self.prefix)
        return rest != module and not rest.startswith(("shared_head.", "embed_tokens"))


def next_token_layer(checkpoint: Checkpoint) -> NextTokenLayer | None:
    """The next-token layer that a replay can follow; None if there is none, or if it cannot."""
    kinds = {level.text("model_type") for level in (checkpoint.config, checkpoint.text_config)}
    first = _layers(checkpoint)
    for layout in LAYOUTS:
        if first is None or not kinds & layout.families:
            continue
        for name in checkpoint.tensors:
            match = own(layout.layer).match(name)
            if match and int(match[1]) == (first if layout.numbered else 0):
                layer = NextTokenLayer(layout, match[0])
                return layer if all(n in checkpoint.tensors for n in layer.names) else None
    return None


def beyond_text(checkpoint: Checkpoint, roles: Mapping[str, Role]) -> list[str]:
    """The modules of draft layers that a replay does not reach. roles: of all modules."""
    layer = next_token_layer(checkpoint)
    drafts = (module for module, role in roles.items() if role == "mtp")
    return [module for module in drafts if layer is None or not layer.reads(module)]


def _layers(checkpoint: Checkpoint) -> int | None:
    """The number of decoder layers that config.json gives."""
    return checkpoint.text_config.size("num_hidden_layers") or None
