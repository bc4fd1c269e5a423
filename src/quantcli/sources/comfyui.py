"""Checkpoints of ComfyUI: `X.comfy_quant` next to `X.weight` names the format of a module.

It is JSON in uint8, such as {"format": "nvfp4"}; older files have all of them in the metadata of the
header, under `_quantization_metadata`. Block scales are swizzled, and of two codes in a byte that of
the even column is in the high four bits. Sources: ComfyUI 5522e4fd, comfy/ops.py
(_load_quantized_module) and QUANTIZATION.md; comfy-kitchen 7d86acf,
comfy_kitchen/backends/eager/quantization.py:118-370 and float_utils.py:292-350.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.detect import is_quantized
from quantcli.checkpoint.encoded import Encoded
from quantcli.checkpoint.header import StoredTensor, read_header
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.errors import InputError
from quantcli.core.number_types import ELEMENTS
from quantcli.core.untrusted.tables import parse_table
from quantcli.sources.base import AGAIN, Source, SourceFormat, Tensors, matrix, needed, wrong
from quantcli.sources.blocks import Blocks, as_swizzled, one_number, tiles_of, with_shape

_FLOAT = "start from the float checkpoint"
_MARK = "comfy_quant"
_LONGEST = 64 * 2**10  # bytes of such a JSON
_METADATA = "_quantization_metadata"
_UNUSED = ("input_scale", "weight_scalar")  # the second: a scale for chips without block scales


@dataclass(frozen=True)
class _Format:
    """How a format stores a module.

    columns: of a group with a scale, which is swizzled; 0: one scale for all, or for each row.
    scales:  dtype of block scales; uint8 holds the same bits.
    whole:   there is a `weight_scale_2` on top.
    """

    element: str
    columns: int = 0
    scales: str = ""
    whole: bool = False


_FORMATS = {
    "float8_e4m3fn": _Format("fp8_e4m3"),
    "float8_e5m2": _Format("fp8_e5m2"),
    "int8_tensorwise": _Format("int8"),
    "mxfp8": _Format("fp8_e4m3", 32, "F8_E8M0"),
    "hybrid_mxfp8": _Format("fp8_e4m3", 32, "F8_E8M0"),
    "nvfp4": _Format("fp4_e2m1", 16, "F8_E4M3", whole=True),
}


class ComfyUi(SourceFormat):
    """ComfyUI's own format."""

    name: ClassVar[str] = "comfyui"
    methods: ClassVar[frozenset[str]] = frozenset({"comfyui", _MARK})
    suffixes: ClassVar[frozenset[str]] = frozenset({_MARK})

    def shows(self, checkpoint: Checkpoint) -> bool:
        """Whether a tensor or a header names formats."""
        if any(name.endswith(f".{_MARK}") for name in checkpoint.tensors):
            return True
        return any(is_quantized(spec) for spec in checkpoint.specs()) and bool(_metadata(checkpoint))

    def read(self, source: Source) -> Iterator[Encoded]:
        """Every module with a format."""
        by_header = _metadata(source.checkpoint)
        for module, tensors in source.modules.items():
            mark = tensors.get(_MARK)
            if mark is None and module not in by_header:
                continue
            if "weight" not in tensors:
                if mark is None:
                    continue
                raise wrong(mark, f"names a format, and `{module}.weight` is missing")
            settings = by_header[module] if mark is None else _json(mark)
            yield _module(source, module, tensors, settings)


def _module(source: Source, module: str, tensors: Tensors, settings: Settings) -> Encoded:
    """The weight of a module. settings: untrusted."""
    weight = tensors["weight"]
    name = settings.text("format")
    form = _FORMATS.get(name or "")
    if form is None:
        what = f"has the format {reprlib.repr(name)}: this version decodes {', '.join(_FORMATS)}"
        raise wrong(weight, what, _FLOAT)
    params = settings.table("params")
    rotated = settings.value("convrot") or (params is not None and params.value("convrot"))
    if rotated or "pre_quant_scale" in tensors:
        what = "is rotated (convrot)" if rotated else f"has a `{module}.pre_quant_scale` for its inputs"
        raise wrong(weight, f"{what}, which is not decoded", _FLOAT)
    element = ELEMENTS[form.element]
    if weight.spec.dtype != element.dtype:
        raise wrong(weight, f"is {weight.spec}; {name} has codes in {element.dtype}")
    n, stored = matrix(weight)
    k = stored * element.per_byte
    scale = needed(module, tensors, "weight_scale", weight)
    unused = [tensors[suffix] for suffix in (*_UNUSED, _MARK) if suffix in tensors]
    kind = f"comfyui {name}"
    if not form.columns:
        scale, tile, shared = tiles_of(source, scale, (n, k), None)
        kind = f"{kind} {shared}"
        return Blocks(weight, form.element, scale, tile).encoded(module, kind, unused)
    if k % form.columns:
        raise wrong(weight, f"is {weight.spec}: groups of {form.columns} columns do not divide {k}")
    if scale.spec.dtype not in {form.scales, "U8"}:
        raise wrong(scale, f"is {scale.spec}; {name} has scales in {form.scales} or U8")
    scale = as_swizzled(scale, n, k // form.columns)
    scale = with_shape(scale, scale.spec.shape, form.scales)
    whole = one_number(needed(module, tensors, "weight_scale_2", weight)) if form.whole else None
    blocks = Blocks(
        weight, form.element, scale, (1, form.columns), whole, high_first=form.whole, swizzled=True
    )
    return blocks.encoded(module, kind, unused)


def _json(mark: StoredTensor) -> Settings:
    """The object of the JSON in a tensor; InputError for anything else in it."""
    if mark.spec.dtype != "U8" or not 0 < mark.spec.nbytes <= _LONGEST:
        raise wrong(mark, f"is {mark.spec}; it is a short JSON in U8")
    data = bytes(read_tensor(mark).flatten().tolist())
    where = f"`{mark.spec.name}` in {mark.file.name}"
    return Settings(parse_table(data, where, AGAIN).value, where)


def _metadata(checkpoint: Checkpoint) -> Mapping[str, Settings]:
    """The settings of modules in the metadata of headers, by name; untrusted."""
    found: dict[str, Settings] = {}
    for file in sorted({stored.file for stored in checkpoint.tensors.values()}):
        text = read_header(file)[1].get(_METADATA)
        if text is None:
            continue
        where = f"`{_METADATA}` in the header of {file.name}"
        table = Settings(parse_table(text.encode(), where, AGAIN).value, where)
        if "layers" not in table:
            raise InputError("has no object `layers`", where=where, fix=AGAIN)
        found |= table.tables("layers")
    return found
