"""Weights whose codes may be chosen by data (GPTQ, learned), whatever the type of codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, ClassVar, Literal, Self, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag
from torch import Tensor

from quantcli.core.numerics import Parts, Stats
from quantcli.schemes.arithmetic import elements, rounding
from quantcli.schemes.arithmetic.gptq import BLOCK, DAMPING
from quantcli.schemes.base import Scheme


class RoundingOptions(BaseModel):
    """The options that all ways to choose codes share: those of GPTQ."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    damping: float = Field(
        DAMPING,
        gt=0,
        le=1,
        description="of the mean square of inputs, added to that of each: more of it keeps the weight "
        "nearer to the one rounded to nearest",
    )
    act_order: bool = Field(
        True, description="columns go by the size of their inputs; false: as they are stored"
    )
    block_size: int = Field(
        BLOCK, ge=1, le=2**16, description="columns between two updates of all that follow"
    )
    true_sequential: bool = Field(
        True,
        description="modules of a layer are rounded on what those before them make of the text, with "
        "`inputs: quantized`; false: on what the float ones make of it, in a third of the time",
    )
    sweeps: int = Field(
        2,
        ge=0,
        le=100,
        description="how often scales and codes are mended afterwards, each for what all others leave",
    )
    ranges: Literal["fitted", "kept"] = Field(
        "fitted",
        description="scales of groups or rows: fitted mends them together with codes, in each of the "
        "`sweeps`; kept leaves them as the scheme finds them",
    )


class Gptq(RoundingOptions):
    """`weight_rounding: gptq` has the defaults."""

    name: Literal["gptq"]


class Learned(RoundingOptions):
    """Learned after GPTQ. `weight_rounding: learned` has the defaults."""

    name: Literal["learned"]
    steps: int = Field(200, ge=1, le=100_000, description="of learning, about: whole rounds of samples")
    batch: int = Field(8, ge=1, le=1024, description="samples a step")
    lr: float = Field(5e-3, gt=0, le=1, description="how far a step moves an offset, in codes")


def _form(value: object) -> str:
    if isinstance(value, str):
        return "word"
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return "options of learned" if name == "learned" else "options"


# the tags of the branches stand in pydantic's places of errors: see `recipe/written.py`
WeightRounding: TypeAlias = Annotated[
    Annotated[Literal["nearest", "gptq", "learned"], Tag("word")]
    | Annotated[Gptq, Tag("options")]
    | Annotated[Learned, Tag("options of learned")],
    Discriminator(_form),
]


class RoundedWeights(Scheme):
    """The option that schemes with such weights share.

    With `gptq` and `learned`, codes are chosen while the model is calibrated, against the very scales
    that `quantize` finds, or with scales of their own. It is then given them as the stat `codes`, in
    the form of its `weight`, and `scales`, in that of its `weight_scale`, and takes them as they are.
    """

    row_stats: ClassVar[frozenset[str]] = frozenset({"codes", "scales"})
    # whether `weight_scale` may be any number of its type: no other part depends on it
    free_scales: ClassVar[bool] = True

    weight_rounding: WeightRounding = Field(
        "nearest",
        description="gptq: each column of a weight makes up for the errors of those before it, by how "
        "inputs go together; learned: codes and scales then learn from errors of the layer's outputs. "
        "Both need calibration data. Or a mapping with the name and options",
    )

    @property
    def rounding_options(self) -> RoundingOptions | None:
        """If data chooses the codes."""
        if isinstance(self.weight_rounding, RoundingOptions):
            return self.weight_rounding
        usual = {"gptq": Gptq(name="gptq"), "learned": Learned(name="learned")}
        return usual.get(self.weight_rounding)

    @property
    def rounding_learns(self) -> bool:
        """Whether codes learn after they were chosen."""
        return isinstance(self.rounding_options, Learned)

    @property
    def rounded_by_data(self) -> bool:
        """If an option says so."""
        return self.weight_rounding != "nearest"

    @property
    def fits_scales(self) -> bool:
        """Whether data chooses the scales, too."""
        options = self.rounding_options
        fitted = options is not None and options.ranges == "fitted" and options.sweeps > 0
        return fitted and self.free_scales and self.numerics.weight.symmetric

    def to_scale(self, engine_dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        """The nearest numbers that may be scales, for positive ones; None if scales stay."""
        return partial(rounding.nearest, engine_dtype=engine_dtype) if self.fits_scales else None

    @property
    def without_inputs(self) -> Self:
        """Also rounded to nearest."""
        return super().without_inputs.model_copy(update={"weight_rounding": "nearest"})

    def blank(self, k: int, engine_dtype: torch.dtype) -> Stats:
        """Also `codes`, and `scales` float32, of no rows, if data chooses them."""
        measured = dict(super().blank(k, engine_dtype))
        weight = self.numerics.weight
        if self.rounded_by_data:
            measured["codes"] = elements.encode(torch.empty((0, k)), weight.element)
        if self.fits_scales:
            groups = -(-k // weight.block[1]) if weight.block else 1
            measured["scales"] = torch.empty((0, groups))
        return measured


def chosen(constants: Stats, nearest: Tensor) -> Tensor:
    """The codes of some rows: the stat `codes`, in dtype and shape of `nearest`, or else `nearest`."""
    codes = constants.get("codes")
    return nearest if codes is None else codes.to(nearest.device)


def given(constants: Stats, device: torch.device) -> Parts | None:
    """`weight` and `weight_scale` of some rows, if data has chosen both."""
    codes, scales = constants.get("codes"), constants.get("scales")
    if codes is None or scales is None:
        return None
    return {"weight": codes.to(device), "weight_scale": scales.to(device)}
