"""`quantization_config` of `quant_method: fp8`: written, and read from any producer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from quantcli.checkpoint.checkpoint import CONFIG
from quantcli.checkpoint.config.settings import Settings
from quantcli.core.findings import Finding, failed, noted
from quantcli.core.numerics import Numerics
from quantcli.targets.base import PlannedCheckpoint
from quantcli.targets.fp8.kinds import numerics_of
from quantcli.targets.layouts import static_inputs
from quantcli.targets.spellings import skip_list
from quantcli.targets.vllm_family import EXPERT, float_linears

METHOD = "fp8"
E4M3 = ("e4m3", "float8_e4m3fn")  # published spellings of `fmt`
# Lists of float modules; the first that is not empty counts.
# Source: vllm 0.32.0, model_executor/layers/quantization/fp8.py:158-170.
_KEYS = ("ignored_layers", "modules_to_not_convert")


def quantization_config(output: PlannedCheckpoint, numerics: Numerics) -> dict[str, Any]:
    """The whole object. Engines compare whole names: each linear that stays float has its own.

    Experts also have that of their layer's: it is one module in transformers and SGLang.
    """
    floats = float_linears(output)
    layers = dict.fromkeys(match["experts"] for name in floats if (match := EXPERT.fullmatch(name)))
    quantized = [module.name for module in output.modules if module.numerics]
    table: dict[str, Any] = {
        "quant_method": METHOD,
        "activation_scheme": "static" if static_inputs(numerics) else "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": skip_list([*floats, *layers], quantized),
    }
    if numerics.weight.block:
        table["weight_block_size"] = list(numerics.weight.block)
    return table


@dataclass
class Fp8Config:
    """`quantization_config`, read. numerics: None if it is too damaged to tell them.

    ignored: full names of float modules.
    skipped: what transformers reads of them; None if it chooses by itself.
    """

    numerics: Numerics | None = None
    ignored: frozenset[str] = frozenset()
    skipped: tuple[str, ...] | None = None
    findings: list[Finding] = field(default_factory=list)


def read_config(block: Settings) -> Fp8Config:
    """The object as the engine reads it, untrusted. Never raises: faults are findings."""
    config = Fp8Config(findings=list(_faults(block)))
    if any(finding.severity == "error" for finding in config.findings):
        return config
    size = block.value("weight_block_size")
    tile = (size[0], size[1]) if isinstance(size, list) else None
    static = block.text("activation_scheme") == "static"
    config.numerics = numerics_of("static" if static else "dynamic", tile)
    config.ignored = frozenset(block.texts(_KEYS[0]) or block.texts(_KEYS[1]))
    if block.value(_KEYS[1]) is not None:
        config.skipped = block.texts(_KEYS[1])
    return config


def _faults(block: Settings) -> Iterator[Finding]:
    if block.value("quant_method") != METHOD:
        what = "has no quantization_config for its fp8 weights: the engine would take codes for weights"
        yield failed("config", what, CONFIG, f'add it, with "quant_method": "{METHOD}"')
        return
    inputs, size = block.value("activation_scheme"), block.value("weight_block_size")
    if inputs not in ("static", "dynamic"):
        what = f"activation_scheme is {inputs!r:.60}; engines take static and dynamic"
        yield failed("config", what, CONFIG)
    if size is not None:
        sides = size if isinstance(size, list) else []
        if len(sides) != 2 or not all(type(side) is int and 0 < side < 2**31 for side in sides):
            what = f"weight_block_size is {size!r:.60}, not two numbers of rows and columns"
            yield failed("config", what, CONFIG)
        if inputs == "static":
            what = "activation_scheme is static, which engines do not have for blocks"
            yield failed("config", what, CONFIG)
    fmt = block.value("fmt")
    if fmt not in (None, *E4M3):
        what = f"fmt is {fmt!r:.60}; engines read every code as e4m3"
        yield failed("config", what, CONFIG, "convert the model again, to e4m3")
    for key in _KEYS:
        names = block.value(key)
        if names is not None and not (
            isinstance(names, list) and all(isinstance(name, str) for name in names)
        ):
            yield failed("config", f"{key} is {names!r:.60}, not a list of names", CONFIG)
    if all(block.value(key) for key in _KEYS):
        yield noted("config", f"has both {_KEYS[0]} and {_KEYS[1]}: engines read the first", CONFIG)
