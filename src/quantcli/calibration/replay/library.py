"""All uses of transformers: a model from its config, and how stored tensors become parameters.

Nothing that came with a model runs here unless `trust_remote_code` says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from quantcli.calibration.replay.guard import Bounds, bounds_of, guarded, is_outsized
from quantcli.calibration.replay.next_token import add_layer, attach
from quantcli.calibration.text.documents import sentence
from quantcli.calibration.text.tokenizer import quiet, with_torch
from quantcli.checkpoint.checkpoint import CONFIG, Checkpoint
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.detect import must_run_alone
from quantcli.core.errors import InputError, QuantError
from quantcli.core.memory.shortage import is_out_of_memory, machine_fault
from quantcli.core.untrusted.bounded import Subject, run_bounded
from quantcli.core.untrusted.server import Answer, Limits

# Models of several, of which one takes text: its class, its part of the config, and the beginning of
# the names of its tensors. Source: transformers 5.23, models/qwen2_5_omni and qwen3_omni_moe.
_PARTS = {
    whole: (f"{family}ThinkerForConditionalGeneration", "thinker_config", "thinker.")
    for family, whole in (
        ("Qwen2_5Omni", "Qwen2_5OmniModel"),
        ("Qwen2_5Omni", "Qwen2_5OmniForConditionalGeneration"),
        ("Qwen3OmniMoe", "Qwen3OmniMoeForConditionalGeneration"),
    )
}


def part_of(checkpoint: Checkpoint) -> tuple[str, str, str] | None:
    """The part of a model that takes text: its class, its key in config.json, and the beginning of the
    names of its tensors. None if that is the whole model."""
    return _PARTS.get(next(iter(checkpoint.config.texts("architectures")), ""))


# Linears that multiply by the transposed weight themselves, which taps do not see.
# Source: transformers 5.23.0, models/falcon/modeling_falcon.py:59-64.
_AS_LINEAR = frozenset({"FalconLinear"})


# Limits for building a model with a number of odd size; a large one takes a minute.
_SECONDS, _TENSORS_PER_SECOND = 20, 200
_MEMORY = 2**30


def build_model(
    checkpoint: Checkpoint, dtype: torch.dtype, *, trust_remote_code: bool, next_token: bool = False
) -> nn.Module:
    """The model that config.json names, in evaluation mode: parameters on meta, buffers real.

    next_token: build one decoder layer more, as a next-token layer. Raises InputError if transformers
    does not know the model, or its config does not fit.
    """
    must_run_alone(checkpoint)
    order = _Order(
        checkpoint.config,
        bounds_of(checkpoint),
        part_of(checkpoint),
        trust_remote_code,
        next_token,
        str(dtype).removeprefix("torch."),
    )
    try:
        with quiet(), _config_folder(checkpoint) as folder:
            if is_outsized(checkpoint):
                _try_elsewhere(order, str(folder))
            model = _build(order, folder)
    except QuantError:
        raise
    except Exception as error:
        where = order.bounds.where
        if fault := machine_fault(error, "building the model", checkpoint.path):
            raise fault from None
        raise _explain(error, checkpoint, where, trust_remote_code=trust_remote_code) from None
    built: nn.Module = model.eval()
    for module in built.modules():
        if type(module).__name__ in _AS_LINEAR and isinstance(module, nn.Linear):
            module.forward = partial(nn.Linear.forward, module)  # type: ignore[method-assign]
    return built


@dataclass(frozen=True)
class _Order:
    """What to build: config.json, what its weights account for, the part of it, and in which way."""

    table: Settings
    bounds: Bounds
    part: tuple[str, str, str] | None
    trust_remote_code: bool
    next_token: bool
    dtype: str


def _build(order: _Order, folder: Path) -> Any:
    """The model, as the library makes it. folder: with config.json and its code, if there is some."""
    import transformers
    from transformers.initialization import no_init_weights

    dtype = getattr(torch, order.dtype)
    online = nullcontext() if order.trust_remote_code else _offline()
    with online, guarded(order.bounds), no_init_weights(), torch.no_grad():
        if order.part is None:
            config = _config(order, folder)
            named = (getattr(config, "architectures", None) or [""])[0]
        else:  # the class of a whole may not be built, and puts out speech
            named, key, _ = order.part
            config_class = getattr(transformers, named).config_class
            config = config_class.from_dict(order.table.plain().get(key) or {})
        _choose_implementations(config)
        if order.next_token:
            add_layer(config)
        native = getattr(transformers, str(named), None)
        custom = order.trust_remote_code and hasattr(config, "auto_map")
        if native is not None and not custom:
            model = native._from_config(config, dtype=dtype)
        else:
            model = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, trust_remote_code=order.trust_remote_code
            )
        model.tie_weights()
        if order.next_token:
            attach(model.get_decoder().layers[-1], dtype)
        _keep_in_float32(model, dtype)
    return model


def _try_elsewhere(order: _Order, folder: str) -> None:
    """Build the model in another process, within limits on time and memory that its tensors explain."""
    bounds = order.bounds
    limits = Limits(
        seconds=_SECONDS + bounds.tensors // _TENSORS_PER_SECOND,
        wall=60.0 + 10 * _SECONDS + bounds.tensors,
        memory=_MEMORY + 8 * bounds.values,
        answer=0,
    )
    subject = Subject("config.json", "building the model of config.json", bounds.where)
    run_bounded(tried, (order, folder), with_torch, limits, subject)


def tried(order: _Order, folder: str) -> Answer:
    """In the other process: build the model. What the library refuses, it refuses again in this one."""
    try:
        with quiet():
            _build(order, Path(folder))
    except QuantError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError from None
    return {}, b""


def _choose_implementations(config: Any) -> None:
    """Have the library choose how attention and experts are computed, in all parts of a config.

    A name such as `someone/kernel` in config.json would make it fetch compiled code from the Hub and
    run it. Sources: transformers 5.23.0, configuration_utils.py:485-640, modeling_utils.py:1755-1830,
    integrations/hub_kernels.py:811-816, integrations/msa_attention.py:33-50.
    """
    config._attn_implementation = None
    config._experts_implementation = None
    for value in vars(config).values():  # also parts that the library does not list as such
        if hasattr(value, "sub_configs"):
            _choose_implementations(value)


@contextmanager
def _offline() -> Iterator[None]:
    """The library fetches nothing meanwhile: no kernel, no code, no backbone that a config names."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _config(order: _Order, folder: Path) -> Any:
    """The config of a model: of the library's class for its type, or else for its architecture.

    A model may come with code of its own, and have a class in the library all the same: Kimi K2 has
    the architecture of DeepSeek V3 under a type of its own.
    """
    import transformers

    table, trust_remote_code = order.table, order.trust_remote_code
    if table.text("model_type") not in transformers.CONFIG_MAPPING and not trust_remote_code:
        native = getattr(transformers, next(iter(table.texts("architectures")), ""), None)
        config_class = getattr(native, "config_class", None)
        if config_class is not None:
            changed = {**table.plain(), "model_type": config_class.model_type}
            return config_class.from_dict({key: v for key, v in changed.items() if key != "auto_map"})
    return transformers.AutoConfig.from_pretrained(
        str(folder), trust_remote_code=trust_remote_code, local_files_only=True
    )


