"""The role of each matrix in a model: attention, expert, router, tower and so on. Imports no torch.

A role follows from where a matrix stands and from its shape, not from the last part of its name. The
layers of the language model are the list of layers that config.json counts and whose matrices are as
wide as its hidden states; a recurrent mixer holds a depthwise convolution or decay rates; a router has
a row for each expert. So a family whose linears have names of their own needs no entry here. Names
tell what structure cannot: an embedding from a head of its shape, attention from an MLP.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias, get_args

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.config.settings import Settings

Role: TypeAlias = Literal[
    "attention", "attention.out", "mlp", "mlp.out", "expert", "shared_expert", "ssm",
    "router", "head", "embedding", "tower", "mtp", "other",
]  # fmt: skip
ROLES: tuple[Role, ...] = get_args(Role)
# Linears in the layers of the language model, nearly all of its weights.
BODY: frozenset[Role] = frozenset(
    {"attention", "attention.out", "mlp", "mlp.out", "expert", "shared_expert", "ssm"}
)
LINEAR: frozenset[Role] = BODY | {"head", "tower", "mtp", "other"}
MEANINGS: Mapping[Role, str] = {
    "attention": "linears of attention, its last one included",
    "attention.out": "the last linear of attention alone, such as o_proj",
    "mlp": "linears of an MLP outside of experts, its last one included, and others in a layer",
    "mlp.out": "the last linear of an MLP alone, such as down_proj",
    "expert": "routed experts",
    "shared_expert": "experts that every token passes, beside routed ones",
    "ssm": "linears of mixers with a recurrence or a short convolution: Mamba, gated delta rule, LFM2",
    "router": "routers of experts, and gates that give a few numbers for each token",
    "head": "lm_head, classifiers and poolers",
    "embedding": "tables of embeddings and positions",
    "tower": "vision, audio and speech models next to the language model, and what joins them to it",
    "mtp": "draft layers that predict further tokens",
    "other": "linears outside of layers, and adapters",
}

# Keys of config.json for the number of layers and for the width of hidden states.
# Source: transformers 5.23.0, `attribute_map` of models/*/configuration_*.py.
_LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
    "num_decoder_layers",
)  # fmt: skip
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "model_dim", "embed_dim")
_DRAFTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "n_mtp")
# Keys of config.json for the number of experts.
# Source: vllm 0.32.0, transformers_utils/model_arch_config_convertor.py:190-196.
COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
# Blocks of config.json for both halves of one model; next to a language model they describe a tower.
_HALVES = ("encoder", "decoder", "encoder_config", "decoder_config")
_BOTH = frozenset({"encoder", "decoder"})
_HEADS = ("linear_num_value_heads", "num_attention_heads")

_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")
_LISTED = re.compile(r"(?:(?P<list>.+?)\.)?(?P<index>\d+)\.(?P<rest>.+)")
# Parts of names before the first layer's number.
_TOWERS = re.compile(
    r"vis(?:ion|ual)|audio|image|img|video|speech|talker|code2wav|codec|projector|connector|merger"
    r"|resampler|qformer|perceiver|(?:^|\.|_)(?:vpm|apm|tts|vit|sam_model|mlp1)(?:$|\.)"
)
_MTP = re.compile(r"(?:^|\.)(?:mtp\w*|nextn\w*|\w*_mtp|medusa\w*|eagle\w*|draft\w*)(?:\.|$)")
_EMBEDDING = re.compile(
    r"(?:.*\.)?(?:(?!\w*proj)\w*embed\w*|wte|wpe|shared|\w*position\w*|\w*_bias|token_type\w*)"
)
_HEAD = re.compile(
    r"(?:.*\.)?(?:\w*head\w*|score|\w*classifier\w*|\w*pooler\w*|qa_outputs|embed_out|proj_out|output"
    r"|output_layer|pre_classifier|logits_proj|cls|predictions|summary|v_head)(?:\.[^.]+)*"
)
_ATTENTION = re.compile(r"(?i:attn|attention)|\b(?:q|k|v|o|qkv)_proj$")
# Last parts of names that tell the last linear of a square attention or MLP, and the first ones.
_OUT = re.compile(
    r"(?:^|\.)(?:\w*out\w*|w?o|o_proj|w?o_b|down_proj|w2|fc2|c_proj|proj|lin2|dense|\w*4h_to_h)$"
)
_IN = re.compile(r"(?:^|\.)(?:q|k|v|query|key|value)(?:_proj|_lin)?$")
_SHARED = re.compile(r"(?:^|\.)shared_(?:expert|mlp|moe)\w*(?:\.|$)")
_EXPERT = re.compile(r"(?:^|\.)\w*experts(?:\.|$)")
_ROUTER = re.compile(r"(?:^|\.)(?:\w*router|w?gate|gating|switch|\w*expert_gate)(?:\.[^.]+)?$")
_ADAPTER = re.compile(r"\.lora_[AB](?:\.|$)")
WEIGHTS = frozenset({"weight", "weight_packed", "qweight"})  # floats, or codes of other formats
_DECAY = frozenset({"A_log", "dt_bias", "a_log"})  # parameters of a recurrence
_LEAST_SIDE = 16  # of a linear, unless hidden states are narrower


@dataclass(frozen=True)
class _Sizes:
    """What config.json says of the language model; 0 and empty sets if it does not."""

    width: frozenset[int]
    layers: frozenset[int]
    drafts: int
    experts: int
    gates: frozenset[int]  # rows of matrices that give a number for each head
    towers: tuple[str, ...]  # beginnings of names of other models in config.json

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _Sizes:
        text, config = checkpoint.text_config, checkpoint.config
        halves = [half for key in _HALVES if (half := text.table(key)) is not None]
        heads = {n for key in _HEADS for n in _whole(text, (key,))}
        return cls(
            width=frozenset(n for level in (text, *halves) for n in _whole(level, _WIDTHS)),
            layers=frozenset(n for level in (text, *halves) for n in _whole(level, _LAYERS)),
            drafts=max(_whole(text, _DRAFTS), default=0),
            experts=max(_whole(text, COUNTS), default=0),
            gates=frozenset(heads | {2 * n for n in heads}),
            towers=tuple(n for n in _others(config, text) if text.place or n not in _BOTH),
        )


def _whole(config: Settings, keys: Iterable[str]) -> list[int]:
    return [n for key in keys if (n := config.size(key))]


def _others(config: Settings, text: Settings) -> Iterator[str]:
    """Names of models that config.json describes next to the language model."""
    for key, inner in config.inner():
        if inner.place == text.place or not key.endswith("_config"):
            continue
        if text.place.startswith(f"{inner.place}."):
            yield from _others(inner, text)
        elif key != "quantization_config":
            yield key.removesuffix("_config")


def roles_of(checkpoint: Checkpoint) -> dict[str, Role]:
    """The role of every module whose `.weight` is a matrix, and of every stack of experts by its whole
    name. Names of other tensors are not there."""
    return _Roles(checkpoint).found


def _numbered(module: str) -> str:
    """A module's name; the one layer of an EAGLE3 draft gets a number."""
    return f"layers.0.{module[9:]}" if module.startswith("midlayer.") else module


