"""What the tensors of a checkpoint are, as transformers' own modules say it: an independent judge.

transformers builds the model without weights (device `meta`), each parameter gets a kind from the
module that owns it, and the library's conversion table tells which parameter a stored tensor becomes.
Nothing of quantcli is used here, so that what quantcli says of a checkpoint can be held against it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

# linear: a matrix of a linear layer. expert: a linear layer, or several, of experts that a router
# chooses. router: what chooses experts, or weighs a shared one. head: a linear layer whose outputs are
# tokens. conv: of a convolution. other: norms, biases, scales and the like. unlisted: transformers has
# no parameter for it.
Kind = Literal["linear", "expert", "router", "head", "embedding", "conv", "other", "unlisted"]
LINEARS = ("linear", "expert")

_ROUTER = re.compile(r"router|gate|topk", re.IGNORECASE)
_COUNTS = re.compile(r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts")
# What formats of quantized checkpoints append to the name of a weight, and codes in an element.
_CODES = {"_packed": 8, "_blocks": 2}
_SCALES = re.compile(r"(_scale|_scale_inv|_scales|_shape|_zero_point|activation_scale|input_scale)$")


@dataclass(frozen=True)
class Judged:
    """A stored tensor: what it is, how many weights it holds, its parameter if it has one."""

    kind: Kind
    count: int
    parameter: str | None


class UnknownModelError(LookupError):
    """transformers has no class for a model, or cannot build it."""


def linears_of(checkpoint: Path) -> dict[str, Kind]:
    """The kind of every tensor of a checkpoint, by its name there.

    UnknownModelError if transformers has no class of its own for the model.
    """
    return {name: judged.kind for name, judged in judge(checkpoint).items()}


def judge(checkpoint: Path) -> dict[str, Judged]:
    """Every tensor of a checkpoint, by its name there; errors as of `linears_of`."""
    return judge_names(build(checkpoint), headers(checkpoint))


def headers(checkpoint: Path) -> dict[str, list[int]]:
    """The shape of every tensor of a checkpoint, by its name."""
    return {name: shape for name, (_, shape) in entries(checkpoint).items()}


def entries(checkpoint: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor, from the headers of the files in the index, or of all."""
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        files = {checkpoint / name for name in json.loads(index.read_text())["weight_map"].values()}
    else:
        files = set(checkpoint.glob("*.safetensors"))
    found: dict[str, tuple[str, list[int]]] = {}
    for file in sorted(files):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        header.pop("__metadata__", None)
        found |= {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    return found


def build(checkpoint: Path) -> Any:
    """A model of transformers without weights, from a checkpoint's config.json alone."""
    import transformers

    table = json.loads((checkpoint / "config.json").read_text())
    classes = [getattr(transformers, name, None) for name in table.get("architectures") or []]
    model_class = next((found for found in classes if found is not None), None)
    if table.get("model_type") in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    elif model_class is not None:  # a name of its own for the architecture of another family
        config = model_class.config_class.from_pretrained(checkpoint)
        config.model_type = model_class.config_class.model_type
    else:
        raise UnknownModelError(f"transformers has no model type {table.get('model_type')}")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        return on_meta(model_class or class_of(config), config)
    except AttributeError:
        if not getattr(config, "enable_audio_output", False):
            raise
        config.enable_audio_output = False  # a talker that the library cannot build from its defaults
        return on_meta(model_class or class_of(config), config)


def class_of(config: Any) -> Any:
    """The class that transformers has for a config: of a model that writes text, if there is one."""
    import transformers

    for auto in ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM",
                 "AutoModelForSpeechSeq2Seq", "AutoModelForMultimodalLM", "AutoModelForMaskedLM",
                 "AutoModel"):  # fmt: skip
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise UnknownModelError(f"transformers has no model for {type(config).__name__}")


def on_meta(model_class: Any, config: Any) -> Any:
    """A model of a class of transformers without weights."""
    with torch.device("meta"):
        return model_class._from_config(config)


