"""Lists of names in `quantization_config`: folded if long, and in all spellings of engines."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence

from quantcli.core.errors import InputError
from quantcli.core.untrusted.patterns import Budget, Expression, own
from quantcli.targets.spellings import MOVED, float_towers, is_decoder, spellings

MOST_NAMES = 512  # in one list; more are folded into regular expressions
_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")
_LAST_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.[^0-9][^.]*(?:\.[^0-9][^.]*)*$)")
_HOLE = "\0"  # stands for a number
_MOST_NUMBERS = 100  # in one expression


def expression_faults(expressions: Iterable[str]) -> Iterator[str]:
    """The reasons why names cannot be matched with regular expressions of an untrusted list."""
    budget = Budget()
    for expression in expressions:
        try:
            Expression(expression, budget=budget)
        except InputError as error:
            yield error.what


def expressions(modules: Sequence[str], others: Sequence[str]) -> list[str]:
    """Regular expressions that match all of these modules in the spellings of engines, and no other."""
    found = [entry.removeprefix("re:") for entry in _with_any_beginning(modules, others)]
    compiled = [own(expression) for expression in found]
    rest = [name for name in modules if not any(one.match(name) for one in compiled)]
    return [*found, *(f"{re.escape(name)}$" for name in rest)]


def ignored(floats: Sequence[str], quantized: Sequence[str]) -> list[str]:
    """Entries that match all float modules and no quantized one, in every engine.

    vLLM and SGLang rename exact names with tensors, and compare expressions with their own names;
    transformers renames neither. So a model with towers has both, and its expressions take any
    beginning of a name.
    """
    names = fold(floats, quantized)
    # engines look up each of the experts
    stacks = (_tail(_NUMBER, name) for name in floats if name.endswith(".experts"))
    names += [_expression(stack).removesuffix("$") + r"\..+" for stack in dict.fromkeys(stacks)]
    if is_decoder([*floats, *quantized]):
        return names
    towers = [rf"re:(?:.*\.)?{re.escape(name)}\..+" for name in float_towers(floats, quantized)]
    expressions_of_towers = [own(tower.removeprefix("re:")) for tower in towers]
    rest = [name for name in floats if not any(one.match(name) for one in expressions_of_towers)]
    return list(dict.fromkeys([*names, *towers, *_with_any_beginning(rest, quantized)]))


def _with_any_beginning(floats: Sequence[str], quantized: Sequence[str]) -> Iterator[str]:
    """Expressions for the ends of names: with any number, or only with those that are float."""
    kinds = {_NUMBER.sub(_HOLE, module): module for module in quantized}.values()  # one of each
    folded = {_NUMBER.sub(_HOLE, name) for module in kinds for name in spellings(module)}
    tails = {tail for name in folded for tail in _tails(name)}
    names = dict.fromkeys(name for module in floats for name in spellings(module))
    ends = {name: _shortest(_NUMBER.sub(_HOLE, name), tails) for name in names}
    yield from map(_expression, dict.fromkeys(end for end in ends.values() if end))
    rest = [name for name, end in ends.items() if not end]
    if rest:
        lasts = {name.rpartition(".")[2] for name in rest}
        spelled = (name for module in quantized for name in spellings(module))
        alike = (name for name in spelled if name.rpartition(".")[2] in lasts)
        tails = {tail for name in alike for tail in _tails(name)}
    numbers: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)  # a set in order
    for name in rest:
        end = _shortest(name, tails)
        if end and (match := _NUMBER.search(end)):
            numbers[end[: match.start()], end[match.end() :]][match[0]] = None
    for (before, after), found in numbers.items():
        values = list(found)
        for start in range(0, len(values), _MOST_NUMBERS):
            one_of = "|".join(values[start : start + _MOST_NUMBERS])
            yield rf"re:(?:.*\.)?{re.escape(before)}(?:{one_of}){re.escape(after)}$"


def _shortest(name: str, tails: Collection[str]) -> str | None:
    """The shortest end of a name that no other name has; None if there is none.

    It holds the part before the first number, or if there is none, all but the parts that move.
    """
    parts = name.split(".")
    numbers = (i for i, part in enumerate(parts[1:-1]) if part == _HOLE or part.isdecimal())
    if (first := next(numbers, None)) is None:
        first = next((i for i, part in enumerate(parts) if part not in MOVED), 0)
    ends = (".".join(parts[start:]) for start in range(first, -1, -1))
    return next((end for end in ends if end not in tails), None)


def fold(modules: Sequence[str], others: Iterable[str]) -> list[str]:
    """The names; for many, regular expressions that match all of them and none of `others`.

    Engines rename the beginnings of names (`model.language_model.` becomes `language_model.model.`) in
    exact names but not in regular expressions. So these begin at the first layer's number.
    """
    if len(modules) <= MOST_NAMES:
        return list(modules)
    folded: list[str] = []
    names = list(modules)
    other_names = list(others)
    for number in (_NUMBER, _LAST_NUMBER):
        tails = {tail for name in other_names for tail in _tails(number.sub(_HOLE, name))}
        families = {name: _tail(number, name) for name in names}
        unique = {tail for tail in families.values() if _HOLE in tail and tail not in tails}
        folded += [_expression(tail) for tail in dict.fromkeys(families.values()) if tail in unique]
        names = [name for name in names if families[name] not in unique]
    return [*folded, *names]


def _tail(number: re.Pattern[str], name: str) -> str:
    """The end of a name, from the part before its first number on, with holes for numbers."""
    match = _NUMBER.search(name)
    start = 0 if match is None else name.rfind(".", 0, match.start() - 1) + 1
    return number.sub(_HOLE, name)[start:] if start else number.sub(_HOLE, name)


def _tails(folded: str) -> Iterator[str]:
    """A name, and its ends without the first parts."""
    parts = folded.split(".")
    for start in range(len(parts)):
        yield ".".join(parts[start:])


def _expression(tail: str) -> str:
    return r"re:(?:.*\.)?" + r"[0-9]+".join(re.escape(part) for part in tail.split(_HOLE)) + "$"
