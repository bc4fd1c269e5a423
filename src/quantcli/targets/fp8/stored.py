"""A checkpoint of `quant_method: fp8` as vLLM would take it: its modules, and all that the engine would
not load, or would load without a word and misread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.findings import Finding, failed, noted
from quantcli.core.numerics import Module
from quantcli.targets.fp8.config import read_config
from quantcli.targets.fp8.kinds import SUFFIXES, layout_of
from quantcli.targets.layouts import StoredModule
from quantcli.targets.sidecars import declared_dtype, quantization_block
from quantcli.targets.stored_format import AGAIN, check_bias, check_param, check_serving_dtype
from quantcli.targets.tensor_parallel import check_tp
from quantcli.targets.vllm_family import (
    EXPERT,
    ROUTERS,
    check_blocks,
    expert_sets,
    fused_groups,
    fused_siblings,
    is_head,
    is_linear,
    uneven_experts,
)

FLOAT = "float"
_FP8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_FORMATS = {
    "F8_E5M2": "e5m2, which engines do not serve: its codes keep two bits of a number",
    "F8_E4M3FNUZ": "e4m3fnuz, whose codes stand for half of what e4m3's do",
    "F8_E5M2FNUZ": "e5m2fnuz, which engines do not serve: its codes keep two bits of a number",
}
# Linears that engines build as float without asking, by the last part of their names.
_FLOAT_ALWAYS = frozenset({*ROUTERS, "eh_proj", "weights_proj", "head"})
_SMALLEST = 3e-5  # of a whole weight's scale; below, the engine's second rounding loses codes


class Fp8Checkpoint:
    """What `quantization_config` makes of the tensors. `labels` is by module, of float ones too."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.serving_dtype = declared_dtype(checkpoint.config) or "BF16"
        self.checked: dict[str, int] = defaultdict(int)
        self.modules: dict[str, StoredModule] = {}
        self.labels: dict[str, str] = {}
        self._by_module: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
        for name, stored in checkpoint.tensors.items():
            module, _, suffix = name.rpartition(".")
            self._by_module[module][suffix] = stored
        self._config_block = read_config(quantization_block(checkpoint.config))
        self.findings: list[Finding] = [*self._config_block.findings]
        self.checked["config"] += 1
        self.findings += check_serving_dtype(checkpoint.config)
        if self._config_block.numerics is not None:
            for check in (self._parameters, self._siblings, self._experts, self._loader):
                self.findings += check()

    def check_tp(self, size: int) -> Iterator[Finding]:
        """Heads, widths, and what blocks allow to be cut."""
        return check_tp(self.checkpoint.text_config, self.modules.values(), size)

    # -- what the engine registers -------------------------------------------------------------------

    def _parameters(self) -> Iterator[Finding]:
        """Names, dtypes and shapes of each module's tensors."""
        for module, tensors in sorted(self._by_module.items()):
            weight, odd = tensors.get("weight"), sorted(tensors.keys() & SUFFIXES)
            if weight is None:
                if odd:
                    what = f"`{module}.{odd[0]}` belongs to no weight: `{module}.weight` is missing"
                    yield failed("parameters", what, fix=AGAIN)
                continue
            self.checked["parameters"] += 1
            coded = weight.spec.dtype in _FP8
            if self._ignored(module):
                self.labels[module] = FLOAT
                if coded or odd:
                    has = f"is {weight.spec.dtype}" if coded else f"has {odd[0]}"
                    what = f"is in modules_to_not_convert, but {has}"
                    what += ": the engine would take codes for weights"
                    yield failed("loader", what, f"`{module}`", AGAIN)
            elif coded or odd:
                yield from self._quantized(module, tensors)
            elif is_linear(Module(module, weight.spec.shape, None)):
                self.labels[module] = FLOAT
                yield from self._unlisted(module, weight)

    def _ignored(self, module: str) -> bool:
        """By its whole name; experts all together, if one of the layer is named."""
        if expert := EXPERT.fullmatch(module):
            return any(
                "experts" in name and expert["experts"] in name for name in self._config_block.ignored
            )
        return module in self._config_block.ignored

    def _unlisted(self, module: str, weight: StoredTensor) -> Iterator[Finding]:
        """A float linear that the engine builds as fp8, unless it knows better."""
        if is_head(module) or module.rpartition(".")[2] in _FLOAT_ALWAYS:
            return
        what = f"is {weight.spec.dtype} and not in modules_to_not_convert"
        if ".layers." in module:
            what += ": the engine would cast it to fp8, with a scale of uninitialised memory"
            yield failed("loader", what, f"`{module}`", "add its name to modules_to_not_convert")
        else:
            what += ": the engine must build it as float by itself"
            yield noted("loader", what, f"`{module}`")

    def _quantized(self, module: str, tensors: Mapping[str, StoredTensor]) -> Iterator[Finding]:
        assert self._config_block.numerics is not None
        layout = layout_of(self._config_block.numerics)
        spec = tensors["weight"].spec
        self.labels[module] = layout.label
        if spec.dtype in _FORMATS:
            what = f"is {_FORMATS[spec.dtype]}; the engine reads e4m3"
            yield failed("parameters", what, f"`{spec.name}`", "convert the float model")
            return
        if len(spec.shape) != 2:
            yield failed("parameters", f"is {spec}, no matrix", f"`{spec.name}`", AGAIN)
            return
        n, k = spec.shape
        sound = True
        for param in layout.params:
            stored = tensors.get(param.suffix)
            if stored is None:
                sound = False
                yield self._missing(module, param.suffix, tensors)
                continue
            for finding in check_param(param, stored.spec, layout.label, n, k):
                sound = False
                yield finding
        registered = {param.suffix for param in layout.params} | {"bias"}
        for suffix in sorted(tensors.keys() & SUFFIXES - registered):
            what = f"{layout.label} has no {suffix}: the engine stops at it, or leaves it out"
            yield failed("parameters", what, f"`{module}.{suffix}`", AGAIN)
        for finding in check_bias(tensors.get("bias"), n):
            sound = False
            yield finding
        if sound:
            parameters = {suffix: tensors[suffix] for suffix in tensors.keys() & registered}
            self.modules[module] = StoredModule(
                module, layout, parameters, (n, k), self.serving_dtype, self._config_block.numerics
            )

    def _missing(self, module: str, suffix: str, tensors: Mapping[str, StoredTensor]) -> Finding:
        what = f"{self.labels[module]} needs `{module}.{suffix}`, which no file holds"
        fix = "the engine would compute with uninitialised memory: " + AGAIN
        other = {"weight_scale": "weight_scale_inv", "weight_scale_inv": "weight_scale"}.get(suffix, "")
        if other in tensors:
            what += f"; there is {tensors[other].spec}, under `{other}`"
            fix = "weight_block_size in config.json says which of both engines read"
        return failed("parameters", what, fix=fix)

    # -- siblings, experts, loader -------------------------------------------------------------------

    def _siblings(self) -> Iterator[Finding]:
        """All or none of what the engine merges, cut where blocks are, and scales of one size."""
        for refusal in fused_groups(self.labels):
            yield failed("siblings", refusal.what, f"`{refusal.module}`", AGAIN)
        self.checked["siblings"] += sum(fused_siblings(name) is not None for name in self.modules)
        for name, module in self.modules.items():
            for what, _ in check_blocks(Module(name, module.shape, module.numerics), self.labels):
                yield failed("siblings", what, f"`{name}`", AGAIN)
        yield from self._rounded_again()

    def _rounded_again(self) -> Iterator[Finding]:
        """Scales of whole weights that make the engine round codes a second time."""
        groups: dict[str, list[tuple[str, float]]] = defaultdict(list)
        for name, module in self.modules.items():
            if stored := module.tensors.get("weight_scale"):
                scale = float(read_tensor(stored).reshape(()))
                groups[fused_siblings(name) or name].append((name, scale))
        unlike = [names for names in groups.values() if len({scale for _, scale in names}) > 1]
        small = [(name, s) for names in groups.values() for name, s in names if 0 < s < _SMALLEST]
        if unlike:
            first, a = unlike[0][0]
            second, b = next(entry for entry in unlike[0] if entry[1] != a)
            more = f" ({len(unlike) - 1} more like it)" if len(unlike) > 1 else ""
            what = (
                f"`{first}` has weight_scale {a:.6g} and `{second}` {b:.6g}{more}: the engine merges "
                "them, and rounds codes again to the larger scale"
            )
            yield noted("siblings", what)
        if small:
            name, scale = min(small, key=lambda entry: entry[1])
            what = (
                f"weight_scale is {scale:.3g}; the engine passes weights through float16 as it loads "
                f"them, and below {_SMALLEST:g} small codes are lost"
            )
            yield noted("siblings", what, f"`{name}`")

    def _experts(self) -> Iterator[Finding]:
        for refusal in expert_sets(self.labels):
            yield failed("experts", refusal.what, f"`{refusal.module}`", AGAIN)
        self.checked["experts"] += sum(bool(EXPERT.fullmatch(name)) for name in self.modules)
        yield from uneven_experts(self.checkpoint)

    def _loader(self) -> Iterator[Finding]:
        """What the engine never quantizes, and names that are nowhere."""
        self.checked["loader"] += len(self.labels)
        for name in self.modules:
            last = name.rpartition(".")[2]
            if last in ROUTERS or is_head(name):
                reason = ROUTERS.get(last, "the engine has no fp8 head")
                yield failed("loader", f"is fp8: {reason}", f"`{name}`", AGAIN)
