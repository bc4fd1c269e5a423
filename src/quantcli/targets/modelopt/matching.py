"""How vLLM looks modules up in a ModelOpt configuration: by exact names, parts of names and wildcards.

It looks siblings up by the name under which it fuses them, and experts by the name of their set.
Sources: vllm 0.32.0, model_executor/layers/quantization/modelopt.py:187-228 (float modules) and
1717-1811 (MIXED_PRECISION), utils/quant_utils.py:617-692.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache

from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.detect import Draft
from quantcli.core.untrusted.patterns import globs
from quantcli.targets.spellings import built_as, draft_name, spellings
from quantcli.targets.vllm_family import EXPERT, is_head, last_part, looked_up_as, sibling_names

# Experts that the engine builds under another name than that of their tensors.
# Source: vllm 0.32.0, model_executor/models/minimax_m2.py:285-289.
_BUILT_IN_MLP = ".block_sparse_moe.experts"
_OF_FALCON = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<part>mamba|self_attn)\.(?P<rest>\w+)")
_WILDCARDS = re.compile(r"[*?\[]")


def engine_name(module: str) -> str:
    """The name under which the engine looks a module up: that of its siblings, or of all experts."""
    expert = EXPERT.fullmatch(module)
    return expert["experts"] if expert else looked_up_as(module) or module


def engine_names(module: str, draft: Draft | None = None) -> tuple[str, ...]:
    """That name in all spellings; of a draft there is one."""
    if draft:
        return (draft_name(module, draft),)
    name = engine_name(module)
    return (*spellings(name), *also_built_as(name))


def also_built_as(module: str) -> list[str]:
    """Names under which the engine may build a module, and which do not follow from that of its tensor
    by the beginning."""
    names = built_as(module)
    if _BUILT_IN_MLP in module:
        names.append(module.replace(_BUILT_IN_MLP, ".mlp.experts"))
    return names


def falcon_names(module: str, config: Settings) -> list[str]:
    """Names that the engine gives to modules of Falcon-H1: `model.12.mixer.in_proj` for the mixer of
    layer 2 of ten, and `model.layers.2.o_proj` for its attention. Source: vllm 0.32.0,
    model_executor/models/falcon_h1.py:135,264-271,340-354."""
    match, count = _OF_FALCON.fullmatch(module), config.size("num_hidden_layers")
    if match is None or config.text("model_type") != "falcon_h1" or count is None:
        return []
    layer, rest = int(match["layer"]), match["rest"]
    mixer = match["part"] == "mamba"
    return [f"model.{count + layer}.mixer.{rest}" if mixer else f"model.layers.{layer}.{rest}"]


class Entries:
    """A list of float modules, as the engine reads it.

    modules: names of all modules of the checkpoint.
    """

    def __init__(
        self, entries: Iterable[str], modules: Collection[str], draft: Draft | None = None
    ) -> None:
        self.all = tuple(dict.fromkeys(entries))
        self._modules = modules
        self._draft = draft
        self._exact = frozenset(self.all)
        self._by_length = sorted(self.all, key=len)
        self._lengths = [len(entry) for entry in self._by_length]
        self._wild = [globs([entry]) for entry in self.all if _WILDCARDS.search(entry)]
        self._of_experts = [entry for entry in self.all if "experts" in entry]
        self._named = cache(self._matches)

    def excluded(self, module: str) -> bool | None:
        """Whether the engine builds a module as float; None: only some of its siblings are listed, at
        which it stops."""
        if any(map(self._named, engine_names(module, self._draft))):
            return True
        if self._draft or engine_name(module) == module or EXPERT.fullmatch(module):
            return False
        prefix = module.removesuffix(last_part(module))
        parts = [prefix + part for part in sibling_names(module)]
        parts = [part for part in parts if part in self._modules or part == module]
        listed = {not self._exact.isdisjoint(spellings(part)) for part in parts}
        return listed.pop() if len(listed) == 1 else None

    def _matches(self, name: str) -> bool:
        """Whether some entry matches a name of the engine."""
        if name in self._exact:
            return True
        if "experts" in name and any(name in entry for entry in self._of_experts):
            return True
        shorter = self._by_length[: bisect_left(self._lengths, len(name))]
        if any(entry in name for entry in shorter):
            return True
        return any(pattern.match(name) for pattern in self._wild)


class Layers:
    """`quantized_layers` of MIXED_PRECISION: the algorithm of each module. Others are float."""

    def __init__(self, layers: Mapping[str, str], modules: Collection[str]) -> None:
        self._layers = layers
        self._modules = modules
        self._parents: dict[str, str] = {}  # the first algorithm below each name
        for key, algorithm in layers.items():
            for place in _ends_of_parts(key):
                self._parents.setdefault(key[:place], algorithm)

    def algorithms(self, module: str) -> frozenset[str]:
        """The algorithm of a module; none if it is float; several if its siblings are listed with
        different ones, at which the engine stops."""
        names = engine_names(module)
        if is_head(module):
            names = (*names, "lm_head")
        if found := next((self._layers[name] for name in names if name in self._layers), None):
            return frozenset({found})
        if engine_name(module) != module and not EXPERT.fullmatch(module):
            prefix = module.removesuffix(last_part(module))
            parts = (other for part in sibling_names(module) for other in spellings(prefix + part))
            found_in_parts = frozenset(self._layers[part] for part in parts if part in self._layers)
            if found_in_parts:
                return found_in_parts
        for name in names:
            if name in self._parents:
                return frozenset({self._parents[name]})
        for name in names:
            parent = name.removesuffix(".experts")
            if parent != name and parent in self._parents:
                return frozenset({self._parents[parent]})
        return frozenset()


def _ends_of_parts(name: str) -> Iterator[int]:
    return (place for place, character in enumerate(name) if character == ".")
