"""Names of modules in the spellings of engines.

A configuration names modules as the checkpoint does. vLLM and SGLang rename such names with the same
table that renames tensors; transformers compares those of compressed-tensors with its own modules, and
renames those of fp8. So a name counts for all of them only next to its other spellings.

Sources: vllm 0.32.0, `hf_to_vllm_mapper` of the classes in model_executor/models, applied to a
configuration by model_executor/models/interfaces.py:1258; transformers 5.23.0, conversion_mapping.py,
quantizers/quantizer_finegrained_fp8.py:100-122, quantizers/quantizers_utils.py:26-37;
compressed-tensors 0.20.0, utils/match.py.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence

from quantcli.checkpoint.detect import LAYER, Draft
from quantcli.targets.vllm_family import expert_set, last_part, looked_up_as

# A text model next to towers; transformers before 4.52 wrote the second.
# Sources: vllm 0.32.0, model_executor/models/gemma3_mm.py, llava.py, qwen2_vl.py, internvl.py, whose
# mappers have the first two; the third is the text model loaded alone, and the text of Qwen2-VL.
_TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
_TEXT = re.compile(
    r"(?:model\.language_model\.|language_model\.model\.|model\.(?=layers\.\d+\.))(?P<rest>.+)"
)
_HEAD = re.compile(r"(?:model\.)?(?:language_model\.)?lm_head")
# Parts at the beginning of names that engines move, add and leave out.
MOVED = frozenset({"model", "language_model"})
_NO_TOWERS = frozenset({"layers", "blocks", "h"})  # of the text model
_PLAIN = re.compile(r"model\.layers\.\d+\..+|lm_head")
# Modules that engines build under another name than that of the tensor. Engines rename tensors by it
# and a dot, which is not in the name of a module: such names are not renamed in a configuration.
# Sources: vllm 0.32.0, model_executor/models/whisper.py:816, phi4mm.py:1049, telechat2.py:116,
# ernie45_vl.py:1377-1381, molmo.py:1282-1284, granitemoehybrid.py:73-89 and falcon_h1.py:120-136.
_RENAMED = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"(layers\.\d+)\.(fc[12])$", r"\1.mlp.\2"),
        (r"\.base_layer$", ""),
        (r"\.self_attention\.dense$", ".self_attention.o_proj"),
        (r"\b(spatial|temporal)_linear\.([02])$", r"\1_linear\g<2>"),
        (r"\bimage_projector\.w1$", "image_projector.gate_proj"),
        (r"\bimage_projector\.w3$", "image_projector.up_proj"),
        (r"\bimage_projector\.w2$", "image_projector.down_proj"),
        (r"\.mamba\.(in_proj|out_proj)$", r".mixer.\1"),
        (r"^head$", "lm_head"),
    )
)
# Names of DeepSeek-V4, each part of which transformers 5 renames.
# Source: transformers 5.23.0, conversion_mapping.py:649-700.
_DEEPSEEK_V4 = re.compile(r"layers\.\d+\.(?:ffn\.|attn\.(?:w|compressor\.|indexer\.))")
_PARTS_OF_DEEPSEEK_V4 = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\.attn\.", ".self_attn."),
        (r"\.ffn\.", ".mlp."),
        (r"\.indexer\.compressor\.", ".compressor.indexer."),
        (r"\.indexer\.weights_proj$", ".compressor.indexer.scorer.weights_proj"),
        (r"\.indexer\.wq_b$", ".compressor.indexer.q_b_proj"),
        (r"\.w(q_a|q_b|kv|o_a|o_b)$", r".\1_proj"),
        (r"\.wgate$", ".gate_proj"),
        (r"\.shared_experts\.w1$", ".shared_experts.gate_proj"),
        (r"\.shared_experts\.w2$", ".shared_experts.down_proj"),
        (r"\.shared_experts\.w3$", ".shared_experts.up_proj"),
    )
)
# Parts in the middle of names that transformers 5 leaves out.
# Source: transformers 5.23.0, conversion_mapping.py, CLIPVisionModel and its aliases.
_LEFT_OUT = re.compile(r"\.(?:vision_model|text_model)(?=\.)")
_MAY_BE_RENAMED = re.compile(
    r"\.(?:vision_model|text_model|ffn|attn)\.|"
    r"(?:\.(?:fc[12]|base_layer|dense|w[123]|mamba\.(?:in|out)_proj)|_linear\.[02]|^head)$"
)


def is_decoder(modules: Iterable[str]) -> bool:
    """Whether all names are those of a decoder alone, which every engine spells alike."""
    return all(_PLAIN.fullmatch(name) and not _renamed(name) for name in modules)


def _renamed(module: str) -> list[str]:
    """Other names of a module in engines that build it under another one."""
    if not _MAY_BE_RENAMED.search(module):  # most are not: there may be very many experts
        return []
    found = built_as(module)
    if _DEEPSEEK_V4.search(module):
        name = module
        for pattern, new in _PARTS_OF_DEEPSEEK_V4:
            name = pattern.sub(new, name)
        found.append(name)
    if _LEFT_OUT.search(module):
        found.append(_LEFT_OUT.sub("", module))
    return found


def built_as(module: str) -> list[str]:
    """Names under which vLLM builds a module, other than that of its tensor."""
    if not _MAY_BE_RENAMED.search(module):
        return []
    return [pattern.sub(new, module) for pattern, new in _RENAMED if pattern.search(module)]


def spellings(module: str) -> tuple[str, ...]:
    """The names under which engines may look a module up, its own first."""
    found = [module, *_renamed(module)]
    for name in tuple(found):
        if match := _TEXT.fullmatch(name):
            found += [prefix + match["rest"] for prefix in _TEXT_PREFIXES]
        elif _HEAD.fullmatch(name):
            found += ["lm_head", "language_model.lm_head"]
        elif name.startswith("model."):
            found.append(name.removeprefix("model."))
        else:
            found.append(f"model.{name}")
    return tuple(dict.fromkeys(found))


def draft_name(module: str, draft: Draft) -> str:
    """The name under which vLLM looks up a module of a draft; its layer's number is that of any target.

    Siblings have only the name under which they are fused: vLLM gives a draft's configuration no table
    of them. Sources: vllm 0.32.0, model_executor/models: utils.py:985-1007,
    llama_eagle3.py:186-195,347-351, qwen3_eagle3.py:72-80 (qkv_proj).
    """
    name = looked_up_as(module) or module
    if match := LAYER.fullmatch(name):
        rest = match["rest"]
        if rest == _QKV and draft.engine in ("Eagle3Qwen3ForCausalLM", "PeagleQwen3ForCausalLM"):
            rest = last_part(_QKV)
        return f"model.layers.{_OF_A_TARGET}.{rest}"
    return name if name == "lm_head" else f"model.{name}"


_OF_A_TARGET = 1_000_000  # more layers than any model has
_QKV = "self_attn.qkv_proj"


def draft_expressions(modules: Iterable[str]) -> list[str]:
    """Regular expressions for the names of a draft's modules: the checkpoint's, vLLM's and SGLang's.

    Layers have any number: `uneven` in targets/drafts.py sees that they are alike.
    """
    found: dict[str, None] = {}
    for module in modules:
        for name in (module, looked_up_as(module)):
            if name and (match := LAYER.fullmatch(name)):
                layer = r"(?:midlayer|layers\.[0-9]+)"
                rest = re.escape(match["rest"])
                if match["rest"] == _QKV:
                    rest = r"(?:self_attn\.)?qkv_proj"
                found[rf"(?:.*\.)?{layer}\.{rest}$"] = None
            elif name:
                found[rf"(?:.*\.)?{re.escape(name)}$"] = None
    return list(found)


def float_towers(floats: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """Towers that hold nothing quantized, such as `vision_tower` and `visual`.

    Whatever names an engine gives to modules within them, they are float.
    """
    taken = {part for module in quantized for part in module.split(".")}
    firsts = dict.fromkeys(_moved_off(module) for module in floats)
    return [tower for tower, within in firsts if within and tower not in taken | _NO_TOWERS]


def _moved_off(module: str) -> tuple[str, bool]:
    """The first part of a name after those that engines move, and whether others follow it."""
    parts = module.split(".")
    first = next((i for i, part in enumerate(parts) if part not in MOVED), len(parts) - 1)
    return parts[first], first + 1 < len(parts)


def skip_list(floats: Sequence[str], quantized: Sequence[str]) -> list[str]:
    """Names of float modules for engines that compare whole names, and for transformers.

    transformers takes an entry for all within it, and for the end of a name, even within a part of the
    name: a spelling that ends the name of a quantized module is left out.
    """
    if is_decoder([*floats, *quantized]):
        return list(floats)
    taken = sorted({name[::-1] for module in quantized for name in spellings(module)})

    def ends_one(name: str) -> bool:
        place = bisect_left(taken, name[::-1])
        return place < len(taken) and taken[place].startswith(name[::-1])

    towers = float_towers(floats, quantized)
    names = list(floats)
    for module in floats:
        names += _renamed(module) if _moved_off(module)[0] in towers else spellings(module)
    names += [prefix + tower for tower in towers for prefix in ("model.", "")]
    own = set(floats)
    return [name for name in dict.fromkeys(names) if name in own or not ends_one(name)]


def of_no_module(
    listed: Iterable[str], modules: Iterable[str], stacks: Collection[str] = ()
) -> list[str]:
    """Listed names of several parts that no module has, nor any module within them, in any spelling.

    stacks: names of sets of experts, all of whose names exist, as they are stored together. A head is
    left out: if it is tied, no file holds it.
    """
    names = list(modules)
    sets = {other for name in stacks for other in spellings(name)}
    listed = [name for name in listed if expert_set(name) not in sets]
    prefixes = {name[:place] for name in names for place in _ends_of_parts(name)}
    absent = [
        name
        for name in dict.fromkeys(listed)
        if "." in name and not _HEAD.fullmatch(name) and prefixes.isdisjoint(spellings(name))
    ]
    if absent:  # it may be the spelling of a name that has others
        prefixes = {other for name in names for other in spellings(name)}
        prefixes = {name[:place] for name in prefixes for place in _ends_of_parts(name)}
    return [name for name in absent if name not in prefixes]


def _ends_of_parts(name: str) -> Iterator[int]:
    yield from (place for place, character in enumerate(name) if character == ".")
    yield len(name)
