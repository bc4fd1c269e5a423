"""A checkpoint of `quant_method: gptq` on disk as vLLM would load it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

import torch

from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.detect import draft_of
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import FLOATS
from quantcli.checkpoint.tensors import read_span, read_tensor
from quantcli.core.findings import Finding, failed
from quantcli.targets.base import AGAIN
from quantcli.targets.gptq.config import METHOD, differences, read_config, settings_of
from quantcli.targets.gptq.kinds import OWN_SUFFIXES, Kind, layout_of, word_of_zero_points
from quantcli.targets.layouts import Sides, StoredModule
from quantcli.targets.spellings import draft_name, spellings
from quantcli.targets.stored_format import StoredFormat
from quantcli.targets.tensor_parallel import splits_inputs
from quantcli.targets.vllm_family import EXPERT, is_head, is_linear

_MASK = 2**32 - 1
_BLOCK = 2**18  # words of zero points that are read together


class GptqCheckpoint(StoredFormat):
    """Modules with a `qweight`, and the kinds that `quantization_config` gives them."""

    def read(self) -> list[Finding]:
        """The usual kind, and the rules for other modules."""
        self._config = read_config(settings_of(self.checkpoint) or Settings({"quant_method": METHOD}))
        self._kinds: dict[str, Kind] = {}
        self._draft = draft_of(self.checkpoint)
        self.readable = self._config.usual is not None or self._config.unchecked is not None
        return [*self._config.findings, *differences(self.checkpoint)]

    def check_parameters(self) -> Iterator[Finding]:
        """Quantized modules have what the engine registers, and it builds no other as quantized."""
        excluded: dict[str, list[str]] = defaultdict(list)
        for module, tensors in sorted(self.by_module.items()):
            weight, codes = tensors.get("weight"), tensors.get("qweight")
            if codes is None:
                if parts := sorted(tensors.keys() & OWN_SUFFIXES):
                    what = f"`{module}.{parts[0]}` belongs to no weight: `{module}.qweight` is missing"
                    yield failed("parameters", what, fix=AGAIN)
                elif weight is not None and is_linear(module, weight.spec.shape):
                    self.checked["parameters"] += 1
                    self.labels[module] = self.float_label
                    yield from self._float(module, weight)
                continue
            self.checked["parameters"] += 1
            if self._config.unchecked:
                self.labels[module] = self.unchecked[module] = self._config.unchecked
            elif reason := self._excluded(module):
                self.labels[module] = self.float_label
                excluded[reason].append(module)
            else:
                yield from self._quantized(module, codes)
        for reason, names in excluded.items():
            more = f"; {len(names) - 1} more like it" if len(names) > 1 else ""
            what = f"{reason}, but has qweight: the engine would find no place for its codes{more}"
            yield failed("loader", what, f"`{names[0]}`", AGAIN)

    def _excluded(self, module: str) -> str | None:
        """The reason why vLLM builds a module with codes as float; None if it does not."""
        if is_head(module) and not self._config.lm_head:
            return "`lm_head` in quantization_config is not true"
        if self._kind(module) is None:
            return "`dynamic` in quantization_config excludes it"
        if not self._listed(module):
            return "`modules_in_block_to_quantize` does not name it"
        return None

    def _listed(self, module: str) -> bool:
        """Whether vLLM takes a module for quantized by name; it derives a missing list from codes."""
        named = self._config.named
        if self._draft:
            return any(entry in draft_name(module, self._draft) for entry in named or ())
        if named is None or EXPERT.fullmatch(module):
            return True
        return any(entry in name for name in spellings(module) for entry in named)

    def _kind(self, module: str) -> Kind | None:
        """The kind that vLLM gives a module; None if it builds it as float."""
        return self._config.kind_for_engine(module, self._draft)

    def _float(self, module: str, weight: StoredTensor) -> Iterator[Finding]:
        """The finding for a float linear that the engine builds as quantized, or for codes in it."""
        if weight.spec.dtype not in FLOATS:
            what = f"is {weight.spec}, which this format does not have"
            yield failed("parameters", what, f"`{weight.spec.name}`", AGAIN)
        if self._kind(module) is None or self.float_only(module):
            return
        listed = self._config.named is not None and self._listed(module) and not is_head(module)
        if listed or EXPERT.fullmatch(module):
            what = f"is {weight.spec.dtype}, and quantization_config has it quantized"
            fix = "exclude it: add its name to `dynamic`, after `-:`"
            yield failed("loader", what, f"`{module}`", fix)

    def _quantized(self, module: str, codes: StoredTensor) -> Iterator[Finding]:
        kind = self._kind(module)
        assert kind is not None  # `_excluded` has looked
        faults = []
        if len(codes.spec.shape) == 2:
            n, k = layout_of(kind).sides(codes.spec.shape)
            if kind.group > 0 and k % kind.group:
                what = f"groups of {kind.group} columns do not divide {k}"
                faults.append(failed("parameters", what, f"`{module}`", AGAIN))
            if n % kind.each:
                what = f"{n} rows are not a multiple of {kind.each}, which share an int32"
                faults.append(failed("parameters", what, f"`{module}`", AGAIN))
            try:
                kind = replace(kind, act_order=self._act_order(module, kind, k))
            except ValueError as fault:
                faults.append(failed("parameters", str(fault), f"`{module}.g_idx`", AGAIN))
        self._kinds[module] = kind
        self.labels[module] = kind.label
        yield from self.check_layout(module, layout_of(kind), kind.numerics, faults=faults)

    def _act_order(self, module: str, kind: Kind, k: int) -> bool:
        """Whether columns are in other groups than those in which they stand.

        ValueError for groups that there are not, and for an order that vLLM would not see.
        """
        stored = self.by_module[module].get("g_idx")
        if stored is None or stored.spec.shape != (k,) or stored.spec.dtype not in {"I32", "I64"}:
            return False  # the check of the layout reports another shape
        if not k:
            return False
        index, groups = read_tensor(stored).long(), kind.groups(k)
        if bool(((index < 0) | (index >= groups)).any()):
            raise ValueError(f"tells groups from {int(index.min())} to {int(index.max())} of {groups}")
        if torch.equal(index, torch.arange(k) // -(-k // groups)):
            return False
        if not self._config.desc_act:
            raise ValueError("orders columns, and desc_act is not true: vLLM drops it")
        return True

    def check_siblings(self) -> Iterator[Finding]:
        """A module's own name has the kind that vLLM finds by the name of its siblings."""
        for name, kind in self._kinds.items():
            own = self._kind(name) if self._draft else self._config.kind_of(spellings(name))
            if own != replace(kind, act_order=False):
                what = f"`dynamic` makes it {own.label if own else 'float'} by its own name, and "
                what += f"{kind.label} by that under which vLLM fuses it"
                yield failed("siblings", what, f"`{name}`", AGAIN)

    def check_arithmetic(self, module: StoredModule) -> Iterator[Finding]:
        """Each zero point is the middle one: vLLM takes it for that, and others take what is stored."""
        kind = self._kinds[module.name]
        if not kind.symmetric:
            return
        stored, word = module.tensors["qzeros"], word_of_zero_points(kind)
        step = max(1, _BLOCK // max(1, stored.spec.shape[1]))
        for start in range(0, stored.spec.shape[0], step):
            bad = (read_span(stored, start, step) != word).nonzero()
            if len(bad):
                row, column = bad[0].tolist()
                value = int(read_span(stored, start + row, 1)[0, column])
                what = f"with `sym: true` and checkpoint_format {kind.version} each word is "
                what += f"{word & _MASK:#x}; this one is {value & _MASK:#x}"
                where = f"`{stored.spec.name}`[{start + row}, {column}]"
                yield failed("arithmetic", what, where, AGAIN)
                return

    def limits(self, module: StoredModule, sides: Sides, devices: int) -> Iterator[str]:
        """Groups and packed codes lie on one device each."""
        return limits(self._kinds[module.name], module.name, sides, devices)


def limits(kind: Kind, module: str, sides: Sides, devices: int) -> Iterator[str]:
    """Reasons why a module cannot be split; sides: n and k on one of the devices that share it."""
    n, k = sides
    inputs = devices > 1 and splits_inputs(module)
    share = math.lcm(kind.each, max(1, kind.group))
    if inputs and k % share:
        yield f"{kind.label} needs inputs in multiples of {share} on each device; there are {k}"
    if devices > 1 and not inputs and n % kind.each:
        needed = f"outputs in multiples of {kind.each}"
        yield f"{kind.label} needs {needed} on each device; there are {n}"
