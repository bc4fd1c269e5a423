"""The contract of a target: the storage of numerics, and the refusals of its engine."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.detect import Draft, Quantization, quantization
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.errors import InputError
from quantcli.core.findings import Finding
from quantcli.core.numerics import CACHES, Cache, Module, Numerics, Parts
from quantcli.core.registry import discover
from quantcli.targets.kv_cache import AttentionLayer, CacheTensor, StoredCache
from quantcli.targets.layouts import Layout, Sides, StoredModule, Values
from quantcli.targets.serving import ServeCommand, Served

ScalePart: TypeAlias = Literal["weight_scale", "input_scale"]
# Fixes that several formats suggest.
AGAIN = "convert the model again"
KEEP = "put a rule with `scheme: keep` for it before the others"
SUPPORT = "see `quantcli inspect --support` for what goes together"


# A module, n and k on one device, and the devices that share it -> reasons why it cannot be split.
SplitLimits: TypeAlias = Callable[[StoredModule, Sides, int], Iterator[str]]
# What a refusal follows from: the module's name, whatever its numbers; its width with these numbers; or
# these numbers, whatever the width.
Cause: TypeAlias = Literal["name", "width", "numbers"]


class Fault(NamedTuple):
    """A reason why an engine would not load a quantized module, and a fix."""

    what: str
    fix: str | None = None
    by: Cause = "numbers"


@dataclass(frozen=True)
class Refusal:
    """A reason why an engine would not load one module, or would misread it."""

    module: str
    what: str
    fix: str | None = None
    by: Cause = "numbers"


@dataclass(frozen=True)
class PlannedCheckpoint:
    """A planned checkpoint, as the files that describe it need it."""

    modules: Sequence[Module]
    tensors: Mapping[str, TensorSpec]  # every tensor that will be written
    files: Mapping[str, str]  # tensor -> weight file
    config: Settings  # config.json of the source
    serving_dtype: str  # "BF16" or "F16": the dtype in which the engine computes
    cache: Cache | None = None  # of keys and values; None: it stays float


class StoredCheckpoint(Protocol):
    """A checkpoint on disk, of any producer, as an engine would load it.

    modules:   the quantized modules that are sound enough to be read, by name.
    unchecked: the format of quantized modules that engines load and this version cannot read, by name.
    values:    rules for the numbers of tensors that belong to no quantized module, by their names.
    cache:     scales of the cache of keys and values; None if it is not quantized.
    findings:  errors that the engine would stop at or misread, and notes.
    checked:   the number of things that each check looked at, by the check's name.
    """

    checkpoint: Checkpoint
    serving_dtype: str
    modules: dict[str, StoredModule]
    unchecked: dict[str, str]
    values: dict[str, Values]
    cache: StoredCache | None
    findings: list[Finding]
    checked: dict[str, int]

    def check_tp(self, size: int) -> Iterator[Finding]:
        """Findings for modules that cannot be split over `size` devices."""

    def check_arithmetic(self, module: StoredModule) -> Iterator[Finding]:
        """Findings for numbers of a module that do not follow from its others; reads its tensors."""


class Target(BaseModel, ABC):
    """One checkpoint format. The fields of a subclass are its options in a recipe.

    A target sees numbers as numerics and never asks which scheme made them. The planner runs it on
    blocks of no rows: its refusals come before a weight is read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: ClassVar[str]
    # generated files that only this format has, and the check of `verify` that their faults belong to
    files: ClassVar[Mapping[str, str]] = {}
    # the caches of keys and values that the engine takes scales for, and their tensors in each layer
    caches: ClassVar[Mapping[Cache, tuple[CacheTensor, ...]]] = {}

    @property
    def served_in(self) -> str | None:
        """The only dtype, "BF16" or "F16", that the engine computes in; None: that of config.json."""
        return None

    @property
    def article(self) -> str:
        """The target's name with an article, for messages."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"

    @abstractmethod
    def layout(self, numerics: Numerics) -> Layout:
        """The parameters that the engine registers for these numerics. InputError if it has none.

        It declares what `pack` writes: suffixes, dtypes, shapes, and the dimension along which rows of
        the weight lie. The planner compares both. Checkpoints are read by the same declaration.
        """

    def label(self, numerics: Numerics) -> str:
        """The engine's own name for these numerics. InputError if it has none."""
        return self.layout(numerics).label

    @abstractmethod
    def loads_on(self, label: str) -> str:
        """Engine versions and hardware that load modules with this label."""

    @abstractmethod
    def engine_dtype(self, numerics: Numerics, part: ScalePart, serving_dtype: str) -> str:
        """The dtype in which the engine keeps a scale: codes are chosen against the scale in it."""

    @abstractmethod
    def fused_name(self, module: str) -> str | None:
        """Name of the parameter into which the engine fuses this module and its siblings, or None.

        Siblings share every parameter that is not per row, such as input_scale.
        """

    def bias_dtype(self, numerics: Numerics) -> str | None:
        """The dtype in which to store the bias of such a module; None: as it is."""
        return None

    @abstractmethod
    def pack(self, numerics: Numerics, parts: Parts, shape: tuple[int, int]) -> dict[str, Tensor]:
        """Parts of some rows of a module -> tensors by suffix, such as `weight` and `weight_scale`.

        parts: of the scheme, weight_scale in its `engine_dtype`. shape: n and k of the whole weight.
        Tensors are those of `layout`, for these rows; one that does not depend on rows, as
        `input_scale` [1], is the same for every block of them. Rows come in multiples of the layout's
        `row_multiple`, except at a weight's end.
        """

    def pack_module(
        self, module: str, numerics: Numerics, parts: Parts, shape: tuple[int, int]
    ) -> dict[str, Tensor]:
        """`pack` for a module of this name, which is what the planner calls. Here the name is not used.

        Of the name only the last part may matter: modules with the same one are planned alike.
        """
        return self.pack(numerics, parts, shape)

    @abstractmethod
    def unpack(self, numerics: Numerics, stored: Mapping[str, Tensor]) -> Parts:
        """The inverse of `pack`."""

    def engine_parts(self, numerics: Numerics) -> Parts:
        """Parts that `Scheme.forward` takes, that no file holds and that only this engine knows."""
        return {}

    def unlike_kernels(self, numerics: Numerics) -> str | None:
        """A note on kernels of the engine that compute otherwise than `engine_parts` says; None: none
        does."""
        return None

    def built_float(self, module: str, names: Collection[str]) -> str | None:
        """The reason why the engine builds a module as float whatever a checkpoint says, if it does.

        names: of all modules with a weight.
        """
        return None

    def refusals(self, module: Module, names: Collection[str]) -> Iterator[Refusal]:
        """Refusals of one quantized module that do not depend on how others are quantized.

        The planner asks for them before it settles on schemes: a scheme may name one to use instead,
        and a rule by role leaves float what the engine does not take by name or by width.
        names: as for `built_float`.
        """
        yield from ()

    @abstractmethod
    def check(self, modules: Sequence[Module]) -> Iterator[Refusal]:
        """All refusals of the modules of a planned checkpoint."""

    def check_tensors(
        self, tensors: Mapping[str, TensorSpec], config: Settings | None = None
    ) -> Iterator[Refusal]:
        """Refusals of tensors of the source, before rules are matched with modules.

        config: that of the language model, untrusted; None if there is none.
        """
        yield from ()

    def check_family(self, modules: Sequence[Module], model_type: str) -> Iterator[Refusal]:
        """Refusals of modules, quantized or not, that depend on the family of the model.

        model_type: of the language model, as config.json has it.
        """
        yield from ()

    def check_draft(self, draft: Draft) -> Iterator[Refusal]:
        """Refusals of a stand-alone draft, before its tensors are looked at."""
        yield from ()

    def advise(self, modules: Sequence[Module], model_type: str = "") -> Iterator[str]:
        """Notes for the plan on modules that load. model_type: as config.json has it, or ""."""
        yield from ()

    def cache_tensors(self, cache: Cache) -> tuple[CacheTensor, ...]:
        """The tensors of each layer of attention whose cache is quantized so.

        InputError if the engine takes no such scales from a checkpoint, with what works.
        """
        if cache not in self.caches:
            raise _no_cache(self.name, cache)
        return self.caches[cache]

    def cache_fault(
        self,
        cache: Cache,
        layer: AttentionLayer,
        modules: Mapping[str, Module],
        config: Settings,
    ) -> Fault | None:
        """The reason why the engine cannot have a layer's cache so, if it cannot.

        modules: all, by name. config: config.json of the language model.
        """
        return None

    def cache_note(self, cache: Cache) -> str | None:
        """A note for the plan on what else such a cache takes."""
        return None

    @property
    def tags(self) -> tuple[str, ...]:
        """Words by which a model card tells of this format."""
        return (self.name,)

    def serve(self, served: Served, model: str) -> tuple[ServeCommand, ...]:
        """The commands that serve a checkpoint of this format, one for each engine that is known.

        model: the checkpoint as the user names it, a folder or a Hub id.
        """
        return ()

    def loaded_by(self, engine: str, labels: Collection[str]) -> bool:
        """Whether an engine loads modules with each of these labels; no for a label that is not written
        here."""
        try:
            engines = [self.loads_on(label).partition(";")[0] for label in labels]
        except (LookupError, StopIteration):
            return False
        return all(engine in re.split("[ ,]+", text) for text in engines)

    def split_limits(self, modules: Collection[str]) -> SplitLimits:
        """What gives the reasons why the engine cannot split a planned module over devices.

        It takes a module, its n and k on one device, and the devices that share it. modules: names of
        all quantized modules. Here no reason is known.
        """
        return lambda module, sides, devices: iter(())

    @abstractmethod
    def sidecars(self, output: PlannedCheckpoint) -> dict[str, bytes]:
        """The generated files by name, such as config.json and the index."""

    @abstractmethod
    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint on disk is, or means to be, of this format."""

    @abstractmethod
    def open_stored(self, checkpoint: Checkpoint) -> StoredCheckpoint:
        """A checkpoint of this format, untrusted; damage is among its findings."""


def files_of_targets() -> dict[str, str]:
    """The files of all targets next to config.json and the index; see `Target.files`."""
    return {name: check for cls in discover(Target).values() for name, check in cls.files.items()}


def others_that_store(numerics: Numerics) -> str:
    """A fix for numerics that a target cannot store: the targets that can, as text."""
    choices = []
    for name, cls in discover(Target).items():
        with suppress(InputError):
            cls().label(numerics)
            choices.append(f"`target: {name}`")
    return f"use {' or '.join(choices)}, or {SUPPORT}" if choices else SUPPORT


def _no_cache(target: str, cache: Cache) -> InputError:
    """The error for a cache whose scales a target cannot store, with what works."""
    targets = discover(Target)
    own = targets[target].caches
    fixes = [f"`kv_cache: {word}`" for word, other in CACHES.items() if other in own]
    fixes += [f"`target: {name}`" for name, cls in targets.items() if cache in cls.caches]
    what = f"target `{target}` has no place for scales of a cache in {cache}"
    return InputError(what, fix=f"use {' or '.join(fixes)}" if fixes else "leave `kv_cache` out")


def cannot_store(target: str, numerics: Numerics) -> InputError:
    """The error for numerics that the engine of a target has no label for."""
    return InputError(f"target `{target}` cannot store {numerics}", fix=SUPPORT)


def target_of(checkpoint: Checkpoint) -> Target | None:
    """The target whose format a checkpoint on disk is of, with its default options."""
    targets = (cls() for cls in discover(Target).values())
    return next((target for target in targets if target.recognises(checkpoint)), None)


def quantization_of(checkpoint: Checkpoint) -> Quantization | None:
    """How the weights are quantized; None for a float checkpoint.

    Tensors tell by their names and dtypes; if these are a target's own, its format by its modules.
    """
    found = quantization(checkpoint)
    if found is None and (target := target_of(checkpoint)) is not None:
        modules = target.open_stored(checkpoint).modules
        for module in modules.values():
            codes = module.tensors[module.layout.weight.suffix].spec
            return Quantization(target.name, len(modules), f"`{codes.name}` {codes}")
    return found


def must_be_readable(stored: StoredCheckpoint) -> None:
    """Raises InputError for a quantized module that this version cannot read."""
    for module, form in stored.unchecked.items():
        what, where = f"this version cannot decode {form}", f"`{module}` in {stored.checkpoint.path}"
        raise InputError(what, where=where, fix="start from the float checkpoint")


def must_be_sound(stored: StoredCheckpoint, checks: Collection[str] | None = None) -> None:
    """Raises InputError for the first error among the findings of a checkpoint.

    checks: the names of checks that count; None: all.
    """
    errors = [f for f in stored.findings if f.severity == "error" and (not checks or f.check in checks)]
    if errors:
        first, path = errors[0], stored.checkpoint.path
        rest = len(errors) - 1
        more = f" ({rest} more finding{'s' * (rest > 1)})" if rest else ""
        where = f"{first.where} in {path}" if first.where else str(path)
        fix = "see `quantcli verify` for all that is wrong with it"
        raise InputError(f"{first.what}{more}", where=where, fix=fix)
