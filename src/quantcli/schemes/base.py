"""The interfaces of a scheme, and of a learner for schemes that learn while a layer runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo
from torch import Tensor

from quantcli.core.errors import InputError
from quantcli.core.numerics import NO_STATS, Numerics, Parts, Stats
from quantcli.schemes.arithmetic import clipping
from quantcli.schemes.arithmetic.observers import Observer

# float [n], or [..., n] of stacked weights; None if a module has none
Bias: TypeAlias = Tensor | None


class Scheme(BaseModel, ABC):
    """How numbers are rounded. The fields of a subclass are its options in a recipe.

    A subclass sets `name` (what recipes call it) and is registered by standing in this folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: ClassVar[str]
    # whether the scale spans rows: `quantize` then finds `weight_amax` float32 [1] among its constants,
    # max |w| of the whole weight and of those that the engine merges with it; and may find
    # `weight_coarse` bool [1], whether all their numbers are 0, or 1 or 1.5 times a power of two
    needs_weight_amax: ClassVar[bool] = False
    # stats with a value per input channel, of this module alone, which only make it better
    column_stats: ClassVar[frozenset[str]] = frozenset()
    # stats with a row per row of the weight; `quantize` finds those of its rows among its constants
    row_stats: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def for_numerics(cls, numerics: Numerics) -> Self | None:
        """This scheme with the options that make these numerics; None if there are none."""
        scheme = cls()
        return scheme if scheme.numerics == numerics else None

    @property
    def row_multiple(self) -> int:
        """Rows that share a scale: blocks of a weight are cut at multiples of it."""
        return 1

    @property
    def without_data(self) -> Scheme | str | None:
        """Fallback scheme, or its name, for a module that no calibration token reached, if the recipe
        allows fallbacks. Here the same with options that need no data, if these are all it lacks."""
        usual = self.without_inputs
        return usual if self.needs_data and not usual.needs_data else None

    @property
    def needs_column_amax(self) -> bool:
        """Whether `quantize` finds `column_amax` float32 [k] among its constants: max |w| of each
        column of the whole weight."""
        return False

    @property
    def searches_scales(self) -> bool:
        """Whether it tries several scales for each row, group or block: that takes more memory."""
        return self.clips_by_inputs

    @property
    def clips_by_inputs(self) -> bool:
        """Whether it is given the mean square of each input, and weighs errors by it."""
        return False

    @property
    def without_inputs(self) -> Self:
        """The scheme for a module that no token reached, if its inputs would only weigh errors."""
        return self

    @property
    def when_calibrating(self) -> Self:
        """The scheme that a recipe means which calibrates anyway: options that it does not set may be
        chosen by data."""
        return self

    @property
    def choices(self) -> tuple[Self, ...]:
        """The schemes to choose from for each module, the best first, if an option leaves that to the
        module's shape; the planner takes the first that the engine loads. Else empty."""
        return ()

    @property
    def unserved(self) -> str | None:
        """Name of the fallback scheme for a module that the engine cannot serve with this one; None:
        that is an error."""
        return None

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the calibration methods that make its stats. Here those for what it says of itself:
        an observer or clips by inputs, a schedule, codes."""
        observes = self.clips_by_inputs or self.observer(torch.bfloat16) is not None
        needs = {
            "ranges": observes,
            "learning": self.schedule is not None,
            "rounding": self.rounded_by_data,
        }
        return tuple(name for name, needed in needs.items() if needed)

    @property
    def needs_data(self) -> bool:
        """Whether calibration must come before weights can be quantized."""
        return bool(self.methods)

    @property
    def shares_data(self) -> bool:
        """Whether the engine keeps one set of statistics for modules that it merges."""
        return self.schedule is not None or self.observer(torch.bfloat16) is not None

    @property
    def joins_inputs(self) -> bool:
        """Whether one set of statistics can be made for modules with different inputs."""
        return self.schedule is None

    @property
    def ordered(self) -> bool:
        """Whether statistics depend on the order of the samples, so that each is a batch."""
        return False

    @property
    @abstractmethod
    def numerics(self) -> Numerics:
        """How weights and inputs are quantized, for the target."""

    def observer(self, engine_dtype: torch.dtype) -> Observer | None:
        """An observer of a module's input during calibration; None for schemes that need no data.

        engine_dtype: the dtype in which the engine will hold `input_scale`.
        """
        return None

    def observed(self, engine_dtype: torch.dtype) -> Any:
        """All that decides the stats of `observer`, JSON-able: schemes that observe the same can use
        each other's calibrations. Here all options of this one."""
        return [self.name, self.model_dump(mode="json"), str(engine_dtype)]

    def blank(self, k: int, engine_dtype: torch.dtype) -> Stats:
        """Stats of a module with k inputs as calibration will give them: names, dtypes and shapes.

        Stats by row have no rows. Empty for schemes that need no data.
        """
        observer = self.observer(engine_dtype)
        return observer.stats() if observer else NO_STATS

    @property
    def schedule(self) -> Schedule | None:
        """The length of learning; None for schemes that learn nothing."""
        return None

    def learner(self, task: LearningTask) -> Learner:
        """The learner for matrices that read the same input, if there is a `schedule`."""
        raise AssertionError(f"{self.name} learns nothing")

    def constants(self, stats: Stats, engine_dtype: torch.dtype) -> Parts:
        """The parts that do not depend on rows, made of its stats, such as `input_scale` [1]."""
        return {}

    @abstractmethod
    def quantize(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats = NO_STATS, bias: Bias = None
    ) -> Parts:
        """Codes and scales of whole rows.

        rows: [..., n, k] in bfloat16, float16 or float32: a block of the weight, or all of it.
        engine_dtype: in which the engine will hold `weight_scale`; codes are chosen against it.
        constants: the result of `constants` for this module, and the `row_stats` of these rows.
        bias: [n], the module's bias for these rows; matters if the engine adds it to the codes' sum.

        Returns `weight` [..., n, k] (codes), `weight_scale` [..., n, 1] (float32, exactly
        representable in `engine_dtype`), and other parts per row. A row with NaN or Inf gets a scale
        that is not finite. Each `row_multiple` rows depend on themselves alone; the last ones of
        a weight may be fewer. Also runs on blocks without rows.
        """

    @property
    def rounded_by_data(self) -> bool:
        """Whether calibration chooses the codes: the stat `codes` for each weight, as `quantize` gives
        them in `weight`."""
        return False

    @property
    def rounding_learns(self) -> bool:
        """Whether these codes then learn from the error of the layer's outputs."""
        return False

    def to_round(self, rows: Tensor, constants: Stats) -> Tensor:
        """The weight that codes times scales are to be near: float32 [n, k]."""
        return rows.float()

    def as_read(self, x: Tensor, constants: Stats) -> Tensor:
        """Inputs [..., k] as the codes meet them, but not quantized; linear in x, in float32."""
        return x.float()

    def as_rounded(self, x: Tensor, constants: Stats) -> Tensor | None:
        """`as_read`, and quantized as the engine does it. None if that does not matter, as with inputs
        of 8 bits and more, which lose little."""
        return None

    def dequantize(self, parts: Parts) -> Tensor:
        """The weight as the kernel sees it, float32 [..., n, k]: codes times scale."""
        return parts["weight"].float() * parts["weight_scale"]

    @abstractmethod
    def forward(self, x: Tensor, parts: Parts, bias: Bias = None) -> Tensor:
        """The linear as the engine computes it: x [..., k] -> [..., n], in the dtype of x."""