@contextmanager
def _config_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """Where transformers reads config.json and code from: a copy if that has a byte order mark or was
    changed, or if the model is elsewhere, and was opened on another machine."""
    if not checkpoint.path.is_dir():
        with TemporaryDirectory() as name:
            (Path(name) / CONFIG).write_text(json.dumps(checkpoint.config.plain()))
            yield Path(name)
        return
    plain = checkpoint.plain_config()
    if not plain:
        yield checkpoint.path
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        for code in checkpoint.path.glob("*.py"):
            (folder / code.name).symlink_to(code)
        (folder / CONFIG).write_bytes(plain[CONFIG])
        yield folder


def _keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """Give the parameters that from_pretrained keeps in float32 that dtype."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    from transformers.core_model_loading import build_glob_alternation

    kept_in_float32 = build_glob_alternation(list(plan))[0]
    for name, parameter in list(model.named_parameters()):
        if kept_in_float32.search(name):
            path, _, local = name.rpartition(".")
            kept = nn.Parameter(parameter.float(), requires_grad=False)
            model.get_submodule(path)._parameters[local] = kept


def _explain(
    error: Exception, checkpoint: Checkpoint, where: str, *, trust_remote_code: bool
) -> InputError:
    own_code = bool(checkpoint.config.value("auto_map"))
    if own_code and not trust_remote_code:
        return InputError(
            "the model comes with code of its own, without which it cannot be run",
            where=where,
            fix="read that code, then give --trust-remote-code; or use a scheme that needs no data",
        )
    return InputError(
        f"transformers cannot build this model: {sentence(error).removesuffix('.')}",
        where=where,
        fix="check config.json; a newer transformers may know the model (pip install -U transformers)",
    )


def conversions(model: Any, names: Iterable[str]) -> Iterator[tuple[str, str | None, str | None, Any]]:
    """For every stored name: its parameter (None if there is none), and the pattern and converter of
    the library if more than the name changes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix, parameters = model.base_model_prefix, model.state_dict()
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        if target not in parameters and name in parameters:
            target, pattern = rename_source_key(name, [], [], prefix, parameters)
        if target not in parameters:
            yield name, None, None, None
        else:
            yield name, target, pattern, by_pattern[pattern] if pattern is not None else None
