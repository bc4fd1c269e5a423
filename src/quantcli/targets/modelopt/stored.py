"""A ModelOpt checkpoint on disk as vLLM would load it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from quantcli.checkpoint.detect import draft_of
from quantcli.checkpoint.header import StoredTensor
from quantcli.core.findings import Finding, failed, noted
from quantcli.core.numerics import Cache, Module
from quantcli.targets.base import AGAIN
from quantcli.targets.modelopt.config import (
    FILE,
    ModelOptConfig,
    nameless_head,
    own_settings,
    read_settings,
)
from quantcli.targets.modelopt.kinds import KINDS, MIXED, SUFFIXES, Kind, float_in_four_bits, layout_of
from quantcli.targets.modelopt.matching import Entries, Layers
from quantcli.targets.spellings import of_no_module
from quantcli.targets.stored_format import StoredFormat, orphan, some, unlike_scales
from quantcli.targets.vllm_family import (
    QUANTIZED_ROUTERS,
    check_blocks,
    float_linear,
    is_head,
    is_linear,
    last_part,
    stacked_sets,
    tied_head,
)

_CODES = frozenset({"U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_NUMBERED = re.compile(r"\.\d+\.")  # within a layer of any stack
# Parts of names whose modules are float under one algorithm, whatever is listed.
# Source: vllm 0.32.0, model_executor/layers/quantization/modelopt.py:237-247.
_ALWAYS_FLOAT = ("vision_tower", "vision_model", "vit_large_projector")
# Algorithms of ggml's blocks, which vLLM has next to those of Model-Optimizer.
# Source: vllm 0.32.0, model_executor/layers/quantization/modelopt.py:1831-1847, utils/b12x.py:15.
_OF_GGML = frozenset({"IQ2_XS", "IQ2_XXS", "Q8_0"})


def always_float(module: str) -> str | None:
    """The reason why the engine builds a module as float by a part of its name; None if it does not."""
    part = next((part for part in _ALWAYS_FLOAT if part in module), None)
    return f"the engine builds all modules with `{part}` in their names as float" if part else None


class ModelOptCheckpoint(StoredFormat):
    """Modules of one algorithm, or those of `quantized_layers`, except those that are excluded."""

    def read(self) -> list[Finding]:
        """The algorithm, and the names of float modules."""
        self._config = read_settings(self.checkpoint)
        self._draft = draft_of(self.checkpoint)
        self.readable = self._config.algorithm is not None
        self._lookup = _Lookup(self._config, self)
        return [*self._config.findings, *(self._disagreement() if self.readable else ())]

    def declared_cache(self) -> Cache | None:
        """By `kv_cache_scheme`, or `kv_cache_quant_algo`."""
        return self._config.cache

    def _disagreement(self) -> Iterator[Finding]:
        """Findings of a file of its own, and one if it quantizes other modules than config.json."""
        own = own_settings(self.checkpoint)
        if own is None:
            return
        yield from (finding for finding in own.findings if finding.severity == "error")
        lookup = _Lookup(own, self)
        for module, tensors in self.by_module.items():
            weight = tensors.get("weight")
            if weight is None or not is_linear(module, weight.spec.shape):
                continue
            if (one := lookup.algorithm(module)) != (other := self._lookup.algorithm(module)):
                what = (
                    f"makes `{module}` {one or 'float'}, and config.json {other or 'float'}: "
                    "TensorRT-LLM reads this file, vLLM the other"
                )
                yield failed("config", what, FILE, AGAIN)
                return

    def check_parameters(self) -> Iterator[Finding]:
        """Float modules are excluded; the others have what the engine registers."""
        as_float: dict[str, list[str]] = defaultdict(list)
        routers: list[str] = []
        for module, tensors in sorted(self.by_module.items()):
            weight, scales = tensors.get("weight"), sorted(tensors.keys() & SUFFIXES)
            if weight is None:
                if scales:
                    yield orphan(module, scales[0])
                continue
            self.checked["parameters"] += 1
            has_codes = bool(scales) or weight.spec.dtype in _CODES
            if not has_codes and not is_linear(module, weight.spec.shape):
                continue  # norms, embeddings, convolutions
            if reason := self._lookup.conflict(module):
                self.labels[module] = self.float_label
                yield failed("loader", reason, f"`{module}`", AGAIN)
                continue
            algorithm = self._lookup.algorithm(module)
            if algorithm in _OF_GGML:
                self.labels[module] = self.unchecked[module] = algorithm
            elif algorithm is None or algorithm not in KINDS:
                self.labels[module] = self.float_label
                if has_codes:
                    as_float[_codes_as_float(tensors, scales, self._lookup.reason(module))].append(
                        module
                    )
            elif has_codes:
                yield from self._quantized(module, KINDS[algorithm])
            else:
                self.labels[module] = self.float_label
                if self.float_only(module) is None:
                    yield from self._unlisted(module, weight, algorithm)
                elif float_linear(module) and self._routers_are_quantized():
                    routers.append(module)
        if routers:
            what = f"the list of float modules lacks {some(routers)}, float routers that the engine "
            yield failed("loader", what + "would quantize", fix="add their names to the list")
        for what, names in as_float.items():
            more = f"; {len(names) - 1} more like it" if len(names) > 1 else ""
            yield failed("loader", what + more, f"`{names[0]}`", AGAIN)
        if (head := tied_head(self.checkpoint)) and self._lookup.algorithm(head) in KINDS:
            what = "is tied to the embeddings and not among the float modules: the engine has no "
            what += "scales for it"
            yield failed("loader", what, f"`{head}`", "add `lm_head` to the list of float modules")

    def _routers_are_quantized(self) -> bool:
        return self.checkpoint.text_config.text("model_type") in QUANTIZED_ROUTERS

    def builds_quantized(self, module: str) -> bool | None:
        """Unless it is excluded, or in no entry of MIXED_PRECISION."""
        return self._lookup.algorithm(module) in KINDS

    def _quantized(self, module: str, kind: Kind) -> Iterator[Finding]:
        layout = layout_of(kind)
        self.labels[module] = layout.label
        spec, faults = self.by_module[module]["weight"].spec, []
        block = kind.numerics.weight.block
        if block and len(spec.shape) == 2 and (k := layout.sides(spec.shape)[1]) % block[1]:
            what = f"{kind.algorithm} needs columns in multiples of {block[1]}; there are {k}"
            faults.append(failed("parameters", what, f"`{module}`", AGAIN))
        yield from self.check_layout(module, layout, kind.numerics, faults=faults)

    def _unlisted(self, module: str, weight: StoredTensor, algorithm: str) -> Iterator[Finding]:
        """The finding for a float linear that the engine builds as quantized."""
        what = f"is {weight.spec.dtype} and not among the float modules"
        if last_part(module) == "lm_head" or ".layers." in module or _NUMBERED.search(module):
            what += f": the engine would build it in {algorithm}, and has no codes for it"
            yield failed("loader", what, f"`{module}`", "add its name to the list of float modules")
        else:
            yield noted("loader", what + ": the engine must build it as float by itself", f"`{module}`")

    def float_only(self, module: str) -> str | None:
        """Routers, and under one algorithm vision towers of some names."""
        algorithm = self._config.algorithm
        own = None if algorithm == MIXED else always_float(module)
        return super().float_only(module) or own or float_in_four_bits(module, algorithm)

    def missing(self, module: str, suffix: str) -> Finding:
        """The engine has a value of its own in the place of some."""
        finding = super().missing(module, suffix)
        if suffix == "weight_scale" and self.labels[module] in ("NVFP4", "W4A16_NVFP4"):
            return failed("parameters", finding.what, fix=f"the engine stops without it: {AGAIN}")
        return finding

    def check_siblings(self) -> Iterator[Finding]:
        """Blocks that siblings would share; scales for which codes are rounded again."""
        for name, module in self.modules.items():
            for what, *_ in check_blocks(Module(name, module.shape, module.numerics), self.labels):
                yield failed("siblings", what, f"`{name}`", AGAIN)
        yield from unlike_scales(m for m in self.modules.values() if m.layout.label == "FP8")

    def check_config(self) -> Iterator[Finding]:
        """A note on listed names that no module has; the serving dtype."""
        listed = [name for name in self._config.excluded if not set("*?[") & set(name)]
        if absent := of_no_module(listed, self.by_module, stacked_sets(self.checkpoint.tensors)):
            yield noted(
                "config", f"the list of float modules names {some(absent)}, which no file holds"
            )
        yield from super().check_config()


class _Lookup:
    """The algorithm of each module by one description."""

    def __init__(self, config: ModelOptConfig, stored: ModelOptCheckpoint) -> None:
        self._mixed = config.algorithm == MIXED
        self._nameless_head = nameless_head(stored.checkpoint.config)
        self._usual = config.algorithm
        self._entries = Entries(config.excluded, stored.by_module, stored._draft)
        self._layers = Layers(config.layers, stored.by_module)

    def algorithm(self, module: str) -> str | None:
        """In capitals; None if the engine builds the module as float."""
        if self._nameless_head and is_head(module):
            return None if self._mixed else self._usual
        if self._entries.excluded(module):
            return None
        if self._mixed:
            return next(iter(sorted(self._layers.algorithms(module))), None)
        return None if always_float(module) else self._usual

    def conflict(self, module: str) -> str | None:
        """The reason why the engine stops at a module; None if it does not."""
        excluded = self._entries.excluded(module)
        if excluded is None:
            return (
                "only some of it and its siblings are among the float modules: the engine stops at this"
            )
        if self._mixed and not excluded and len(found := self._layers.algorithms(module)) > 1:
            return (
                f"its siblings have different algorithms, {', '.join(sorted(found))}: the engine stops"
            )
        return None

    def reason(self, module: str) -> str:
        """Why the engine builds it as float."""
        if self._entries.excluded(module):
            return "is among the float modules"
        if found := self._layers.algorithms(module) if self._mixed else ():
            return f"has the algorithm {sorted(found)[0]:.40}, which the engine does not know"
        return "is in no entry of quantized_layers" if self._mixed else str(always_float(module))


def _codes_as_float(tensors: Mapping[str, StoredTensor], scales: list[str], reason: str) -> str:
    """The message on a module with codes that the engine builds as float."""
    has = f"has {scales[0]}" if scales else f"is {tensors['weight'].spec.dtype}"
    return f"{reason}, but {has}: the engine would take codes for weights"
