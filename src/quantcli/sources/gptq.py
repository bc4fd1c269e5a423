"""GPTQ as AutoGPTQ and its successor write it: 4 or 8 bits, weights stored [k * bits / 32, n].

qweight: int32 [k * bits / 32, n], codes packed along k, the first in the lowest bits.
qzeros:  int32 [groups, n * bits / 32], packed along n. Version 1 stores the zero point less 1, modulo
         2^bits; `checkpoint_format: gptq_v2` stores it as it is.
scales:  float [groups, n].
g_idx:   int32 [k], the group of each column: with act-order, groups are not contiguous. Absent or
         empty: column i is in group i // g.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from quantcli.checkpoint.columns import Columns, strip_bytes
from quantcli.checkpoint.encoded import Encoded
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.codes import unpack_rows
from quantcli.core.errors import InputError
from quantcli.sources.base import AGAIN, Source, SourceFormat, encoded, must_be, wrong
from quantcli.sources.grouped import FLOAT, GroupedModule, grouped_modules, open_rows
from quantcli.targets.gptq.config import read_config
from quantcli.targets.gptq.kinds import VERSIONS, Kind, zero_points


class Gptq(SourceFormat):
    """GPTQ of 4 and 8 bits, in both versions of its zero points."""

    name: ClassVar[str] = "gptq"
    methods: ClassVar[frozenset[str]] = frozenset({"gptq"})
    own_file: ClassVar[str] = "quantize_config.json"

    def read(self, source: Source) -> Iterator[Encoded]:
        """Every GPTQ module."""
        bits = source.whole("bits")
        if bits not in {4, 8}:
            raise source.refused(f"GPTQ of {bits} bits: this version decodes 4 and 8", FLOAT)
        stored_as = source.word("checkpoint_format", "gptq")
        if stored_as not in VERSIONS or source.settings.value("is_marlin_format"):
            reason = stored_as if stored_as not in VERSIONS else "marlin"
            formats = " and ".join(f"`{name}`" for name in VERSIONS)
            raise source.refused(
                f"GPTQ in the layout `{reason:.40}`: this version decodes {formats}", FLOAT
            )
        usual = Kind(bits, source.whole("group_size"), source.settings.value("sym") is True)
        kind_of = _by_name(source) if source.settings.value("dynamic") else lambda _: usual
        yield from read(source, kind_of, stored_as)


def read(source: Source, kind_of: Callable[[str], Kind], stored_as: str) -> Iterator[Encoded]:
    """Every module with a `qweight`.

    kind_of:   the kind of a module by its name.
    stored_as: the key of VERSIONS that the settings name.
    """
    checked = False

    def numbers(name: str) -> tuple[int, int]:
        return kind_of(name).bits, kind_of(name).group

    for module in grouped_modules(source, "GPTQ", numbers, packed_along_k=True):
        n, k = module.shape
        symmetric = kind_of(module.name).symmetric
        middle = 2 ** (module.bits - 1) if symmetric else None
        if not checked and symmetric:
            stored_as = _layout_of(source, module, stored_as)
        elif not checked:
            source.notes.extend(_doubt(module, stored_as, source.where))
        checked = True
        parts: tuple[StoredTensor, ...] = module.parts
        index = module.tensors.get("g_idx")
        if index is not None:
            parts = (*parts, index)
            if index.spec.numel:
                must_be(index, ("I32", "I64"), (k,), f"GPTQ of {n} x {k}")
            else:
                index = None
        kind = module.kind + (" (v2)" if stored_as == "gptq_v2" else "")
        unpack = _Unpack(module, VERSIONS[stored_as], middle)
        opened = partial(open_rows, module, unpack, partial(_group_of, module, index))
        yield encoded(module.name, (n, k), parts, opened, kind, strip_bytes(parts[0]))


def _by_name(source: Source) -> Callable[[str], Kind]:
    """The kind of a module by its name, if `dynamic` has some of another kind."""
    config = read_config(source.settings)
    for finding in config.findings:
        if finding.severity == "error":
            raise source.refused(finding.what.removeprefix("quantization_config "))

    def kind_of(module: str) -> Kind:
        kind = config.kind_for_engine(module)
        if kind is None:
            raise source.refused(f"`dynamic` excludes `{module}`, which has codes")
        return kind

    return kind_of


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


def _layout_of(source: Source, module: GroupedModule, declared: str) -> str:
    """The layout that the zero points of a symmetric module fit; with a note if it is not the declared.

    InputError if they fit none. With `sym: true` each zero point is 2^(bits - 1), and version 1 stores
    it less 1: decoded as the other version, every weight would be wrong by one step.
    """
    stored, bits = module.parts[2], module.bits
    words = read_tensor(stored)
    points = unpack_rows(words, bits).int()[:, : module.shape[0]]
    for layout in sorted(VERSIONS, key=lambda layout: layout != declared):
        if bool((points + VERSIONS[layout] == 2 ** (bits - 1)).all()):
            if layout != declared:
                source.notes.append(
                    f"zero points are read as {layout}: {source.where} declares {declared} with "
                    f"`sym: true`, and `{stored.spec.name}` holds {int(points[0, 0])}"
                )
            return layout
    odd = (points + VERSIONS[declared] != 2 ** (bits - 1)).nonzero()[0].tolist()
    value = int(points[tuple(odd)])
    raise source.contradicted(stored, f"`sym: true` has one zero point, and [{odd[0]}] holds {value}")


_ROWS = 64  # of a module: enough for a mean
_FEWEST = 256  # zero points, whose mean is then within a few tenths of a step


def _doubt(module: GroupedModule, declared: str, where: str) -> Iterator[str]:
    """A note if a module's weights are one step off on average, and none in the other layout.

    Without `sym: true` any zero point is possible, but weights average out to nearly nothing.
    """
    codes, _, zeros = map(Columns, module.parts)
    with codes, zeros:
        rows = min(_ROWS, module.shape[0])
        values, points = _Unpack(module, VERSIONS[declared], None)(codes, zeros, 0, rows)
    other = next(layout for layout in VERSIONS if layout != declared)
    off = float(values.mean() - points.mean())
    other_off = off + VERSIONS[declared] - VERSIONS[other]
    if points.numel() >= _FEWEST and abs(off) > 0.75 and abs(other_off) < 0.25:
        yield (
            f"`{module.name}` looks like {other}: its weights are off by {off:+.2f} steps on average, "
            f"as {other} by {other_off:+.2f}; if so, set `checkpoint_format: {other}` in {where}"
        )


@dataclass(frozen=True)
class _Unpack:
    """Unpacks rows of a module; see `Unpack`.

    added:  to stored zero points.
    middle: what each zero point must be then; None if they are not symmetric.
    """

    module: GroupedModule
    added: int
    middle: int | None

    def __call__(self, codes: Columns, zeros: Columns, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Codes and zero points of rows [start, stop)."""
        bits, middle = self.module.bits, self.middle
        values = unpack_rows(codes.columns(start, stop), bits).float()
        each = 32 // bits
        first, last = start // each, -(-stop // each)
        packed = zeros.columns(first, last).t()  # [groups, words]
        points = zero_points(packed, bits, self.added)[start - first * each : stop - first * each]
        if middle is not None and bool((points != middle).any()):
            row, group = (points.t() != middle).nonzero()[0].tolist()[::-1]
            what = f"zero point of row {start + row} is {int(points[row, group])}"
            raise wrong(self.module.parts[2], f"{what}; with `sym: true` each is {middle}")
        return values, points.float()
