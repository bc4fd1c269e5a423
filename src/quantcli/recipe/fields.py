"""The keys of a recipe file and the values that they take."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    model_validator,
)

from quantcli.checkpoint.hub import HUB_ID
from quantcli.checkpoint.roles import Role
from quantcli.core.text import count
from quantcli.core.untrusted.patterns import Budget, Expression, globs

_SIZE = TypeAdapter(ByteSize)
REGEX = "re:"  # begins a pattern that is not a glob
LEAST_SIZE = 1000  # bytes: the header of a shard alone takes hundreds, and no layer has so few
_SIZE_FORM = re.compile(r"\s*\d+(\.\d+)?\s*([KMGT]i?)?B?\s*", re.ASCII | re.IGNORECASE)


class Block(BaseModel):
    """A mapping in a recipe: unknown keys and other types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def parse_size(value: Any) -> int:
    """The bytes of a size such as `5GB` or `512MiB`, or of a plain number. ValueError otherwise.

    A size below 1KB is a number whose unit was forgotten: 5 for 5GB.
    """
    size = 0
    # ByteSize ignores what follows a number: it reads 1,5GB as 1 byte
    if not isinstance(value, str) or _SIZE_FORM.fullmatch(value):
        with suppress(ValueError, OverflowError):
            size = int(_SIZE.validate_python(value, strict=True))
    if 0 < size < LEAST_SIZE:
        example = f"{size}GB" if str(value).strip() == str(size) else "5GB"
        small = f"a size of {count(size, 'byte')} is below the smallest, 1KB"
        raise ValueError(f"{small}: write the unit, such as {example}")
    if not 0 < size < 2**63:
        raise ValueError("expected a size such as 5GB or 512MiB")
    return size


def _check_limit(value: Any) -> str:
    text = str(value).strip()
    if isinstance(value, bool) or not re.fullmatch(r"(>=|<=|==|>|<)\s*\d+(\.\d+)?", text):
        raise ValueError('expected a comparison such as ">= 90"')
    return text


def _check_hub_id(value: Any) -> str:
    match = HUB_ID.fullmatch(value) if isinstance(value, str) else None
    if match is None or match["revision"] is not None:
        raise ValueError("expected a Hub id, such as ORG/NAME")
    return match["repository"]


def listed(value: Any) -> Any:
    """A text as a list of it; any other value as it is."""
    return [value] if isinstance(value, str) else value


@lru_cache(4096)
def _compiled(patterns: tuple[str, ...], where: str | None) -> tuple[Any, ...]:
    """Expressions for some patterns; one for all globs together."""
    stars = [pattern for pattern in patterns if not pattern.startswith(REGEX)]
    others = [pattern for pattern in patterns if pattern.startswith(REGEX)]
    budget = Budget()
    together = [globs(stars, where)] if stars else []
    return (*together, *(expression(pattern, where, budget) for pattern in others))


def expression(pattern: str, where: str | None, budget: Budget | None = None) -> Expression:
    """The regular expression of a pattern `re:REGEX`. InputError for one that is not to be used."""
    return Expression(pattern.removeprefix(REGEX), where, pattern=pattern, budget=budget)


def matches(patterns: Iterable[str], module: str, where: str | None = None) -> bool:
    """Whether any pattern matches the whole module name.

    where: the place of the patterns. InputError for one that takes too long.
    """
    return any(each.fullmatch(module) for each in _compiled(tuple(patterns), where))


Limit = Annotated[str, BeforeValidator(_check_limit)]
HubId = Annotated[str, BeforeValidator(_check_hub_id)]
Match = Annotated[
    list[str],
    BeforeValidator(listed, json_schema_input_type=str | list[str]),
    Field(min_length=1, description='globs over full module names, or "re:REGEX"'),
]
Roles = Annotated[
    list[Role],
    BeforeValidator(listed, json_schema_input_type=Role | list[Role]),
    Field(min_length=1),
]
Size = Annotated[
    int,
    BeforeValidator(parse_size, json_schema_input_type=str | Annotated[int, Field(ge=LEAST_SIZE)]),
]


FileVersion = Annotated[Literal[1] | None, Field(description="of the form of this file [default: 1]")]


class Expect(Block):
    """Limits of the plan; a run that would miss one is refused before it begins."""

    quantized_params_pct: Limit | None = Field(None, description="percentage of all parameters")
    quantizable_pct: Limit | None = Field(
        None,
        description="percentage of the weights that the engine takes with these schemes: linears in "
        "the layers of the language model",
    )
    quantized_modules: Limit | None = Field(None, description="number of quantized modules")
    bits_per_param: Limit | None = Field(None, description="bits of output per parameter")
    output_gib: Limit | None = Field(None, description="GiB of weights written")


class Calibration(Block):
    """The text that runs through the model, for schemes that measure inputs and for methods."""

    data: str | None = Field(None, description="text file, jsonl, or datasets:ID")
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        None, description="of the text; another one is refused"
    )
    samples: Annotated[int, Field(gt=0, le=2**20)] = Field(128, description="number of samples")
    length: Annotated[int, Field(gt=1, le=2**20)] = Field(512, description="tokens of each sample")
    seed: int = Field(0, description="seed of the choice of samples")
    pack: bool = Field(True, description="join documents; false: each record is one sample")
    inputs: Literal["float", "quantized", "running"] = Field(
        "float",
        description="inputs of each layer: outputs of the float layer before it, of the quantized "
        "one, or of one that is quantized with the ranges so far, as the reference producer does",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="dtype to compute in; auto: the serving dtype"
    )
    uncalibrated: Literal["error", "dynamic", "nearest", "group"] = Field(
        "error",
        description="a module that no token reaches is an error, takes a scheme without data, or the "
        "statistics of the expert with the nearest router weights, or of all experts of its layer",
    )
    all_tokens: bool = Field(
        False,
        description="show every expert all tokens, for statistics alone: what flows on is routed",
    )


