"""The interface of a source format, the input of its reader, and checks and messages of readers."""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from quantcli.checkpoint.checkpoint import CONFIG, Checkpoint
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.encoded import Encoded
from quantcli.checkpoint.header import Rows, StoredTensor
from quantcli.checkpoint.spec import FLOATS, TensorSpec
from quantcli.core.errors import InputError
from quantcli.targets.layouts import stray_signs

AGAIN = "fetch the model again"
Tensors = Mapping[str, StoredTensor]  # of one module, by suffix


@dataclass(frozen=True)
class Source:
    """A quantized checkpoint.

    settings: its quantization config, which is untrusted. `where` is the file.
    notes:    filled by the reader of the format.
    """

    checkpoint: Checkpoint
    settings: Settings
    where: str = CONFIG
    notes: list[str] = field(default_factory=list)

    @cached_property
    def modules(self) -> dict[str, dict[str, StoredTensor]]:
        """Tensors by module and suffix, in the order of the files."""
        modules: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
        for name, stored in self.checkpoint.tensors.items():
            module, _, suffix = name.rpartition(".")
            modules[module][suffix] = stored
        return dict(modules)

    def whole(self, *keys: str, default: int | None = None) -> int:
        """The whole number under the first of `keys` that is there."""
        for key in keys:
            value = self.settings.value(key)
            if value is not None:
                if type(value) is not int or abs(value) > 2**31:
                    raise self.refused(f"`{key}` is {reprlib.repr(value)}, not a whole number")
                return value
        if default is None:
            raise self.refused(f"has no `{keys[0]}` for its quantized weights")
        return default

    def word(self, key: str, default: str) -> str:
        """The text under `key`, in lower case."""
        value = self.settings.value(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.refused(f"`{key}` is {reprlib.repr(value)}, not text")
        return value.lower()

    def refused(self, what: str, fix: str | None = None) -> InputError:
        """The error for settings that cannot be read."""
        return InputError(f"{self.where}: {what}", where=str(self.checkpoint.path), fix=fix or AGAIN)

    def contradicted(self, stored: StoredTensor, expected: str) -> InputError:
        """The error for a tensor that does not fit the settings."""
        what = (
            f"{self.where} contradicts the tensors: {expected}; `{stored.spec.name}` is {stored.spec}"
        )
        return wrong(stored, what, f"{AGAIN}, with the {self.where} that belongs to it")


def wrong(stored: StoredTensor, what: str, fix: str = AGAIN) -> InputError:
    """The error for a stored tensor."""
    return InputError(what, where=f"`{stored.spec.name}` in {stored.file.name}", fix=fix)


class SourceFormat(ABC):
    """A format of quantized checkpoints that is decoded to float. A file in this folder registers it.

    name:     for messages; what most of its configs have as `quant_method`.
    methods:  all values of `quant_method` that mean it, in lower case.
    own_file: the file that has the settings if config.json has none; empty for none.
    suffixes: of tensors that only a checkpoint of this format has; without them its settings are stale.
              Those that several formats share are in checkpoint/detect.py.
    """

    name: ClassVar[str]
    methods: ClassVar[frozenset[str]]
    own_file: ClassVar[str] = ""
    suffixes: ClassVar[frozenset[str]] = frozenset()

    def settings_of(self, table: Settings) -> Settings:
        """The settings in the object of `own_file`; untrusted. InputError if there are none."""
        return table

    def shows(self, checkpoint: Checkpoint) -> bool:
        """Whether the tensors of a checkpoint without any settings tell all that `read` must know."""
        return False

    @abstractmethod
    def read(self, source: Source) -> Iterator[Encoded]:
        """Every quantized module. InputError for settings or tensors that do not fit."""


def needed(module: str, tensors: Tensors, suffix: str, codes: StoredTensor) -> StoredTensor:
    """The module's tensor with this suffix."""
    if suffix not in tensors:
        reason = f"without it the codes in `{codes.spec.name}` mean nothing"
        raise wrong(codes, f"`{module}.{suffix}` is missing: {reason}")
    return tensors[suffix]


def must_be(stored: StoredTensor, dtypes: Sequence[str], shape: tuple[int, ...], why: str) -> None:
    """InputError for another dtype or shape. why: the subject that has these, for the message."""
    spec = stored.spec
    if spec.dtype not in dtypes or spec.shape != shape:
        raise wrong(stored, f"is {spec}; {why} has {' or '.join(dtypes)} {list(shape)}")


def matrix(stored: StoredTensor) -> tuple[int, int]:
    """The sides of codes; InputError if they are not a matrix, or an empty one."""
    shape = stored.spec.shape
    if len(shape) != 2 or not stored.spec.numel:
        what = f"codes are {stored.spec}; this version decodes matrices, experts one by one"
        raise wrong(stored, what, "start from the float checkpoint")
    return shape[0], shape[1]


def check_scales(
    scale: Tensor,
    stored: StoredTensor,
    first: int,
    each: int,
    decode: Callable[[Tensor], Tensor],
    *,
    signed: bool = False,
) -> None:
    """InputError for a scale below zero, and for one of zero with codes that are not: its weights are
    lost. An e4m3 scale may be zero, as it is if all values of its group are tiny. NaN shows in the
    decoded values.

    scale:  float32, a row for rows `first`, `first` + 1, .. of the weight, or for `each` of them.
    each:   how many rows of the weight one row of `stored` is for; 0: it is for all.
    decode: the rows of the weight with other scales of the same shape.
    signed: scales may be negative, unless nearly all are positive.
    """
    bad = stray_signs(scale) if signed else scale < 0
    if not bool(bad.any()):
        bad = scale == 0
        if stored.spec.dtype == "F8_E4M3" or not bool(bad.any()) or not bool(decode(bad.float()).any()):
            return
    index = [int(place) for place in bad.nonzero()[0]]
    value = float(scale[tuple(index)])
    index[:1] = [(first + row) // each if each else row for row in index[:1]]
    place = f"[{', '.join(map(str, index[: len(stored.spec.shape)]))}]" if stored.spec.shape else ""
    suffix = stored.spec.name.rpartition(".")[2]
    raise InputError(
        f"{suffix} is {value:g}: a scale is a positive number",
        where=f"`{stored.spec.name}`{place} in {stored.file.name}",
        fix=f"the model is damaged: {AGAIN}",
    )


def encoded(
    module: str,
    shape: tuple[int, int],
    parts: Sequence[StoredTensor],
    opened: Callable[[], AbstractContextManager[Rows]],
    kind: str,
    buffer_nbytes: int = 0,
) -> Encoded:
    """The weight [n, k] of a module. parts: its codes first."""
    spec = TensorSpec(f"{module}.weight", "F32", shape)
    return Encoded(spec, parts[0].file, parts[0].offset, tuple(parts), kind, opened, buffer_nbytes)


SCALES = (*sorted(FLOATS), "F8_E8M0")  # dtypes of scales
