"""A checkpoint of `quant_method: fp8` on disk as vLLM would load it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from quantcli.checkpoint.checkpoint import CONFIG
from quantcli.checkpoint.detect import draft_of
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.findings import Finding, failed, noted
from quantcli.core.numerics import Module
from quantcli.targets.base import AGAIN
from quantcli.targets.fp8.config import read_config
from quantcli.targets.fp8.kinds import SUFFIXES, layout_of
from quantcli.targets.layouts import static_inputs
from quantcli.targets.sidecars import quantization_block
from quantcli.targets.spellings import draft_name, of_no_module, spellings
from quantcli.targets.stored_format import StoredFormat, orphan, some, unlike_scales
from quantcli.targets.vllm_family import (
    EXPERT,
    check_blocks,
    float_linear,
    is_head,
    is_linear,
    last_part,
    stacked_sets,
    tied_head,
)

_FP8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_FORMATS = {
    "F8_E5M2": "e5m2, which engines do not serve: its codes keep two bits of a number",
    "F8_E4M3FNUZ": "e4m3fnuz, whose codes stand for half of what e4m3's do",
    "F8_E5M2FNUZ": "e5m2fnuz, which engines do not serve: its codes keep two bits of a number",
}
# Names of transformers for scales of whole weights, and those of vLLM, which knows them for one class.
# Source: vllm 0.32.0, model_executor/models/mistral3.py:431-437.
_OTHER_NAMES = {"weight_scale_inv": "weight_scale", "activation_scale": "input_scale"}
_KNOWN_TO_VLLM = "Mistral3ForConditionalGeneration"
_STACKED = re.compile(r"\.\d+\.")  # within a layer of any stack
# Of a whole weight: with a smaller scale the engine's second rounding loses small codes.
# Source: vllm 0.32.0, model_executor/layers/quantization/utils/w8a8_utils.py:75-107; the limit was
# found by a trial of all 254 codes.
_SMALLEST = 3e-5


class Fp8Checkpoint(StoredFormat):
    """Modules of one scheme, except those that `quantization_config` names."""

    def read(self) -> list[Finding]:
        """The scheme, and the names of float modules."""
        config = read_config(quantization_block(self.checkpoint.config))
        self._numerics, self._ignored_names = config.numerics, config.ignored
        self._skipped = config.skipped
        self._draft = draft_of(self.checkpoint)
        self.readable = config.numerics is not None
        return [*config.findings, *(self._rename() if self.readable else ())]

    def _rename(self) -> Iterator[Finding]:
        """Scales of whole weights under the engine's names; a note on where other names are known."""
        renamed = []
        assert self._numerics is not None
        if self._numerics.weight.per == "block":
            return
        for module, tensors in self.by_module.items():
            for other, name in _OTHER_NAMES.items():
                scale = tensors.get(other)
                needed = name == "weight_scale" or static_inputs(self._numerics)
                if scale and needed and name not in tensors and scale.spec.shape in {(), (1,)}:
                    tensors[name] = tensors.pop(other)
                    renamed.append(f"{module}.{other}")
        if renamed and not any(
            _KNOWN_TO_VLLM in name for name in self.checkpoint.config.texts("architectures")
        ):
            what = (
                f"transformers reads {some(renamed)}; vLLM 0.32 knows these names for "
                f"{_KNOWN_TO_VLLM} alone"
            )
            yield noted("loader", what)

    def check_parameters(self) -> Iterator[Finding]:
        """Float modules are named in config.json; the others have what the engine registers."""
        for module, tensors in sorted(self.by_module.items()):
            weight, scales = tensors.get("weight"), sorted(tensors.keys() & SUFFIXES)
            if weight is None:
                if scales:
                    yield orphan(module, scales[0])
                continue
            self.checked["parameters"] += 1
            has_codes = weight.spec.dtype in _FP8
            if self._ignored(module):
                self.labels[module] = self.float_label
                if has_codes or scales:
                    has = f"is {weight.spec.dtype}" if has_codes else f"has {scales[0]}"
                    what = f"is in modules_to_not_convert, but {has}"
                    what += ": the engine would take codes for weights"
                    yield failed("loader", what, f"`{module}`", AGAIN)
            elif has_codes or scales:
                yield from self._quantized(module, weight)
            elif is_linear(module, weight.spec.shape):
                self.labels[module] = self.float_label
                yield from self._unlisted(module, weight)
        if head := tied_head(self.checkpoint):
            yield from self._float_head(head)

    def builds_quantized(self, module: str) -> bool | None:
        """Unless config.json names it."""
        return not self._ignored(module)

    def _ignored(self, module: str) -> bool:
        """Whether config.json has a module's full name, in any spelling; for an expert, the name of any
        of its layer."""
        if expert := EXPERT.fullmatch(module):
            return any("experts" in name and expert["experts"] in name for name in self._ignored_names)
        names = (draft_name(module, self._draft),) if self._draft else spellings(module)
        return not self._ignored_names.isdisjoint(names)

    def _unlisted(self, module: str, weight: StoredTensor) -> Iterator[Finding]:
        """The finding for a float linear that the engine builds as fp8."""
        if is_head(module):
            yield from self._float_head(module)
            return
        # Source for `head`: vllm 0.32.0, model_executor/models/deepseek_mtp.py:65.
        if float_linear(module) or last_part(module) == "head":
            return
        what = f"is {weight.spec.dtype} and not in modules_to_not_convert"
        in_tower = _STACKED.search(module) and not self._skipped_by_transformers(module)
        if ".layers." in module or in_tower or self._draft:
            what += ": the engine would cast it to fp8, with a scale of uninitialised memory"
            yield failed("loader", what, f"`{module}`", "add its name to modules_to_not_convert")
        else:
            what += ": the engine must build it as float by itself"
            yield noted("loader", what, f"`{module}`")

    def _float_head(self, module: str) -> Iterator[Finding]:
        """The finding for an lm_head that only vLLM takes for float."""
        if self._skipped is not None and not self._skipped_by_transformers(module):
            what = "is float and not in modules_to_not_convert: transformers would take it for fp8"
            yield failed("loader", what, f"`{module}`", "add its name to modules_to_not_convert")

    def _skipped_by_transformers(self, module: str) -> bool:
        """Whether an entry is a beginning or an end of a module's name, in any spelling."""
        return any(
            name.endswith(entry) or name.startswith(f"{entry}.")
            for name in spellings(module)
            for entry in self._skipped or ()
        )

    def _quantized(self, module: str, weight: StoredTensor) -> Iterator[Finding]:
        assert self._numerics is not None
        layout = layout_of(self._numerics)
        self.labels[module] = layout.label
        if weight.spec.dtype in _FORMATS:
            what = f"is {_FORMATS[weight.spec.dtype]}; the engine reads e4m3"
            yield failed("parameters", what, f"`{weight.spec.name}`", "convert the float model")
        else:
            yield from self.check_layout(module, layout, self._numerics)

    def missing(self, module: str, suffix: str) -> Finding:
        """Also tells of a scale under the name for blocks, or for whole weights."""
        finding = super().missing(module, suffix)
        other = {"weight_scale": "weight_scale_inv", "weight_scale_inv": "weight_scale"}.get(suffix, "")
        if other not in self.by_module[module]:
            return finding
        what = f"{finding.what}; there is {self.by_module[module][other].spec}, under `{other}`"
        fix = "weight_block_size in config.json says which of both engines read"
        return failed("parameters", what, fix=fix)

    def float_only(self, module: str) -> str | None:
        """Routers and the head."""
        return super().float_only(module) or ("the engine has no fp8 head" if is_head(module) else None)

    def check_config(self) -> Iterator[Finding]:
        """A note on listed names that no module has; the serving dtype."""
        stacks = stacked_sets(self.checkpoint.tensors)
        if absent := of_no_module(sorted(self._ignored_names), self.by_module, stacks):
            what = f"modules_to_not_convert names {some(absent)}, which no file holds"
            yield noted("config", what, CONFIG)
        yield from super().check_config()

    def check_siblings(self) -> Iterator[Finding]:
        """Blocks that siblings would share; scales for which codes are rounded again."""
        for name, module in self.modules.items():
            for what, *_ in check_blocks(Module(name, module.shape, module.numerics), self.labels):
                yield failed("siblings", what, f"`{name}`", AGAIN)
        yield from self._rounded_again()

    def _rounded_again(self) -> Iterator[Finding]:
        """Notes on scales of whole weights for which the engine rounds codes a second time."""
        modules = [module for module in self.modules.values() if "weight_scale" in module.tensors]
        yield from unlike_scales(modules)
        scales = {m.name: float(read_tensor(m.tensors["weight_scale"]).reshape(())) for m in modules}
        small = [(name, scale) for name, scale in scales.items() if 0 < scale < _SMALLEST]
        if small:
            name, scale = min(small, key=lambda entry: entry[1])
            what = (
                f"weight_scale is {scale:.3g}; the engine passes weights through float16 as it loads "
                f"them, and below {_SMALLEST:g} small codes are lost"
            )
            yield noted("siblings", what, f"`{name}`")