class LearnRotation(Block):
    """How rotations are learned: so that int4 changes the outputs of layers least."""

    epochs: Annotated[int, Field(ge=1, le=100)] = Field(
        4, description="passes over all layers and text"
    )
    rate: Annotated[float, Field(gt=0, le=1)] = Field(
        0.01, description="of the first step, in radians; it falls to 0"
    )


class Rotate(Block):
    """Orthogonal matrices that are folded into the weights before all else: the function stays."""

    residual: bool = Field(
        True, description="of the residual stream; the norms are folded into what reads them"
    )
    heads: bool = Field(True, description="of the values of each attention, head by head")
    untie: bool = Field(
        False,
        description="give a tied output matrix a tensor of its own, which takes as many bytes as the "
        "embeddings",
    )
    seed: int = Field(0, description="seed of the signs")
    learn: LearnRotation | None = Field(
        None, description="learn the matrices on the text of `calibration`; they begin as Hadamard ones"
    )

    @model_validator(mode="after")
    def _rotates(self) -> Rotate:
        if not self.residual and not self.heads:
            raise ValueError("rotates nothing: leave the block `rotate` out")
        if self.learn is not None and not self.residual:
            raise ValueError("`learn` is for the residual stream: leave `residual: false` out")
        return self


class Verify(Block):
    """Limits for `quantcli verify --recipe`; in a checkpoint, they only tighten the defaults."""

    min_sqnr: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        None, description="dB that each quantized weight must reach"
    )
    max_ppl_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="perplexity over the float model's"
    )
    max_kl: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="mean KL divergence of predictions, nats per token"
    )


class SchemeBudget(Block):
    """What modules may take together, and the schemes that share it: exactly one limit."""

    bits_per_quantizable: Annotated[float, Field(gt=0, le=64, allow_inf_nan=False)] | None = Field(
        None,
        description="bits for each weight of the modules of rules with `scheme: budget`, with scales",
    )
    output_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="GiB of weights written, of all modules"
    )
    max_ppl_ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = Field(
        None, description="perplexity over the float model's: the smallest output that keeps it"
    )
    schemes: list[str | dict[str, Any]] | None = Field(
        None,
        min_length=1,
        description="schemes to choose from, by name or {name: ..., options}; keep is always one "
        "[default: those with float inputs that the target stores]",
    )

    @model_validator(mode="after")
    def _has_one_limit(self) -> SchemeBudget:
        limits = (self.bits_per_quantizable, self.output_gib, self.max_ppl_ratio)
        if sum(limit is not None for limit in limits) != 1:
            raise ValueError(
                "a budget has one limit: `bits_per_quantizable`, `output_gib` or `max_ppl_ratio`"
            )
        return self


class RuleFile(Block):
    """One rule of a recipe file. With both `match` and `role`, it takes what both select."""

    match: Match | None = Field(None, description='globs over full module names, or "re:REGEX"')
    scheme: str | dict[str, Any] = Field(
        description="keep, bf16, budget, a scheme, or {name: ..., options}"
    )
    optional: bool = Field(False, description="do not fail when nothing matches")
    role: Roles | None = Field(
        None, description="roles of modules; what the engine builds as float is left out"
    )

    @model_validator(mode="after")
    def _selects(self) -> RuleFile:
        if self.match is None and self.role is None:
            raise ValueError("a rule needs `match` or `role`, such as role: [attention, mlp]")
        return self


class RecipeFile(Block):
    """A recipe file."""

    version: FileVersion = None
    target: str | dict[str, Any] = Field(description="the format to write")
    rules: list[RuleFile] = Field(min_length=1, description="first match wins")
    model: str | None = Field(None, description="directory, Hub id or address; --model wins")
    output: str | None = Field(None, description="directory to write; --out wins")
    max_shard: Size = Field(5 * 10**9, description="size limit of a weight file, such as 5GB")
    expect: Expect = Expect()
    calibration: Calibration | None = None
    rotate: Rotate | None = Field(
        None, description="rotate the model first, so that outliers spread over all channels"
    )
    smooth: dict[str, Any] | None = Field(
        None, description="the method `smooth` with these options, before all other methods"
    )
    methods: list[str | dict[str, Any]] | None = Field(
        None,
        min_length=1,
        description="calibration methods that act on the model, in this order",
    )
    kv_cache: str | dict[str, Any] | None = Field(
        None,
        description="quantize the cache of keys and values, too: a format by name, or a mapping with "
        "`format` and options; scales are measured",
    )
    budget: SchemeBudget | None = Field(
        None, description="schemes are chosen for modules of rules with `scheme: budget`"
    )
    verify: Verify | None = None
    card: bool | None = Field(
        None,
        description="false: no model card is made, and the README.md of the model is copied as it is",
    )
    base_model: HubId | None = Field(
        None, description="the model's Hub id, for the card [default: MODEL, if it is a Hub id]"
    )
    siblings: list[str] | None = Field(
        None,
        min_length=1,
        description="regular expressions over full module names: modules with equal capture groups "
        "share what an engine keeps once, such as an input scale",
    )

    @property
    def learns_rotation(self) -> bool:
        """Whether matrices of a rotation are to be learned."""
        return self.rotate is not None and self.rotate.learn is not None
