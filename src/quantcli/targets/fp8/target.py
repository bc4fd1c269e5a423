"""`quant_method: fp8`: the format of FP8 checkpoints on the Hub, such as those of DeepSeek and Qwen."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.detect import LAYER, of_draft
from quantcli.core.numerics import CACHES, Cache, Module, Numerics, Parts
from quantcli.targets import serving
from quantcli.targets.base import Fault, PlannedCheckpoint, Refusal, ScalePart, StoredCheckpoint
from quantcli.targets.fp8.config import METHOD, quantization_config
from quantcli.targets.fp8.kinds import LOADS_ON, label_of, layout_of
from quantcli.targets.fp8.stored import Fp8Checkpoint
from quantcli.targets.kv_cache import CacheTensor, not_alone, plain_tensors
from quantcli.targets.layouts import Layout
from quantcli.targets.serving import ServeCommand, Served
from quantcli.targets.sidecars import quantization_block
from quantcli.targets.vllm_family import (
    VllmTarget,
    check_blocks,
    is_head,
    is_linear,
)


class Fp8(VllmTarget):
    """One fp8 scheme for the whole model; config.json names every linear that stays float.

    The engine takes one scale for fused siblings, and rounds their codes again if their scales differ.
    """

    name: ClassVar[str] = "fp8"
    caches: ClassVar[Mapping[Cache, tuple[CacheTensor, ...]]] = {
        CACHES["fp8"]: plain_tensors(lambda heads, width: (1,))
    }

    def layout(self, numerics: Numerics) -> Layout:
        """Its label is such as `fp8 tensor static`: the format has no names of its own."""
        label_of(numerics)  # other numerics are only read
        return layout_of(numerics)

    def loads_on(self, label: str) -> str:
        """Engines and hardware."""
        return LOADS_ON[label]

    def engine_dtype(self, numerics: Numerics, part: ScalePart, serving_dtype: str) -> str:
        """Float32 for all scales."""
        label_of(numerics)
        return "F32"

    def pack(self, numerics: Numerics, parts: Parts, shape: tuple[int, int]) -> dict[str, Tensor]:
        """By suffix, with n and k of the weight:

        weight:           float8_e4m3fn [n, k].
        weight_scale:     float32 [1]; for blocks weight_scale_inv [ceil(n / 128), ceil(k / 128)]. Codes
                          are multiplied with either.
        input_scale:      float32 [1] if inputs are static.
        """
        label_of(numerics)
        stored = {"weight": parts["weight"]}
        if numerics.weight.block:
            stored["weight_scale_inv"] = parts["weight_scale"]
        else:
            stored["weight_scale"] = parts["weight_scale"].reshape(1)
        if "input_scale" in parts:
            stored["input_scale"] = parts["input_scale"].float().reshape(1)
        return stored

    def unpack(self, numerics: Numerics, stored: Mapping[str, Tensor]) -> Parts:
        """The same codes; scales in float32, those of whole modules as [1]."""
        if numerics.weight.block:
            scales = {"weight_scale": stored["weight_scale_inv"].float()}
        else:
            scales = {"weight_scale": stored["weight_scale"].float().reshape(1)}
        if "input_scale" in stored:
            scales["input_scale"] = stored["input_scale"].float().reshape(1)
        return {"weight": stored["weight"], **scales}

    def check(self, modules: Sequence[Module]) -> Iterator[Refusal]:
        """One scheme for the model; and as for all engines of the family."""
        labels = [(module.name, label_of(module.numerics)) for module in modules if module.numerics]
        for name, label in labels:
            first_name, first_label = labels[0]
            if label != first_label:
                what = (
                    f"it would be {label}, and `{first_name}` is {first_label}: this format has one "
                    "scheme for the whole model"
                )
                yield Refusal(name, what, "use `target: compressed-tensors`, which can mix")
        yield from super().check(modules)
        if labels and of_draft([module.name for module in modules]):
            yield from _unnamed(modules)

    def built_float(self, module: str, names: Collection[str]) -> str | None:
        """Also the head."""
        if is_head(module):
            return "the engine has no fp8 head"
        return super().built_float(module, names)

    def faults(self, module: Module, names: Collection[str]) -> Iterator[Fault]:
        """By blocks that siblings would share."""
        yield from check_blocks(module, names)

    def config_block(self, output: PlannedCheckpoint, used: Collection[Numerics]) -> dict[str, Any]:
        """The scheme, and the names of float linears."""
        if not used:
            raise not_alone()
        (numerics,) = used  # `check` refuses a second one
        return quantization_config(output, numerics)

    def serve(self, served: Served, model: str) -> tuple[ServeCommand, ...]:
        """As for all engines of the family; vLLM with the option of `cache_note` for a cache."""
        if served.cache is None:
            return super().serve(served, model)
        return (serving.vllm(served, model, ["--kv-cache-dtype", "fp8"]),)

    def cache_note(self, cache: Cache) -> str | None:
        """On the option that the engine needs.

        Source: vllm 0.32.0, model_executor/layers/quantization/fp8.py:205-207,
        model_executor/layers/attention/attention.py:281-291.
        """
        return (
            "serve with --kv-cache-dtype fp8: config.json of this format cannot say that the cache is "
            "quantized, and without the option the engine leaves its scales unused"
        )

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """By `quant_method` in config.json, or, if it is lost, by scales that only this format has."""
        method = quantization_block(checkpoint.config).text("quant_method")
        if method is not None:
            return method == METHOD
        return any(name.endswith(".weight_scale_inv") for name in checkpoint.tensors)

    def open_stored(self, checkpoint: Checkpoint) -> StoredCheckpoint:
        """A checkpoint of any producer, as vLLM would load it."""
        return Fp8Checkpoint(checkpoint)


def _unnamed(modules: Iterable[Module]) -> Iterator[Refusal]:
    """Float linears in layers of a draft: the engine would quantize them.

    It compares whole names, with numbers after those of the target's layers. Source: vllm 0.32.0,
    model_executor: layers/quantization/fp8.py:117-120,180-187, models/llama_eagle3.py:186-195.
    """
    for module in modules:
        if (
            module.numerics is None
            and is_linear(module.name, module.shape)
            and LAYER.match(module.name)
        ):
            what = (
                "it stays float, and this format can only name it in full: vLLM numbers layers of a "
                "draft after those of its target (its fp8.py:180-187, llama_eagle3.py:186-195)"
            )
            yield Refusal(module.name, what, "use `target: compressed-tensors`, or quantize it, too")
