"""Checkpoints of auto-round: `packing_format` names the format of another tool that they follow.

Integers lie as in GPTQ or AWQ. `auto_round:auto_gptq` stores a zero point less 1; a format that names
neither stores it as it is. Floats of a block lie as in compressed-tensors, FP8 as in DeepSeek's.
Sources: auto-round b9f3d007, auto_round/export/export_to_autoround/export.py:55-92,
qlinear_fp.py:60-200, export_to_fp8.py:50-110; vllm 0.32.0,
model_executor/layers/quantization/inc/config_parser.py:85-240.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import ClassVar

from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.encoded import Encoded
from quantcli.core.untrusted.patterns import Budget, Expression
from quantcli.sources import awq, float8, gptq
from quantcli.sources.base import Source, SourceFormat, needed, wrong
from quantcli.sources.blocks import Blocks, grouped, one_number
from quantcli.targets.gptq.kinds import Kind

_BITS = {"gptq": (4, 8), "awq": (4,)}
_OF_INPUTS = ("input_global_scale", "input_scale")
_SPECIAL = frozenset("*+?^$()[]{}|\\")  # a key with one of these is a regular expression


class AutoRound(SourceFormat):
    """The formats that auto-round writes under its own name."""

    name: ClassVar[str] = "auto-round"
    methods: ClassVar[frozenset[str]] = frozenset({"auto-round", "auto_round", "intel/auto-round"})
    own_file: ClassVar[str] = "quantization_config.json"

    def read(self, source: Source) -> Iterator[Encoded]:
        """Every quantized module."""
        for key in ("rotation_config", "transform_config"):
            if source.settings.value(key):
                raise source.refused(f"has a `{key}`: rotated weights are not decoded", float8.FLOAT)
        form = source.word("packing_format", source.word("backend", "auto_round:auto_gptq"))
        numbers = source.word("data_type", "int")
        if numbers.startswith(("mx_fp", "nv_fp")):
            yield from _blocks(source, numbers)
        elif numbers in {"fp", "fp8"}:
            block = float8.block_of(source, "group_size") if _is_pair(source) else None
            sides = None if block is None else list(block)
            yield from float8.read(replace(source, settings=Settings({"weight_block_size": sides})))
        elif numbers != "int":
            raise source.refused(f"`data_type` is {numbers!r:.40}, which is not decoded", float8.FLOAT)
        elif "awq" in form:
            kind_of = _by_name(source, "awq")
            yield from awq.read(source, lambda name: (kind_of(name).bits, kind_of(name).group))
        else:
            version = "gptq" if "gptq" in form and "gptqmodel" not in form else "gptq_v2"
            yield from gptq.read(source, _by_name(source, "gptq"), version)


def _is_pair(source: Source) -> bool:
    return isinstance(source.settings.value("group_size"), list)


def _by_name(source: Source, layout: str) -> Callable[[str], Kind]:
    """The kind of a module by its name: `extra_config` has exceptions.

    InputError for bits that the layout does not have here.
    """
    symmetric = source.settings.value("sym") is not False
    usual = Kind(source.whole("bits"), source.whole("group_size"), symmetric)
    exceptions = _Exceptions(source, source.settings.tables("extra_config"))

    @cache
    def kind_of(name: str) -> Kind:
        own = replace(source, settings=exceptions.of(name))
        bits, group = (
            own.whole("bits", default=usual.bits),
            own.whole("group_size", default=usual.group),
        )
        asked = own.settings.flag("sym")
        kind = Kind(bits, group, usual.symmetric if asked is None else asked)
        if bits not in _BITS[layout]:
            choices = " and ".join(map(str, _BITS[layout]))
            what = f"`{name}` has {bits} bits: this version decodes {choices} of {layout.upper()}"
            raise source.refused(what, float8.FLOAT)
        return kind

    return kind_of


class _Exceptions:
    """The entries of `extra_config`, by names, by ends of names, and by regular expressions.

    InputError for a key that is not an expression, or takes too much.
    """

    def __init__(self, source: Source, extra: Mapping[str, Settings]) -> None:
        self._extra, budget = extra, Budget()
        where = f"`extra_config` of {source.where} in {source.checkpoint.path}"
        special = (key for key in extra if _SPECIAL & set(key))
        self._expressions = {key: Expression(key, where, budget=budget) for key in special}

    def of(self, name: str) -> Settings:
        """The entry of a module; empty if it has none."""
        if name in self._extra:
            return self._extra[name]
        found = (table for key, table in self._extra.items() if self._is_of(key, name))
        return next(found, Settings({}))

    def _is_of(self, key: str, name: str) -> bool:
        expression = self._expressions.get(key)
        return bool(expression.search(name) if expression else name.endswith(f".{key}"))


def _blocks(source: Source, numbers: str) -> Iterator[Encoded]:
    """Every module of MXFP4, MXFP8 or NVFP4, by its tensors."""
    wide = numbers.startswith("nv_fp")
    columns, scales = (16, ("F8_E4M3",)) if wide else (32, ("U8", "F8_E8M0"))
    for module, tensors in source.modules.items():
        packed, plain = tensors.get("weight_packed"), tensors.get("weight")
        if plain is not None and plain.spec.dtype == "F8_E4M3":
            codes, element, name = plain, "fp8_e4m3", "mxfp8"
        elif packed is not None:
            codes, element, name = packed, "fp4_e2m1", "nvfp4" if wide else "mxfp4"
        else:
            continue
        if packed is not None and packed.spec.dtype != "U8":
            raise wrong(packed, f"is {packed.spec}; {name} has two codes in each U8")
        scale = needed(module, tensors, "weight_scale", codes)
        grouped(codes, scale, element, columns, scales)
        whole = one_number(needed(module, tensors, "weight_global_scale", codes)) if wide else None
        blocks = Blocks(codes, element, scale, (1, columns), whole, divides=True)
        unused = [tensors[suffix] for suffix in _OF_INPUTS if suffix in tensors]
        yield blocks.encoded(module, f"{name} in groups of {columns}", unused)
