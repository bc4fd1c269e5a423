"""The results of calibration for the planner: statistics, and edits that keep the model's function."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import TensorSpec
from quantcli.checkpoint.tensors import read_tensor, tensor_bytes
from quantcli.core.errors import InputError
from quantcli.core.text import count

_ANEW = "calibrate again, in another folder"


@dataclass(frozen=True, slots=True)
class Edit:
    """The change of one stored tensor before it is quantized or copied; all in float32 files.

    rows:    factor of each row (of each element of a vector) [n].
    columns: factor of each column [k].
    value:   the whole new vector, in the tensor's dtype or float32; norms are small.
    """

    rows: StoredTensor | None = None
    columns: StoredTensor | None = None
    value: StoredTensor | None = None

    def load(self) -> EditFactors:
        """The factors, read from the calibration."""

        def read(stored: StoredTensor | None) -> Tensor | None:
            return None if stored is None else read_tensor(stored)

        return EditFactors(read(self.rows), read(self.columns), read(self.value))

    def digest(self) -> bytes:
        """sha256 of its factors and values."""
        digest = hashlib.sha256()
        for kind in ("rows", "columns", "value"):
            stored = getattr(self, kind)
            digest.update(kind.encode() + (b"" if stored is None else _content(stored)))
        return digest.digest()


def _check_spec(
    stored: StoredTensor | None, dtypes: tuple[str, ...], shape: tuple[int, ...], where: str
) -> None:
    """InputError for a tensor of a calibration with another dtype or shape than what it is for."""
    if stored is not None and (stored.spec.dtype not in dtypes or stored.spec.shape != shape):
        expected = f"{' or '.join(dtypes)} [{', '.join(map(str, shape))}]"
        what = f"the calibration has {stored.spec} here, and {expected} is asked for"
        raise InputError(what, where=f"{where}, in {stored.file}", fix=_ANEW)


@lru_cache(4096)  # all experts of a layer share the vector of their norm
def _content(stored: StoredTensor) -> bytes:
    return hashlib.sha256(tensor_bytes(read_tensor(stored))).digest()


@dataclass(frozen=True, slots=True)
class EditFactors:
    """An edit with its numbers."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    value: Tensor | None = None

    def apply(self, block: Tensor, start: int = 0) -> Tensor:
        """Rows [start, start + len(block)), edited: float32, or the dtype of a whole new value."""
        stop = start + len(block)
        if self.value is not None:
            return self.value[start:stop]
        edited = block.to(torch.float32, copy=True)
        if self.rows is not None:
            rows = self.rows[start:stop]
            edited *= rows.view(-1, *[1] * (edited.dim() - 1))
        if self.columns is not None:
            edited *= self.columns
        return edited


@dataclass(frozen=True)
class Basis:
    """What a calibration was made of, for manifests.

    text:      sha256 (hex) of the text: of the file's bytes, or of the rows as they were read; None if
               it is not known.
    tokenizer: sha256 (hex) of each file of the tokenizer, by name; empty for token ids.
    tool:      the versions that computed, as text.
    """

    text: str | None
    tokenizer: Mapping[str, str]
    tool: str

    def record(self, name: str, found: Mapping[str, bytes]) -> dict[str, Any]:
        """The entry of a manifest. name: of the text. found: sha256 of the statistics and edits that
        the conversion takes, by tensor: whatever else the calibration holds."""
        digest = hashlib.sha256()
        for tensor, content in sorted(found.items()):
            digest.update(f"{tensor}\0".encode() + content)
        return {
            "text": {"name": name, "sha256": self.text},
            "tokenizer": dict(sorted(self.tokenizer.items())),
            "statistics": digest.hexdigest(),
            "tool": self.tool,
        }


@dataclass(frozen=True)
class Measured:
    """A whole calibration.

    stats:     by module: names of statistics -> tensors on disk; none if they are not known.
    edits:     by stored tensor.
    edited:    groups of channels that methods have edited, counted by `MethodOptions.edited_as`.
    no_tokens: modules inside of the decoder stack that no token reached.
    taken_from: those of them that take statistics of others, and of which: a module, or a pattern.
    experts:   of each layer's experts the tokens that the router gave them, see `expert_tokens`.
    basis:     what it was made of; None if that is not known.
    folder:    where it is kept; None if it is nowhere.
    """

    stats: Mapping[str, Mapping[str, StoredTensor]] = field(default_factory=dict)
    edits: Mapping[str, Edit] = field(default_factory=dict)
    edited: Mapping[str, int] = field(default_factory=dict)
    no_tokens: tuple[str, ...] = ()
    taken_from: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, Any] = field(default_factory=dict)
    basis: Basis | None = None
    folder: Path | None = None

    def edit_of(self, stored: StoredTensor) -> Edit | None:
        """The edit of a stored tensor, if it has one. InputError for one of other dtypes or shapes."""
        edit, spec = self.edits.get(stored.spec.name), stored.spec
        if edit is None:
            return None
        # what is rotated is float32, and a calibration computes in the dtype of its source
        floats = tuple(sorted({spec.dtype, stored.parts[0].spec.dtype, "F32"}))
        for kind, dtypes, shape in (
            ("rows", ("F32",), spec.shape[:1]),
            ("columns", ("F32",), spec.shape[1:][-1:]),
            ("value", floats, spec.shape),
        ):
            _check_spec(getattr(edit, kind), dtypes, shape, f"`{spec.name}`, {kind} of its edit")
        return edit

    def stats_of(
        self, module: str, expected: Mapping[str, TensorSpec], where: str
    ) -> Mapping[str, StoredTensor]:
        """The statistics of a module that its scheme asks for; empty if none are known.

        where: its rule. InputError for those that are missing, or of other dtypes or shapes.
        """
        there = self.stats.get(module, {}) if expected else {}
        if not there:
            return {}
        if absent := expected.keys() - there.keys():
            what = f"the statistics of this module's input lack {', '.join(sorted(absent))}"
            raise InputError(what, where=f"`{module}` ({where})", fix=_ANEW)
        for name, spec in expected.items():
            place = f"`{module}`, {name} of its statistics"
            _check_spec(there[name], (spec.dtype,), spec.shape, place)
        return {name: there[name] for name in expected}

    def starved_experts(self) -> Iterator[str]:
        """A note on experts that the router gave few tokens, if they were not shown all of them."""
        starved = {
            name: layer["below_5_pct"]
            for name, layer in self.experts.items()
            if layer["below_5_pct"] and "shown" not in layer
        }
        if not starved:
            return
        numbers = [
            f"{', '.join(map(str, few[:5]))}{' and others' if len(few) > 5 else ''} of `{name}`"
            for name, few in list(starved.items())[:3]
        ]
        more = f" and {count(len(starved) - 3, 'layer')} more" if len(starved) > 3 else ""
        experts = count(sum(map(len, starved.values())), "expert")
        yield (
            f"{experts} got less than 5 % of the tokens that the experts of a layer get on average: "
            f"{'; '.join(numbers)}{more}. More samples help, or calibration.all_tokens"
        )
