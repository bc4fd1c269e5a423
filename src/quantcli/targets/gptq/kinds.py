"""Numerics that are stored under `quant_method: gptq`, and the parameters that engines register.

All matrices lie as [k, n]: the rows of a weight are their columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantcli.core.codes import scale_groups, unpack_rows, unpack_signed
from quantcli.core.errors import InputError
from quantcli.core.numerics import Numerics, Operand
from quantcli.targets.base import SUPPORT, cannot_store
from quantcli.targets.layouts import FLOAT_PARAM, Blocks, Layout, Param, Sides

WHOLE_ROWS = -1  # a group_size
# Values of group_size that engines take.
# Source: vllm 0.32.0, model_executor/layers/quantization/utils/marlin_utils.py:35, asked for every
# linear by auto_gptq.py:317.
GROUP_SIZES = (32, 64, 128, WHOLE_ROWS)
# By checkpoint_format, what is added to a stored zero point. The first version stores it less 1.
# Source: gptqmodel 021b65e2fd, models/loader.py and utils/model.py (convert_gptq_v1_to_v2_format).
VERSIONS = {"gptq": 1, "gptq_v2": 0}
# Tensors next to codes that only this format has; other modules may have `scales`.
OWN_SUFFIXES = frozenset({"qzeros", "g_idx"})
_TURING = "NVIDIA GPUs (Turing and later)"
# Source: vllm 0.32.0, model_executor/layers/quantization/utils/marlin_utils.py:48-113: CPUs have a
# kernel for 4 bits alone. transformers loads the format by means of gptqmodel.
_LOADS_ON = {
    4: f"vLLM 0.32 and later, SGLang, gptqmodel, TGI, ExLlama; {_TURING}, CPUs",
    8: f"vLLM 0.32 and later, SGLang, gptqmodel, TGI; {_TURING}",
}


@dataclass(frozen=True)
class Kind:
    """How one module is stored.

    group:     columns of a row that share a scale; WHOLE_ROWS: all.
    symmetric: each zero point is 2^(bits - 1); engines then do not look at stored ones.
    version:   a key of VERSIONS.
    act_order: columns are not in the groups in which they stand: g_idx tells the group of each.
    """

    bits: int
    group: int
    symmetric: bool = True
    version: str = "gptq"
    act_order: bool = False

    @property
    def each(self) -> int:
        """Codes in one int32."""
        return 32 // self.bits

    @property
    def label(self) -> str:
        """Such as `int4 g128 W4A16`: the format has no names of its own."""
        share = "channel" if self.group == WHOLE_ROWS else f"g{self.group}"
        more = " asymmetric" * (not self.symmetric) + " act-order" * self.act_order
        return f"int{self.bits} {share} W{self.bits}A16{more}"

    @property
    def operand(self) -> Operand:
        """The weights."""
        dtype = f"int{self.bits}"
        if self.group == WHOLE_ROWS:
            return Operand(dtype, "channel", self.symmetric)
        return Operand(dtype, "group", self.symmetric, block=(1, self.group))

    @property
    def numerics(self) -> Numerics | None:
        """As engines compute; None with act-order, which no other format has."""
        return None if self.act_order else Numerics(self.operand, None)

    def groups(self, k: int) -> int:
        """Scales of a row."""
        return 1 if self.group == WHOLE_ROWS else -(-k // self.group)


def kind_of(numerics: Numerics) -> Kind:
    """The kind of numerics that are written. InputError for others, with the reason."""
    weight, group = numerics.weight, numerics.weight.group_size or WHOLE_ROWS
    bits = {"int4": 4, "int8": 8}.get(weight.dtype)
    if bits is None:
        what = f"target `gptq` stores int4 and int8 weights, not {weight.dtype}"
    elif numerics.input is not None:
        what = "target `gptq` cannot store how inputs are quantized: its engines keep them float"
    elif not weight.symmetric:
        what = (
            "target `gptq` stores symmetric weights: vLLM reads no others in this format "
            "(model_executor/layers/quantization/auto_gptq.py:98-103 of 0.32.0)"
        )
    elif numerics != Numerics(Kind(bits, group).operand, None):
        raise cannot_store("gptq", numerics)
    else:
        if group in GROUP_SIZES:
            return Kind(bits, group)
        sizes = ", ".join(map(str, GROUP_SIZES[:-1]))
        what = f"target `gptq` stores groups of {sizes} columns, or whole rows, not groups of {group}"
    raise InputError(what, fix=SUPPORT)


def loads_on(label: str) -> str:
    """Engines and hardware for a label."""
    return _LOADS_ON[4 if label.startswith("int4") else 8]


@cache
def layout_of(kind: Kind) -> Layout:
    """The parameters of modules of this kind, and the weight that they stand for.

    qweight: int32 [k * bits / 32, n]: codes with 2^(bits - 1) added, packed along k, the first in the
             lowest bits.
    scales:  [k / group, n], of either sign; engines hold them in the serving dtype.
    qzeros:  int32 [k / group, n * bits / 32]: zero points, packed along n.
    g_idx:   int32 [k], the group of each column.

    Sources: vllm 0.32.0, model_executor/layers/quantization/auto_gptq.py:376-424, for experts :513-589.
    vLLM drops g_idx (base_config.py:251-256) and TGI stops without it, act-order or not:
    text-generation-inference 0229c71b21, server/text_generation_server/layers/gptq/__init__.py.
    """
    bits, each = kind.bits, kind.each
    params = (
        Param("qweight", ("I32",), lambda n, k: (-(-k // each), n), "codes", axis=1, part="weight"),
        Param(
            "scales",
            FLOAT_PARAM,
            lambda n, k: (kind.groups(k), n),
            "signed",
            axis=1,
            part="weight_scale",
        ),
        Param("qzeros", ("I32",), lambda n, k: (kind.groups(k), -(-n // each)), "codes", each, axis=1),
        Param("g_idx", ("I32", "I64"), lambda n, k: (k,), "codes", 0, required=kind.act_order),
    )

    def dequantize(blocks: Blocks) -> Tensor:
        k = each * len(blocks["qweight"])
        values = unpack_signed(blocks["qweight"].t().contiguous(), bits, k).float()
        scale = blocks["scales"].t().float()
        group = k if kind.group == WHOLE_ROWS else kind.group
        index = torch.arange(k) // group
        if kind.act_order:
            index = blocks["g_idx"].long()
        if not kind.symmetric:
            points = zero_points(blocks["qzeros"], bits, VERSIONS[kind.version])[: len(values)]
            values -= (points - 2 ** (bits - 1)).float().index_select(1, index)
        if kind.act_order:
            return values.mul_(scale.index_select(1, index))
        return scale_groups(values, scale.contiguous(), group)

    def sides(shape: tuple[int, ...]) -> Sides:
        return shape[1], each * shape[0]

    return Layout(kind.label, kind.operand, params, dequantize, sides, experts=True)


def zero_points(packed: Tensor, bits: int, added: int) -> Tensor:
    """Zero points as engines take them: int32 [groups, words] -> int32 [words * 32 / bits, groups].

    added: of VERSIONS.
    """
    points = unpack_rows(packed.contiguous(), bits).int()
    return points.add_(added).bitwise_and_(2**bits - 1).t()


def word_of_zero_points(kind: Kind) -> int:
    """The int32 that holds nothing but the zero points of symmetric weights, as stored."""
    point = 2 ** (kind.bits - 1) - VERSIONS[kind.version]
    word: int = sum(point << place for place in range(0, 32, kind.bits))
    return word - 2**32 if word >= 2**31 else word
