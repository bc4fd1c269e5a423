"""Checkpoints of AMD Quark, whose config.json has settings for modules by name, by class, or for all.

Floats lie in rows: e4m3 with a scale per tensor, row or block; four bits with an exponent for every 32
columns; NVFP4 with `weight_scale_2` on top. int4 in groups lies [k, n / 8] as in AWQ, eight nibbles in
an int32, in AWQ's order or one after the other, by `pack_method`; those of `int4` are signed.
Sources: Quark 1d27b558, quark/torch/utils/pack.py and export/nn/modules/realquantizer.py; vllm 0.32.0,
model_executor/layers/quantization/quark/quark.py:420-830 and quark/schemes/.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from quantcli.checkpoint.columns import Columns, strip_bytes
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.encoded import Encoded
from quantcli.core.untrusted.patterns import glob_matches
from quantcli.sources import awq
from quantcli.sources.base import Source, SourceFormat, Tensors, encoded, needed, wrong
from quantcli.sources.blocks import Blocks, grouped, one_number, tiles_of
from quantcli.sources.float8 import block_of
from quantcli.sources.grouped import FLOAT, grouped_modules, open_rows

_UNUSED = ("input_scale", "input_scale_2", "input_zero_point", "weight_zero_point")
_INT4 = ("weight", "weight_scale", "weight_zero_point")
_ROWS = {"fp8_e4m3": "fp8", "int8": "int8"}  # types with a scale for all, for a row or a block


class Quark(SourceFormat):
    """What Quark exports under its own name."""

    name: ClassVar[str] = "quark"
    methods: ClassVar[frozenset[str]] = frozenset({"quark"})

    def read(self, source: Source) -> Iterator[Encoded]:
        """Every quantized module. InputError for formats that are not decoded."""
        settings = _Settings(source)
        for module, tensors in source.modules.items():
            weight = tensors.get("weight")
            if weight is not None and weight.spec.dtype in {"F8_E4M3", "I8", "U8"}:
                yield _module(settings, module, tensors)
        yield from _int4(settings)


@dataclass(frozen=True)
class _Settings:
    """The quantization config, untrusted."""

    source: Source

    def of(self, module: str) -> list[Settings]:
        """The settings of a module's weight: one entry, or one for each scale on top of the other."""
        entries = self._entry(module).listed("weight")
        if not entries:
            raise self.source.refused(f"says nothing of the weight of `{module}`, which has codes")
        return entries

    def _entry(self, module: str) -> Settings:
        """By name, by class, or that of all modules. Source: vllm, quark.py:640-720."""
        settings = self.source.settings
        for pattern, entry in settings.tables("layer_quant_config").items():
            if glob_matches(pattern, module) if "*" in pattern else module == pattern:
                return entry
        by_class = settings.table("layer_type_quant_config")
        linear = by_class.table("Linear") if by_class is not None else None
        return linear or settings.table("global_quant_config") or Settings({})

    @property
    def reordered(self) -> bool:
        """Whether nibbles of int4 are in AWQ's order."""
        export = self.source.settings.table("export") or Settings({})
        method = export.text("pack_method") or "reorder"
        if method not in {"reorder", "order"}:
            what = (
                f"`export.pack_method` is {reprlib.repr(method)}: this version decodes reorder, order"
            )
            raise self.source.refused(what, FLOAT)
        return method == "reorder"


def _word(source: Source, entry: Settings, key: str) -> str:
    return replace(source, settings=entry).word(key, "")