class ClippedWeights(Scheme):
    """The option of schemes whose scales may be chosen by what weights are multiplied with.

    With `inputs` they are given the stat `input_square`, float32 [k]: the mean square of each channel
    of the module's input.
    """

    column_stats: ClassVar[frozenset[str]] = frozenset({"input_square"})

    clip: Literal["none", "inputs"] = Field(
        "none",
        description="largest weights of a row: inputs cuts them off where the squared error of outputs "
        "is least, by the mean square of each input; needs calibration data",
    )

    @property
    def clips_by_inputs(self) -> bool:
        """If an option says so."""
        return self.clip == "inputs"

    @property
    def without_inputs(self) -> Self:
        """With the clip that needs no data."""
        return self.model_copy(update={"clip": type(self).model_fields["clip"].default})

    @property
    def when_calibrating(self) -> Self:
        """With clips by inputs, unless the recipe says otherwise."""
        return self if "clip" in self.model_fields_set else self.model_copy(update={"clip": "inputs"})

    def blank(self, k: int, engine_dtype: torch.dtype) -> Stats:
        """Also `input_square`, if inputs weigh errors."""
        measured = super().blank(k, engine_dtype)
        return {**measured, "input_square": torch.ones(k)} if self.clips_by_inputs else measured

    def constants(self, stats: Stats, engine_dtype: torch.dtype) -> Parts:
        """Also `input_square`, if inputs weigh errors."""
        shared = super().constants(stats, engine_dtype)
        if self.clips_by_inputs:
            shared["input_square"] = stats["input_square"]
        return shared

    @abstractmethod
    def nearest_codes(self, rows: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """The codes that are nearest to rows [..., n, k] for given scales, and zero points if there are
        any, as `quantize` has them."""

    def importance(
        self, constants: Stats, device: torch.device, columns: int | None = None
    ) -> Tensor | None:
        """How much the error of each column counts, of its group's largest: float32 [k], or [groups,
        columns] if groups have so many columns. None: scales are not searched for."""
        if not self.clips_by_inputs:
            return None
        return clipping.in_groups(constants["input_square"].to(device), columns)


def has_effect(cls: type[Scheme], value: float, info: ValidationInfo) -> float:
    """A validator for options that one way to choose a range reads: ValueError if it is another way."""
    option = str(info.field_name)
    reader = {"percentile": "percentile", "momentum": "moving_average"}[option]
    if value != cls.model_fields[option].default and info.data.get("chosen_by", reader) != reader:
        raise ValueError(f"has no effect without `observer: {reader}`")
    return value


def check_input_scale(measured: Tensor, scale: Tensor, *, sound: bool) -> None:
    """InputError for a measured scale [1] that is not sound, or not the same as `scale`: codes would be
    made against another scale than the engine's. scale: in the engine dtype."""
    if not sound or not torch.equal(scale.float(), measured.float()):
        raise InputError(
            f"input_scale {float(measured)} is not a scale that {str(scale.dtype)[6:]} can hold",
            fix="calibrate again, for the dtype in which the model will be served",
        )


# Whether channels of an input may be multiplied, as their source can be divided. Powers of two are for
# channels that a float matrix reads, too: its weights would be rounded again.
Scalable: TypeAlias = Literal["freely", "by powers of two", "not at all"]


@dataclass(frozen=True)
class Schedule:
    """The length of learning. batch: samples a step."""

    epochs: int
    batch: int


@dataclass(frozen=True)
class LearningTask:
    """Matrices that read the same input, and the start values of a learner.

    weights:      float [n, k] each, under any name.
    amax:         max |x| of each input channel, float32 [k].
    scalable:     whether channels of the input may be multiplied.
    engine_dtype: in which the engine holds the parts that do not depend on rows.
    generator:    of the first, random transform.
    """

    weights: Mapping[Hashable, Tensor]
    amax: Tensor
    scalable: Scalable
    engine_dtype: torch.dtype
    generator: torch.Generator


class Learner(ABC):
    """Learns for some matrices that read the same input, while their layer runs.

    A step: `begin`, then any number of forwards that call `linear` on any thread, then `end` with the
    sum of their gradients with respect to the tensors of `begin`.
    """

    @abstractmethod
    def parameters(self) -> list[dict[str, Any]]:
        """Groups for torch's optimizers."""

    @abstractmethod
    def begin(self) -> list[Tensor]:
        """Make the tensors that this step computes with."""

    @abstractmethod
    def linear(self, key: Hashable, x: Tensor, bias: Tensor | None) -> Tensor:
        """One of the matrices, as it will be quantized: x [..., k] -> [..., n]."""

    @abstractmethod
    def end(self, gradients: list[Tensor]) -> None:
        """Take the gradients back to the parameters. InputError if learning diverges."""

    @property
    @abstractmethod
    def channel_scale(self) -> Tensor | None:
        """The factors of the input's channels, applied first: float32 [k], CPU; None: they stay."""

    @property
    @abstractmethod
    def condition(self) -> float:
        """The condition number of the transform: 1 for a rotation."""

    @abstractmethod
    def state(self) -> list[Tensor]:
        """A copy of all parameters."""

    @abstractmethod
    def restore(self, state: list[Tensor]) -> None:
        """Take the parameters of a copy."""

    @abstractmethod
    def stats(self, key: Hashable) -> Stats:
        """Stats of a matrix, as the scheme's `constants` and `quantize` take them."""
