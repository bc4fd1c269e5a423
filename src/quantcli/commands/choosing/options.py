"""How a model will be served: devices, context, sequences at a time. Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from quantcli.commands.choosing.devices import Device
from quantcli.core.errors import InputError

CONTEXT, CONCURRENCY = 8192, 8  # if the user says nothing
_MOST_TOKENS, _MOST_SEQUENCES = 2**30, 2**20
_TOKENS = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[km]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 1024, "m": 1024**2}

# What an engine leaves alone or uses for itself. Sources: vllm 0.32.0, config/cache.py:102 (it takes
# 0.92 of the memory by default, earlier versions 0.9); engine/arg_utils.py, `max_num_batched_tokens`.
SHARE = 0.9  # of the memory of a device
ENGINE = 10**9  # bytes: libraries, graphs
BATCH = 8192  # tokens whose values are in memory at a time


@dataclass(frozen=True)
class Serving:
    """Devices that a model is served on.

    context:     tokens of each sequence; None: CONTEXT, or what the model was made for if that is less.
    concurrency: sequences at a time.
    """

    device: Device
    context: int | None = None
    concurrency: int = CONCURRENCY

    def __post_init__(self) -> None:
        for option, value, most in (
            ("context", self.context, _MOST_TOKENS),
            ("concurrency", self.concurrency, _MOST_SEQUENCES),
        ):
            if value is not None and not 0 < value <= most:
                what = f"the {option} must be from 1 to {most:,}"
                raise InputError(what, where=f"--{option} {value}", fix=f"such as --{option} 8")

    @property
    def usable(self) -> int:
        """Bytes of a device that the engine takes."""
        return int(SHARE * self.device.nbytes)

    @staticmethod
    def reserve(hidden: int, widest: int, devices: int) -> int:
        """Bytes on each device next to weights and cache: ENGINE, and the values of BATCH tokens.

        hidden: width of hidden states. widest: of what an MLP computes for a token.
        """
        return ENGINE + 2 * BATCH * (4 * hidden + 2 * math.ceil(widest / devices))


def parse_tokens(text: str) -> int:
    """Tokens such as `8192`, `32k` (32 x 1024) or `1M`. InputError for anything else."""
    match = _TOKENS.fullmatch(text.strip())
    number = float(match["number"]) * _UNITS[match["unit"].lower()] if match else 0.0
    if not 1 <= number <= _MOST_TOKENS:
        what = f"the context must be a number of tokens from 1 to {_MOST_TOKENS:,}"
        raise InputError(what, where=f"--context {text}", fix="such as --context 32k")
    return int(number)