def _module(settings: _Settings, module: str, tensors: Tensors) -> Encoded:
    """A module whose codes lie in rows."""
    source, weight = settings.source, tensors["weight"]
    entries = settings.of(module)
    entry = entries[0]
    element, share = _word(source, entry, "dtype"), _word(source, entry, "qscheme")
    exponents = "e8m0" in (_word(source, entry, "scale_format"), _word(source, entry, "scale_type"))
    scale = needed(module, tensors, "weight_scale", weight)
    unused = [tensors[suffix] for suffix in _UNUSED if suffix in tensors]
    if element == "fp4" and share == "per_group":
        size = replace(source, settings=entry).whole("group_size")
        twice = len(entries) == 2
        if (size, twice) not in {(32, False), (16, True)}:
            raise source.refused(
                f"fp4 in groups of {size}: this version decodes MXFP4 and NVFP4", FLOAT
            )
        scales = ("F8_E4M3",) if twice else ("U8", "F8_E8M0")
        if weight.spec.dtype != "U8":
            raise wrong(weight, f"is {weight.spec}; fp4 has two codes in each U8")
        grouped(weight, scale, "fp4_e2m1", size, scales)
        whole = one_number(needed(module, tensors, "weight_scale_2", weight)) if twice else None
        kind = f"quark {'nvfp4' if twice else 'mxfp4'} in groups of {size}"
        blocks = Blocks(weight, "fp4_e2m1", scale, (1, size), whole)
        return blocks.encoded(module, kind, unused)
    if element not in _ROWS or len(entries) > 1:
        what = f"`{module}` has weights of {element!r:.40}: this version decodes fp8_e4m3, fp4, int8, "
        raise source.refused(what + "and int4 and uint4 in groups", FLOAT)
    if weight.spec.dtype != {"fp8_e4m3": "F8_E4M3", "int8": "I8"}[element]:
        raise source.contradicted(weight, f"weights are {element}")
    if element == "int8" and entry.value("symmetric") is not True:
        raise source.refused(f"`{module}` has asymmetric int8, which is not decoded", FLOAT)
    if share == "per_group":
        size = replace(source, settings=entry).whole("group_size")
        if element != "fp8_e4m3" or size != 32 or not exponents:
            what = f"`{module}` has {element} in groups of {size}: this version decodes MXFP8"
            raise source.refused(what, FLOAT)
        grouped(weight, scale, element, size, ("U8", "F8_E8M0"))
        kind = f"quark mxfp8 in groups of {size}"
        return Blocks(weight, element, scale, (1, size)).encoded(module, kind, unused)
    block = None
    if share == "per_block":
        block = block_of(replace(source, settings=entry), "block_size")
        if block is None:
            raise source.refused(f"`{module}` has blocks without a `block_size`")
    sides = Blocks(weight, element, scale, (1, 1)).shape
    scale, tile, shared = tiles_of(source, scale, sides, block)
    kind = f"quark {_ROWS[element]} {shared}"
    return Blocks(weight, element, scale, tile).encoded(module, kind, unused)


def _int4(settings: _Settings) -> Iterator[Encoded]:
    """Every module of int4 in groups."""
    source = settings.source

    def numbers(name: str) -> tuple[int, int]:
        entry = settings.of(name)[0]
        element, share = _word(source, entry, "dtype"), _word(source, entry, "qscheme")
        if element not in {"int4", "uint4"} or share != "per_group":
            what = (
                f"`{name}` has {element!r:.40} {share!r:.40} in int32: this version decodes int4 and "
            )
            raise source.refused(what + "uint4 in groups", FLOAT)
        return 4, replace(source, settings=entry).whole("group_size")

    order = awq.ORDER if settings.reordered else range(8)
    found = grouped_modules(source, "int4", numbers, packed_along_k=False, names=_INT4, zeros=False)
    for module in found:
        signed = _word(source, settings.of(module.name)[0], "dtype") == "int4"
        if not signed and len(module.parts) < 3:
            needed(module.name, module.tensors, _INT4[2], module.parts[0])
        opened = partial(open_rows, module, _Unpack(tuple(order), signed))
        unused = [module.tensors[s] for s in _UNUSED if s in module.tensors and s not in _INT4]
        kind = f"quark {module.kind}"
        parts = (*module.parts, *unused)
        yield encoded(module.name, module.shape, parts, opened, kind, strip_bytes(parts[0]))


@dataclass(frozen=True)
class _Unpack:
    """Unpacks rows of a module; see `Unpack` in sources/grouped.py.

    order:  the output channel of each nibble of a word.
    signed: nibbles are numbers of -8 to 7.
    """

    order: tuple[int, ...]
    signed: bool

    def __call__(
        self, codes: Columns, zeros: Columns | None, start: int, stop: int
    ) -> tuple[Tensor, Tensor | None]:
        """Codes and zero points of rows [start, stop)."""
        values = self._rows(codes, start, stop)
        return values, None if zeros is None else self._rows(zeros, start, stop)

    def _rows(self, words: Columns, start: int, stop: int) -> Tensor:
        first, last = start // 8, -(-stop // 8)
        nibbles = awq.nibbles(words.columns(first, last), self.order)
        if self.signed:
            nibbles[nibbles > 7] -= 16
        return nibbles[start - 8 * first : stop - 8 * first]
