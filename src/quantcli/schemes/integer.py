"""Weights in integer codes: how they are rounded, and how int4 finds its scales.

Int4 codes are -8..7, stored in int8. With so few of them, clipping matters: a scale that clips nothing
spends most codes on few values; a smaller one has less error where it counts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from quantcli.core.number_types import ELEMENTS
from quantcli.core.numerics import NO_STATS, Numerics, Operand, Parts, Stats
from quantcli.schemes.arithmetic import clipping, rounding, tiles
from quantcli.schemes.base import Bias, ClippedWeights, Scheme
from quantcli.schemes.by_data import RoundedWeights, chosen, given

LARGEST, LEAST = ELEMENTS["int4"].largest, ELEMENTS["int4"].least
GROUP_SIZES = (128, 64, 32)  # that `auto` chooses from, in this order


class Search(NamedTuple):
    """What a search for scales begins with.

    rows:       float [..., k], a row for each scale.
    widest:     the scales that clip nothing, positive float32 [..., 1].
    sign:       of the stored scales [..., 1]; None: all positive.
    codes:      the numbers that weights are rounded to.
    importance: of each column, which broadcasts against rows; None: no search.
    """

    rows: Tensor
    widest: Tensor
    sign: Tensor | None
    codes: clipping.Codes
    importance: Tensor | None

    def scale(self, engine_dtype: torch.dtype) -> Tensor:
        """The scales that are chosen, float32 [..., 1], exact in `engine_dtype`."""
        scale = self.widest
        if self.importance is not None:
            scale = clipping.least_error(
                self.rows, scale, engine_dtype, self.codes, self.importance, self.sign
            )
        return scale if self.sign is None else scale * self.sign


class IntegerWeights(RoundedWeights, ClippedWeights):
    """Weights in int8, with a scale per row; other integers are subclasses."""

    def widest(self, rows: Tensor, engine_dtype: torch.dtype) -> Tensor:
        """The positive scales that clip nothing, float32 [..., 1]. Here of int8."""
        return rounding.int8_scale(rows, engine_dtype)

    def search(self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats) -> Search:
        """Of the scales for rows [..., n, k]. Here int8, with a scale per row."""
        importance = self.importance(constants, rows.device)
        return Search(rows, self.widest(rows, engine_dtype), None, clipping.INT8, importance)

    def nearest(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats
    ) -> tuple[Tensor, Tensor]:
        """Codes int8 [..., n, k] rounded to nearest; their scales, float32, exact in `engine_dtype`.

        Here int8 with a scale per row, float32 [..., n, 1]. Without a clip |error| <= scale / 2; with
        one, the weighted squared error of a row is never larger than that. NaN and Inf show in the
        scale.
        """
        if self.clip == "none":
            scale = rounding.int8_scale(rows, engine_dtype)
            return rounding.to_int8(rows, scale), scale
        scale = self.search(rows, engine_dtype, constants).scale(engine_dtype)
        return self.nearest_codes(rows, scale), scale

    def nearest_codes(self, rows: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """int8 [..., n, k]. Here for a scale per row."""
        return clipping.INT8.codes(rows, scale)

    def quantize(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats = NO_STATS, bias: Bias = None
    ) -> Parts:
        """Codes int8 [..., n, k], weight_scale as `nearest` gives it."""
        if (parts := given(constants, rows.device)) is not None:
            return parts
        codes, scale = self.nearest(rows, engine_dtype, constants)
        return {"weight": chosen(constants, codes), "weight_scale": scale}


class Int4Weights(IntegerWeights):
    """The options that int4 schemes share."""

    clip: Literal["columns", "inputs", "mse", "none"] = Field(  # type: ignore[assignment]  # more of them
        "columns",
        description="largest weights of a row: columns cuts them off where the squared error is least, "
        "and columns with large weights count most; inputs: columns count by the mean square of their "
        "inputs, which needs calibration data; mse: all count alike",
    )

    @property
    def needs_column_amax(self) -> bool:
        """For `clip: columns`."""
        return self.clip == "columns"

    @property
    def searches_scales(self) -> bool:
        """Unless nothing is clipped."""
        return self.clip != "none"

    def importance(
        self, constants: Stats, device: torch.device, columns: int | None = None
    ) -> Tensor | None:
        """Also by columns of the weight, or all alike."""
        if self.clip == "columns":
            by_columns = clipping.by_columns(constants["column_amax"].to(device))
            return clipping.in_groups(by_columns, columns)
        if self.clip == "mse":
            return torch.ones(1, device=device)
        return super().importance(constants, device, columns)

    def widest(self, rows: Tensor, engine_dtype: torch.dtype) -> Tensor:
        """The positive scales that clip nothing, float32 [..., 1]."""
        return rounding.scale_of(rounding.absmax(rows), LARGEST, engine_dtype)

    def search(self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats) -> Search:
        """Of the scales for rows [..., n, k], positive, one per row."""
        importance = self.importance(constants, rows.device)
        return Search(rows, self.widest(rows, engine_dtype), None, clipping.INT4, importance)

    def nearest(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats
    ) -> tuple[Tensor, Tensor]:
        """Codes int8 [..., n, k] in -8..7; scale float32 [..., n, 1], exact in `engine_dtype`.

        With `none` no code is clipped and |error| <= scale / 2; else the weighted squared error of a
        row is never larger than that. NaN and Inf show in the scale.
        """
        scale = self.search(rows, engine_dtype, constants).scale(engine_dtype)
        return self.nearest_codes(rows, scale), scale

    def nearest_codes(self, rows: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """int8 [..., n, k] in -8..7 for scales [..., n, 1]."""
        return clipping.INT4.codes(rows, scale)


class Groups(Scheme):
    """Integer weights with a scale for each group of columns of a row, or for the whole row.

    Comes before a class of integer weights, which has their other options.
    """

    group_size: Literal[32, 64, 128, "channel", "auto"] = Field(
        128,
        description="columns of a row that share a scale; channel: all of them; auto: the first of "
        "128, 64 and 32 that the engine loads for a module, its siblings, the experts of its layer",
    )
    signed: bool = Field(
        True,
        description="the largest weight of a group is at the code that reaches furthest, -8 or -128: "
        "half of the scales are negative; false: all scales are positive",
    )
    code_type: ClassVar[clipping.Codes]

    @classmethod
    def for_numerics(cls, numerics: Numerics) -> Self | None:
        """With the group_size that they have."""
        block = numerics.weight.block
        try:
            scheme = cls.model_validate({"group_size": block[1] if block else "channel"})
        except ValidationError:  # groups that no option makes
            return None
        return scheme if scheme.numerics == numerics else None

    @property
    def choices(self) -> tuple[Self, ...]:
        """Large groups first: they take the least memory."""
        if self.group_size != "auto":
            return ()
        return tuple(self.model_copy(update={"group_size": size}) for size in GROUP_SIZES)

    @property
    def columns(self) -> int | None:
        """Columns of a group; None: whole rows. Of `auto` those of its first choice."""
        if self.group_size == "channel":
            return None
        return GROUP_SIZES[0] if self.group_size == "auto" else self.group_size

    @property
    def weights(self) -> Operand:
        """How weights are quantized."""
        if self.columns is None:
            return Operand(self.code_type.element, "channel")
        return Operand(self.code_type.element, "group", block=(1, self.columns))

    def in_groups(self, rows: Tensor) -> Tensor:
        """[..., n, k] -> [..., n, groups, columns], the last filled up with zeros; or the rows."""
        return rows if self.columns is None else tiles.cut(rows, self.columns)

    def in_rows(self, codes: Tensor, k: int) -> Tensor:
        """The inverse, of codes."""
        return codes if self.columns is None else codes.flatten(-2)[..., :k].contiguous()

    @property
    def has_signs(self) -> bool:
        """Whether scales may be negative. Here those of groups: what has a scale for each row is also
        for kernels that are not known to take it."""
        return self.signed and self.columns is not None

    @abstractmethod
    def search(self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats) -> Search:
        """Of the scales of groups [..., n, groups, columns], or of rows."""

    def search_of(
        self,
        rows: Tensor,
        engine_dtype: torch.dtype,
        importance: Tensor | None,
        positive: Callable[[Tensor, torch.dtype], Tensor],
    ) -> Search:
        """The same. If scales have signs, one is negative if the largest weight of its group is
        positive: then that is at the least code, one step further than codes reach above zero.

        positive: gives the positive scales that clip nothing, float32 [..., 1].
        """
        groups = self.in_groups(rows)
        if not self.has_signs:
            return Search(groups, positive(groups, engine_dtype), None, self.code_type, importance)
        sign, above = clipping.facing_down(groups)
        element = ELEMENTS[self.code_type.element]
        widest = clipping.widest_signed(rounding.absmax(groups), above, engine_dtype, element)
        return Search(groups, widest, sign, self.code_type, importance)

    def nearest(
        self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats
    ) -> tuple[Tensor, Tensor]:
        """Codes int8 [..., n, k]; scale float32 [..., n, ceil(k / group_size)]."""
        search = self.search(rows, engine_dtype, constants)
        scale = search.scale(engine_dtype)
        codes = self.in_rows(self.code_type.codes(search.rows, scale), rows.shape[-1])
        return codes, scale if self.columns is None else scale.squeeze(-1)

    def nearest_codes(self, rows: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """int8 [..., n, k] for the scales of groups, or of rows."""
        groups = self.in_groups(rows)
        each = scale if self.columns is None else scale.unsqueeze(-1)
        return self.in_rows(self.code_type.codes(groups, each), rows.shape[-1])

    def spread(self, values: Tensor, k: int) -> Tensor:
        """What groups have, [..., n, groups], for each of k columns; what rows have, as it is."""
        if self.columns is None:
            return values
        return tiles.spread(values, (1, self.columns), values.shape[-2], k)

    def dequantize(self, parts: Parts) -> Tensor:
        """Codes times the scales of their groups: float32 [..., n, k]."""
        codes = parts["weight"].float()
        return codes * self.spread(parts["weight_scale"], codes.shape[-1])


class Int4Groups(Groups, Int4Weights):
    """Int4 weights with a scale for each group of columns of a row, or for the whole row."""

    code_type: ClassVar[clipping.Codes] = clipping.INT4

    def search(self, rows: Tensor, engine_dtype: torch.dtype, constants: Stats) -> Search:
        """Of the scales of groups [..., n, groups, columns], or of rows."""
        importance = self.importance(constants, rows.device, self.columns)
        return self.search_of(rows, engine_dtype, importance, self.widest)
