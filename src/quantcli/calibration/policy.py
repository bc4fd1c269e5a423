"""The recipe's options for a calibration, by module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from quantcli.core.errors import InputError
from quantcli.core.numerics import Stats
from quantcli.planning.siblings import Siblings
from quantcli.schemes.arithmetic.observers import Observer
from quantcli.schemes.base import Scheme
from quantcli.targets.kv_cache import AttentionLayer


@dataclass(frozen=True)
class Quantized:
    """A module that the plan quantizes, and the dtypes in which the engine holds its scales."""

    scheme: Scheme
    weight_dtype: torch.dtype
    input_dtype: torch.dtype
    rule: str  # file:line


@dataclass(frozen=True)
class Policy:
    """The recipe, for one model.

    quantized:        by module.
    siblings:         the modules that share what is measured of their inputs.
    uncalibrated:     error | dynamic | nearest | group: treatment of a module that no token reaches.
    inputs:           float | quantized | running: inputs of a layer, see `shown`.
    seed:             of learning.
    all_tokens:       whether every expert is shown all tokens, and not just those that it is given.
    attention:        layers whose cache of keys and values is quantized, by name.
    serving_dtype:    the dtype that the engine computes in.
    """

    quantized: Mapping[str, Quantized]
    siblings: Siblings
    uncalibrated: str
    inputs: str
    seed: int = 0
    all_tokens: bool = False
    attention: Mapping[str, AttentionLayer] = field(default_factory=dict)
    serving_dtype: torch.dtype = torch.bfloat16

    def scheme(self, module: str) -> Scheme | None:
        """A module's scheme; None if it stays float."""
        quantized = self.quantized.get(module)
        return None if quantized is None else quantized.scheme

    def measures(self, module: str) -> bool:
        """Whether a module's scheme needs a range or a transform, and not just codes or clips."""
        scheme = self.scheme(module)
        return scheme is not None and scheme.shares_data

    def joins(self, module: str) -> bool:
        """Whether a module's observer counts the inputs of its siblings, which may be others."""
        scheme = self.scheme(module)
        return self.siblings.given_to(module) and scheme is not None and scheme.joins_inputs

    def weighs_inputs(self, module: str) -> bool:
        """Whether a module's scheme is given the mean square of each input."""
        scheme = self.scheme(module)
        return scheme is not None and scheme.clips_by_inputs

    def scheme_with(self, module: str, stats: Stats) -> Scheme:
        """A quantized module's scheme, or that for a module of which no inputs were seen."""
        scheme = self.quantized[module].scheme
        unseen = scheme.clips_by_inputs and "input_square" not in stats
        return scheme.without_inputs if unseen else scheme

    @cached_property
    def sharing(self) -> Mapping[str, Sequence[str]]:
        """The modules that share the scale of a weight, by each of those that share it with others."""
        groups: dict[str, list[str]] = defaultdict(list)
        for module, quantized in self.quantized.items():
            name = self.siblings.group(module)
            if name is not None and quantized.scheme.needs_weight_amax:
                groups[name].append(module)
        return {module: modules for modules in groups.values() for module in modules}

    def observer(self, module: str) -> Observer | None:
        """A new observer for a module's input, if its scheme needs data."""
        quantized = self.quantized.get(module)
        return None if quantized is None else quantized.scheme.observer(quantized.input_dtype)


def not_finite(module: str, where: str) -> InputError:
    """A module that is given NaN or Inf by a model in `where`."""
    return InputError(
        f"the input of `{module}` holds NaN or Inf",
        where=where,
        fix="if the model is sound, it needs more range: set calibration.dtype to float32",
    )


def unreached(modules: Sequence[str], where: str) -> InputError:
    """Modules whose scheme needs data, and that no token reached."""
    few = ", ".join(f"`{module}`" for module in modules[:3])
    more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
    whose = "its scheme needs" if len(modules) == 1 else "their schemes need"
    return InputError(
        f"no token reached {few}{more}, and {whose} data",
        where=where,
        fix="`keep` them or give them a scheme with dynamic inputs, by a rule before this one; or set "
        "calibration.uncalibrated to `dynamic`; experts may take `nearest`, `group`, or more text or "
        "`all_tokens: true`",
    )