class _Roles:
    """The roles of a checkpoint; a name is judged once for all layers that have it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.sizes = _Sizes.of(checkpoint)
        self._matrices: dict[str, tuple[int, ...]] = {}  # by module
        self._mixers: set[str] = set()  # modules with a recurrence
        self._with_experts: set[str] = set()  # parents of modules `experts`
        self._listed: dict[str, re.Match[str] | None] = {}  # of each matrix, its place in a list
        renamed: dict[str, str] = {}
        for stored in checkpoint.tensors.values():
            spec = stored.spec
            module, _, suffix = spec.name.rpartition(".")
            if suffix in WEIGHTS and len(spec.shape) == 2:
                numbered = _numbered(module)
                if numbered != module:
                    renamed[numbered] = module
                self._matrices[numbered] = spec.shape
            elif len(spec.shape) > 2 and (_EXPERT.search(spec.name) or self._is_stack(spec.shape)):
                self._matrices[spec.name.removesuffix(".weight")] = spec.shape
            elif len(spec.shape) == 3 and suffix == "weight" and 1 in spec.shape[1:]:
                self._mixers.add(module.rpartition(".")[0])  # depthwise: [channels, 1, width]
            elif suffix in _DECAY:
                self._mixers.add(module)
            if (at := spec.name.find(".experts.")) >= 0:
                self._with_experts.add(spec.name[:at])
        self.body = self._body()
        self._several = bool(self.sizes.towers) or any(map(_TOWERS.search, self._lists))
        self._parents = {name.rpartition(".")[0] for name in self.body}
        self.found: dict[str, Role] = {}
        alike: dict[tuple[object, ...], Role] = {}
        for module, shape in self._matrices.items():
            match = self._listed[module]
            if match is None or (match["list"] or "") not in self.body:
                self.found[module] = self._outside(module, match is not None)
                continue
            index, rest = int(match["index"]), match["rest"]
            layer = module[: len(module) - len(rest)]
            if index >= self.body[match["list"] or ""] or layer in self._drafts:
                self.found[module] = self._in_draft(module, shape)
                continue
            parent = module.rpartition(".")[0]
            mixer = parent in self._mixers or parent.rpartition(".")[0] in self._mixers
            key = (_NUMBERS.sub("0", rest), shape, mixer, parent in self._with_experts)
            if key not in alike:
                alike[key] = self._within(rest, shape, mixer, parent in self._with_experts)
            self.found[module] = alike[key]
        for numbered, module in renamed.items():
            self.found[module] = self.found.pop(numbered)

    def _is_stack(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of three sides has a matrix for each expert."""
        experts = self.sizes.experts
        return experts > 1 and shape[0] == experts and 1 not in shape[1:]

    def _body(self) -> dict[str, int]:
        """The lists of layers of the language model, and the number of layers that are not drafts."""
        lists: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))  # layer -> weights
        widths: dict[str, set[int]] = defaultdict(set)
        self._drafts = set()
        for module, shape in self._matrices.items():
            match = self._listed[module] = _LISTED.fullmatch(module)
            if match is None:
                continue
            name = match["list"] or ""
            lists[name][int(match["index"])] += shape[-1] * shape[-2]
            widths[name].update(shape[-2:])
            if match["rest"] == "eh_proj":
                self._drafts.add(module.removesuffix("eh_proj"))
        self._lists = tuple(lists)
        sizes = self.sizes
        own = [s for s in lists if not self._is_tower(s) and not _MTP.search(s)]
        own = [s for s in own if not _HEAD.fullmatch(s)]
        own = own or list(lists)  # a speech model, say, whose names begin with its own
        wide = [s for s in own if sizes.width & widths[s]] if sizes.width else own
        if not sizes.towers and len(own) == len(lists):
            body = wide  # there is nothing but the language model
        else:
            body = [s for s in wide if self._main(len(lists[s])) is not None]
        if not body and (wide or own):
            body = [max(wide or own, key=lambda name: sum(lists[name].values()))]
        counts = {s: self._main(len(lists[s])) for s in body}
        return {s: n if n is not None else 1 + max(lists[s]) for s, n in counts.items()}

    def _main(self, found: int) -> int | None:
        """The number of layers of a list without its drafts; None for a list of another length."""
        if found in self.sizes.layers:
            return found
        if found - self.sizes.drafts in self.sizes.layers:
            return found - self.sizes.drafts
        return None

    def _is_tower(self, prefix: str) -> bool:
        parts = prefix.split(".")
        named = (
            part == tower or part.startswith(f"{tower}_")
            for part in parts
            for tower in self.sizes.towers
        )
        return _TOWERS.search(prefix) is not None or any(named)

    def _outside(self, module: str, in_list: bool) -> Role:
        """The role of a matrix that is in no layer of the language model."""
        if _MTP.search(module):
            return self._in_draft(module, self._matrices[module])
        if self._is_tower(module):
            return "embedding" if _is_embedding(module) else "tower"
        if _HEAD.fullmatch(module):
            return "head"
        if _is_embedding(module):
            return "embedding"
        near = any(not parent or module.startswith(f"{parent}.") for parent in self._parents)
        return "tower" if self._several and (in_list or not near) else "other"

    def _in_draft(self, module: str, shape: tuple[int, ...]) -> Role:
        """The role of a matrix in a draft layer."""
        if _is_embedding(module):
            return "embedding"
        if _HEAD.fullmatch(module.rpartition(".layers.")[2]):
            return "head"
        return "router" if self._is_router(module, shape) else "mtp"

    def _is_router(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a matrix gives a number for each expert, or few numbers for a token."""
        least, experts = min(shape[-2:]), self.sizes.experts
        most = 2 * experts if experts else 1024  # identity experts may be added to the count
        few = min(_LEAST_SIDE, *self.sizes.width) if self.sizes.width else _LEAST_SIDE
        return least < few or (_ROUTER.search(name) is not None and least <= most)

    def _within(self, rest: str, shape: tuple[int, ...], mixer: bool, with_experts: bool) -> Role:
        """The role of a matrix in a layer of the language model; rest: its name in there."""
        rows, rest = shape[-2], rest.removesuffix(".base_layer")  # of a linear with adapters
        if _ADAPTER.search(rest):
            return "other"
        if _is_embedding(rest):
            return "embedding"
        if _SHARED.search(rest) and rows > 1:
            return "shared_expert" if self._with_experts or self.sizes.experts > 1 else "mlp"
        if _EXPERT.search(rest) or len(shape) > 2:
            return "expert"
        if (with_experts and rows == self.sizes.experts) or self._is_router(rest, shape):
            return "router"
        if mixer:
            return "router" if rows in self.sizes.gates else "ssm"
        widths, named = self.sizes.width, _OUT.search(rest) is not None
        out = rows in widths and (shape[-1] not in widths or named) if widths else named
        if _ATTENTION.search(rest):
            return "attention.out" if out and not _IN.search(rest) else "attention"
        return "mlp.out" if out else "mlp"


@lru_cache(4096)
def _is_embedding(module: str) -> bool:
    return _EMBEDDING.fullmatch(module) is not None
