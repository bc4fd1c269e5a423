"""A recipe as it stands in the file: its keys and what each takes."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def parse_size(value: Any) -> int:
    """Bytes of `5GB`, `512MiB` or a plain number."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    if match and match[2].upper() in SIZE_UNITS and isinstance(value, str):
        size = float(match[1]) * SIZE_UNITS[match[2].upper()]
        if 1 <= size < 2**63:
            return int(size)
    raise ValueError("expected a size such as 5GB or 512MiB")


def _check_limit(value: Any) -> str:
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"(>=|<=|==|>|<)\s*\d+(\.\d+)?", text):
        raise ValueError('expected a comparison such as ">= 90"')
    return text


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Limit = Annotated[str, BeforeValidator(_check_limit)]
Size = Annotated[int, BeforeValidator(parse_size, json_schema_input_type=str | int)]


class Expect(_Block):
    """What the plan must reach; a run that would miss it is refused before it begins."""

    quantized_params_pct: Limit | None = Field(None, description="percentage of all parameters")
    quantized_modules: Limit | None = Field(None, description="number of quantized modules")
    bits_per_param: Limit | None = Field(None, description="bits of output per parameter")
    output_gib: Limit | None = Field(None, description="GiB of weights written")


class Calibration(_Block):
    """Which text the model is shown, for schemes that measure inputs and for smoothing."""

    data: str | None = Field(None, description="text file, jsonl, or datasets:ID")
    samples: Annotated[int, Field(gt=0, le=2**20)] = Field(128, description="how many")
    length: Annotated[int, Field(gt=1, le=2**20)] = Field(512, description="tokens of each")
    seed: int = Field(0, description="which samples are taken")
    pack: bool = Field(True, description="join documents; false: each record is one sample")
    inputs: Literal["float", "quantized", "running"] = Field(
        "float",
        description="what layers are shown: outputs of float layers, of quantized ones, or of ones "
        "that are quantized with the ranges so far, as the reference producer does",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="to compute in; auto: as the model is served"
    )
    uncalibrated: Literal["error", "dynamic", "group"] = Field(
        "error", description="what becomes of a module that no token reaches"
    )


class SmoothRule(_Block):
    """The strength of smoothing for the groups with a reader that matches."""

    match: Annotated[list[str], BeforeValidator(_listed, json_schema_input_type=str | list[str])] = (
        Field(min_length=1, description='globs over full module names, or "re:REGEX"')
    )
    alpha: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="0 to 1")
    skip: bool = Field(False, description="leave these groups alone")
    optional: bool = Field(False, description="do not fail when nothing matches")

    @model_validator(mode="after")
    def _one_of_both(self) -> SmoothRule:
        if (self.alpha is None) != self.skip:
            raise ValueError("give either `alpha` or `skip: true`")
        return self


class Smooth(_Block):
    """Move outliers of activations into weights (SmoothQuant)."""

    alpha: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="0 to 1, for all groups")
    rules: list[SmoothRule] = Field([], description="first match wins over `alpha`")


class Verify(_Block):
    """Limits for `quantcli verify`, which finds them in the checkpoint."""

    min_sqnr: float | None = Field(None, description="dB that each quantized weight must reach")
    max_ppl_ratio: Annotated[float, Field(gt=0)] | None = Field(
        None, description="perplexity over the float model's"
    )
    max_kl: Annotated[float, Field(gt=0)] | None = Field(
        None, description="mean KL divergence of predictions, nats a token"
    )


class RuleFile(_Block):
    """One rule as it stands in the file."""

    match: Annotated[list[str], BeforeValidator(_listed, json_schema_input_type=str | list[str])] = (
        Field(min_length=1, description='globs over full module names, or "re:REGEX"')
    )
    scheme: str | dict[str, Any] = Field(description="keep, bf16, a scheme, or {name: ..., options}")
    optional: bool = Field(False, description="do not fail when nothing matches")


class RecipeFile(_Block):
    """A recipe as it stands in the file."""

    target: str | dict[str, Any] = Field(description="the format to write")
    rules: list[RuleFile] = Field(min_length=1, description="first match wins")
    model: str | None = Field(None, description="directory or Hub id; --model wins")
    output: str | None = Field(None, description="directory to write; --out wins")
    max_shard: Size = Field(5 * 10**9, description="largest weight file, such as 5GB")
    expect: Expect = Expect()
    calibration: Calibration | None = None
    smooth: Smooth | None = None
    verify: Verify | None = None
