"""`quantization_config` for compressed-tensors: which modules have which scheme, and which none."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from quantcli.core.numerics import Numerics
from quantcli.targets.base import Output
from quantcli.targets.compressed_tensors_kinds import Kind, arguments
from quantcli.targets.names import absent_head, is_head, is_linear

MOST_NAMES = 512  # that one list has: more are folded into regular expressions
_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")
_LAST_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.[^0-9][^.]*(?:\.[^0-9][^.]*)*$)")
_HOLE = "\0"


def quantization_config(output: Output, kinds: dict[Numerics, Kind]) -> dict[str, Any]:
    """The whole object. `kinds` has every numerics of the output."""
    groups: dict[Numerics, list[str]] = defaultdict(list)
    floats = []
    for module in output.modules:
        if module.numerics is not None:
            groups[module.numerics].append(module.name)
        elif is_linear(module):
            floats.append(module.name)
    if head := absent_head(output.tensors):
        floats.append(head.removesuffix(".weight"))
    formats = {kinds[numerics].format for numerics in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{number}": {
                "targets": _targets(names, [n for other in groups.values() for n in other], floats),
                "format": kinds[numerics].format,
                "weights": arguments(numerics.weight),
                "input_activations": arguments(numerics.input) if numerics.input else None,
                "output_activations": None,
            }
            for number, (numerics, names) in enumerate(groups.items())
        },
        "ignore": fold(floats, [n for names in groups.values() for n in names]),
    }


def _targets(mine: Sequence[str], quantized: Sequence[str], floats: Iterable[str]) -> list[str]:
    """`Linear` where nothing else is quantized; else names, as engines match those first."""
    if len(mine) == len(quantized):
        return ["Linear", *filter(is_head, mine)]
    members = set(mine)
    return fold(mine, [name for name in quantized if name not in members])


def fold(mine: Sequence[str], others: Iterable[str]) -> list[str]:
    """Names as they are; of many, regular expressions that match all of them and none of `others`.

    Engines rename the beginnings of names (`model.language_model.` becomes `language_model.model.`) in
    exact names but not in regular expressions. So these begin at the first layer's number.
    """
    if len(mine) <= MOST_NAMES:
        return list(mine)
    folded: list[str] = []
    left = list(mine)
    rest = list(others)
    for number in (_NUMBER, _LAST_NUMBER):
        taken = {tail for name in rest for tail in _tails(number.sub(_HOLE, name))}
        families = {name: _tail(number, name) for name in left}
        good = {tail for tail in families.values() if _HOLE in tail and tail not in taken}
        folded += [_expression(tail) for tail in dict.fromkeys(families.values()) if tail in good]
        left = [name for name in left if families[name] not in good]
    return [*folded, *left]


def _tail(number: re.Pattern[str], name: str) -> str:
    """A name from the part before its first number on, with holes for numbers."""
    match = _NUMBER.search(name)
    start = 0 if match is None else name.rfind(".", 0, match.start() - 1) + 1
    return number.sub(_HOLE, name)[start:] if start else number.sub(_HOLE, name)


def _tails(folded: str) -> Iterator[str]:
    """A name and all that remains of it without its first parts."""
    parts = folded.split(".")
    for start in range(len(parts)):
        yield ".".join(parts[start:])


def _expression(tail: str) -> str:
    return r"re:(?:.*\.)?" + r"[0-9]+".join(re.escape(part) for part in tail.split(_HOLE)) + "$"
