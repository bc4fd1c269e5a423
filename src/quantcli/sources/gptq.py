"""GPTQ as AutoGPTQ and its successor write it: 4 or 8 bits, weights stored [k * bits / 32, n].

qweight: int32 [k * bits / 32, n], codes packed along k, the first in the lowest bits.
qzeros:  int32 [groups, n * bits / 32], packed along n. Version 1 stores the zero point less 1, modulo
         2^bits; `checkpoint_format: gptq_v2` stores it as it is.
scales:  float [groups, n].
g_idx:   int32 [k], the group of each column: with act-order, groups are not contiguous. Absent or
         empty: column i is in group i // g.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from quantcli.checkpoint.encoded import Encoded
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.codes import unpack_rows
from quantcli.core.errors import InputError
from quantcli.sources.base import AGAIN, Source, encoded, must_be
from quantcli.sources.columns import STRIP_BYTES, Columns
from quantcli.sources.grouped import FLOAT, GroupedModule, grouped_modules, open_rows

_FORMATS = {"gptq": 1, "gptq_v2": 0}  # -> added to stored zero points


def read(source: Source) -> Iterator[Encoded]:
    """Every GPTQ module. InputError for settings or tensors that do not fit."""
    bits = source.whole("bits")
    if bits not in {4, 8}:
        raise source.refused(f"GPTQ of {bits} bits: this version decodes 4 and 8", FLOAT)
    stored_as = source.word("checkpoint_format", "gptq")
    if stored_as not in _FORMATS or source.settings.get("is_marlin_format"):
        reason = stored_as if stored_as not in _FORMATS else "marlin"
        formats = " and ".join(f"`{name}`" for name in _FORMATS)
        raise source.refused(
            f"GPTQ in the layout `{reason:.40}`: this version decodes {formats}", FLOAT
        )
    group = source.whole("group_size")
    for module in grouped_modules(source, "GPTQ", bits, group, packed_along_k=True):
        n, k = module.shape
        parts: tuple[StoredTensor, ...] = module.parts
        index = module.tensors.get("g_idx")
        if index is not None:
            parts = (*parts, index)
            if index.spec.numel:
                must_be(index, ("I32", "I64"), (k,), f"GPTQ of {n} x {k}")
            else:
                index = None
        kind = module.kind + (" (v2)" if stored_as == "gptq_v2" else "")
        unpack = partial(_unpack, bits, _FORMATS[stored_as])
        opened = partial(open_rows, module, unpack, partial(_group_of, module, index))
        yield encoded(module.name, (n, k), parts, opened, kind, STRIP_BYTES)


def _group_of(module: GroupedModule, stored: StoredTensor | None) -> Tensor | None:
    """The group of each column, int64 [k]; None if groups are contiguous."""
    if stored is None:
        return None
    index, groups = read_tensor(stored).long(), module.parts[1].spec.shape[0]
    bad = ((index < 0) | (index >= groups)).nonzero()
    if len(bad):
        place = int(bad[0])
        raise InputError(
            f"group of a column is {int(index[place])}; there are {groups} groups",
            where=f"`{stored.spec.name}`[{place}] in {stored.file.name}",
            fix=AGAIN,
        )
    runs = torch.arange(module.shape[1]) // module.group
    return None if torch.equal(index, runs) else index


def _unpack(
    bits: int, added: int, codes: Columns, zeros: Columns, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """added: to stored zero points."""
    values = unpack_rows(codes.columns(start, stop), bits).float()
    each = 32 // bits
    first, last = start // each, -(-stop // each)
    packed = zeros.columns(first, last).t()  # [groups, words]
    points = unpack_rows(packed, bits).int()[:, start - first * each : stop - first * each]
    return values, points.add_(added).bitwise_and_(2**bits - 1).t().float()