def kinds_of(model: Any) -> dict[str, Kind]:
    """The kind of every entry of a model's state dict."""
    kinds: dict[str, Kind] = dict.fromkeys(model.state_dict(), "other")
    counts = _expert_counts(model.config)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    modules = dict(model.named_modules(remove_duplicate=False))
    blocks = {
        name.rpartition(".")[0] for name, module in modules.items() if _holds_experts(name, module)
    }
    for path, module in modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if full in kinds:
                kinds[full] = _kind(path, module, name, parameter, head, counts, blocks)
    return kinds


def _holds_experts(path: str, module: nn.Module) -> bool:
    """Whether a module is all experts of a layer: a list of them, or the owner of their stacks."""
    last = path.rpartition(".")[2]
    if isinstance(module, nn.ModuleList):
        return last == "experts"
    return "Expert" in type(module).__name__ and any(p.dim() >= 2 for p in module.parameters())


def _kind(
    path: str,
    module: nn.Module,
    name: str,
    parameter: nn.Parameter,
    head: nn.Module | None,
    counts: set[int],
    blocks: set[str],
) -> Kind:
    from transformers.pytorch_utils import Conv1D

    block = next(
        (b for b in sorted(blocks, key=len, reverse=True) if path.startswith(f"{b}.") or path == b),
        None,
    )
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.MultiheadAttention):
        return "linear" if parameter.dim() == 2 and "proj" in name else "other"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv" if name == "weight" else "other"
    if parameter.dim() < 2:
        return "other"
    if module is head:
        return "head"
    if re.search(r"(^|\.)experts(\.|$)", path) or "Expert" in type(module).__name__:
        return "expert"
    linear = isinstance(module, nn.Linear | Conv1D) and name == "weight"
    if (
        block is not None
        and parameter.dim() == 2
        and (linear or _ROUTER.search(type(module).__name__ + name))
    ):
        inner = path.removeprefix(block).strip(".")
        few = parameter.shape[0] in counts or parameter.shape[0] == 1
        if few and (_ROUTER.search(inner) or _ROUTER.search(type(module).__name__)):
            return "router"
    return "linear" if linear else "other"


def _expert_counts(config: Any) -> set[int]:
    """Every number of experts that a config, or a part of it, has."""
    counts: set[int] = set()
    for part in _parts(config):
        for key, value in vars(part).items():
            if _COUNTS.fullmatch(key):
                values = value if isinstance(value, list | tuple) else [value]
                counts |= {v for v in values if isinstance(v, int)}
    return counts


def _parts(config: Any) -> Iterator[Any]:
    from transformers import PretrainedConfig

    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def judge_names(model: Any, shapes: Mapping[str, list[int]]) -> dict[str, Judged]:
    """What the tensors of a checkpoint of this model are, by their names and shapes."""
    kinds = kinds_of(model)
    target = _targets(model)
    judged: dict[str, Judged] = {}
    by_end: dict[str, Kind] = {}  # the kind of `self_attn.q_proj.weight` and the like in any layer
    for name, shape in shapes.items():
        count = math.prod(shape) * next((n for end, n in _CODES.items() if name.endswith(end)), 1)
        plain = _plain(name)
        parameter = target(plain) if plain else None
        kind: Kind = "other" if plain is None else kinds.get(parameter or "", "unlisted")
        judged[name] = Judged(kind, count, parameter)
        if parameter is not None and plain is not None:
            by_end.setdefault(_end(plain), kind)
    for name, found in judged.items():  # layers that transformers does not build, such as MTP
        if found.kind == "unlisted":
            judged[name] = Judged(
                _by_end(_plain(name) or name, shapes[name], by_end), found.count, None
            )
    return judged


def _plain(name: str) -> str | None:
    """The name that a float checkpoint has for codes; None for a scale and the like."""
    if _SCALES.search(name) and not name.endswith("hc_scale"):
        return None
    for end in _CODES:
        name = name.removesuffix(end)
    return name


def _end(name: str) -> str:
    """What follows the number of a layer, without the number of an expert."""
    end = re.split(r"(?:^|\.)(?:layers|blocks|h|block|layer)\.\d+\.", name)[-1]
    return re.sub(r"experts\.\d+\.", "experts.0.", end)


