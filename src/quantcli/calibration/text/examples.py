"""Calibration data that a Python program holds in memory: token ids or text."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantcli.core.errors import InputError

NAME = "example_inputs"  # in place of the name of a file
_FIX = "give lists of token ids, tensors, dicts with input_ids, or texts"
_MAX_ID = 2**31 - 1


@dataclass(frozen=True)
class Examples:
    """Samples in memory, each of its own length: token ids, or texts for the model's tokenizer."""

    ids: tuple[array[int], ...] = ()
    texts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids) or len(self.texts)

    @property
    def length(self) -> int | None:
        """Tokens of the longest sample; None for texts."""
        return max(map(len, self.ids)) if self.ids else None

    @property
    def digest(self) -> str:
        """sha256 (hex) of the samples."""
        samples: Sequence[Any] = [ids.tolist() for ids in self.ids] or self.texts
        return hashlib.sha256(json.dumps(["examples", *samples]).encode()).hexdigest()

    @property
    def overrides(self) -> tuple[str, ...]:
        """What a recipe's `calibration` becomes: all samples are taken, each on its own."""
        length = () if self.length is None else (f"length={max(2, self.length)}",)
        keys = f"data={NAME}", "pack=false", f"samples={len(self)}", *length
        return tuple(f"calibration.{key}" for key in keys)

    @classmethod
    def of(cls, value: Any) -> Examples:
        """The samples in what a program gives.

        value: texts; or samples of token ids: a list of ints, a tensor [tokens] or [samples, tokens],
        or a dict such as a tokenizer returns, with `input_ids` and perhaps `attention_mask`. Padding is
        left out. Raises InputError for anything else.
        """
        if isinstance(value, str):
            raise InputError(f"`{NAME}` is one text, not a list of them", where=NAME, fix=_FIX)
        items = [value] if isinstance(value, Mapping) or hasattr(value, "tolist") else value
        if not isinstance(items, Iterable):
            raise InputError(f"`{NAME}` is a {type(value).__name__}", where=NAME, fix=_FIX)
        items = list(items)
        if items and all(isinstance(item, str) for item in items):
            return cls(texts=tuple(items))
        ids = tuple(sample for number, item in enumerate(items) for sample in _samples(item, number))
        if not ids:
            raise InputError(f"`{NAME}` is empty", where=NAME, fix=_FIX)
        return cls(ids=ids)


def _samples(item: Any, number: int) -> Iterator[array[int]]:
    """The samples of one item."""
    where = f"{NAME}[{number}]"
    mask = None
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise InputError("`input_ids` is missing", where=where, fix=_FIX)
        item, mask = item["input_ids"], item.get("attention_mask")
    rows, masks = _rows(item, where), None if mask is None else _rows(mask, where)
    if masks is not None and [*map(len, rows)] != [*map(len, masks)]:
        raise InputError("`attention_mask` has another shape than `input_ids`", where=where, fix=_FIX)
    for index, row in enumerate(rows):
        if masks is not None:
            row = [token for token, is_read in zip(row, masks[index], strict=True) if is_read]
        if not row:
            raise InputError("a sample has no tokens", where=where, fix="leave it out")
        if not all(type(token) is int and 0 <= token <= _MAX_ID for token in row):
            raise InputError("a sample has a value that is not a token id", where=where, fix=_FIX)
        yield array("i", row)


def _rows(value: Any, where: str) -> list[list[Any]]:
    """One or two dimensions of numbers as rows."""
    values = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(values, list | tuple):
        raise InputError(f"a sample is a {type(value).__name__}", where=where, fix=_FIX)
    inner = [row.tolist() if hasattr(row, "tolist") else row for row in values]
    if any(isinstance(row, list | tuple) for row in inner):
        if not all(isinstance(row, list | tuple) for row in inner):
            raise InputError("a sample has lists of several depths", where=where, fix=_FIX)
        return [list(row) for row in inner]
    return [list(inner)]