def _by_end(name: str, shape: list[int], by_end: Mapping[str, Kind]) -> Kind:
    """The kind of a tensor that transformers does not list: as in other layers, or by its own name."""
    if (kind := by_end.get(_end(name))) is not None:
        return kind
    if len(shape) < 2:
        return "other"
    if name.endswith(("eh_proj.weight", "mtp.fc.weight")):
        return "linear"
    if name.endswith("shared_head.head.weight"):
        return "head"
    return "embedding" if name.endswith("embed_tokens.weight") else "unlisted"


def _targets(model: Any) -> Any:
    """A function from the name of a stored tensor to that of its parameter; None if there is none."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    parameters, prefix = model.state_dict(), model.base_model_prefix

    def target(name: str) -> str | None:
        for tables in ((renamings, converters), ([], [])):
            found, _ = rename_source_key(name, *tables, prefix, parameters)
            if found in parameters:
                return found
        return None

    return target


# -- every model type of transformers, without weights ------------------------------------------------

_LAYER_KEYS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers",
               "decoder_layers", "num_decoder_layers", "depth")  # fmt: skip
_TASKS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM",
          "SPEECH_SEQ_2_SEQ", "MASKED_LM", "TEXT_ENCODING")  # fmt: skip


def model_types() -> list[str]:
    """Every model type of transformers whose model writes or encodes text."""
    from transformers.models.auto import modeling_auto

    names: set[str] = set()
    for task in _TASKS:
        names |= set(getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES"))
    return sorted(names)


def write_headers(model_type: str, folder: Path) -> dict[str, list[int]]:
    """A checkpoint of a model type's default config with few layers, whose weights are holes in a file.

    Returns the shape of every tensor. UnknownModelError if transformers cannot build it.
    """
    model = build_type(model_type)
    shapes = names_on_disk(model)
    folder.mkdir(parents=True, exist_ok=True)
    table = json.loads(model.config.to_json_string(use_diff=False))
    table |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(table))
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in sorted(shapes.items()):
        count = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return shapes


def build_type(model_type: str) -> Any:
    """A model without weights of a model type's default config, with few layers if that can be."""
    from transformers import CONFIG_MAPPING

    for layers in (4, 8, None):
        try:
            config = _shrunk(CONFIG_MAPPING[model_type], layers)
            return on_meta(class_of(config), config)
        except UnknownModelError:
            raise
        except Exception as error:
            if layers is None:
                raise UnknownModelError(
                    f"{model_type}: {type(error).__name__}: {error}"[:300]
                ) from error
    raise AssertionError


def _shrunk(config_class: Any, layers: int | None) -> Any:
    """A default config; each part that counts its layers has `layers` of them."""
    config = config_class()
    if layers is None:
        return config
    table: dict[str, Any] = {}
    for key, part in vars(config).items():
        if key in _LAYER_KEYS and isinstance(part, int):
            table[key] = min(part, layers)
        elif hasattr(part, "model_type") and part.model_type:
            inner = {
                k: min(v, layers)
                for k, v in vars(part).items()
                if k in _LAYER_KEYS and isinstance(v, int)
            }
            table[key] = type(part)(**inner).to_dict()
    return config_class(**table)


def names_on_disk(model: Any) -> dict[str, list[int]]:
    """Name and shape of every tensor that transformers would write for a model; tied ones once."""
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    for name in getattr(model, "all_tied_weights_keys", None) or {}:
        state.pop(name, None)
    return {name: list(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}


# -- what a converted checkpoint stores quantized ------------------------------------------------------

_FLOATS = {"BF16", "F16", "F32"}
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.\w+\.weight")


def share_quantized(model: Path, converted: Path) -> float:
    """The share of the weights of all linears and experts of a model, without heads and routers, that
    a conversion of it does not store as floats; errors as of `linears_of`.

    A float linear keeps its name in a conversion. Experts may be taken out of stacks.
    """
    judged = judge(model)
    counts = {name: found.count for name, found in judged.items() if found.kind in LINEARS}
    plain = {_plain(name) or name: name for name in counts}
    floats = 0
    for name, (dtype, shape) in entries(converted).items():
        if dtype not in _FLOATS:
            continue
        taken_out = name not in plain and _EXPERT.fullmatch(name) and len(shape) == 2
        if name in plain or taken_out:
            floats += math.prod(shape)
    return 1 - floats / sum(counts.values())
