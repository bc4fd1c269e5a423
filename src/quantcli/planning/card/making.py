"""How an output was made, for its card: what is quantized, what stays float and why, from what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.filesize import decimal

from quantcli.checkpoint.files import RECIPE_FILE, SOURCE_RECIPE
from quantcli.checkpoint.rotation.summary import sentence
from quantcli.core.text import count
from quantcli.planning.card.markdown import code, plain, table
from quantcli.planning.plan import CacheScale, Kept, Plan, RuleLine, Work
from quantcli.recipe.recipe import name_of_data

if TYPE_CHECKING:
    from quantcli.planning.repack import Packed, Repacking

_NAMES = 12  # of a group that stays float


@dataclass(frozen=True)
class Making:
    """How a checkpoint was made, in Markdown.

    modules: what is quantized, and what is not. steps: by what. recipe: the name of its file.
    """

    modules: str
    steps: str
    recipe: str


def conversion(plan: Plan) -> Making:
    """How a recipe makes a checkpoint."""
    rules = [line for line in plan.rules if line.modules]
    rows = [[code(line.scheme), *_row(line)] for line in rules]
    before = decimal(sum(group.nbytes_before for group in plan.kept))
    after = decimal(sum(group.nbytes for group in plan.kept))
    rows.append(["float", "", f"{sum(group.tensors for group in plan.kept):,}", before, after])
    if plan.cache is not None:
        how = f"cache of keys and values, {count(plan.cache.layers, 'layer')}"
        scales = sum(isinstance(item, CacheScale) for item in plan.items)
        rows.append([how, plain(str(plan.cache.cache)), f"{scales:,}", "", decimal(plan.cache_nbytes)])
    columns = ["scheme", "engine's name", "modules or tensors", "before", "after"]
    floats = "\n".join(map(_stays, plan.kept))
    modules = _blocks(
        table(columns, rows, columns[2:]),
        _loads_on((line.label, line.loads_on) for line in rules),
        f"What stays float, and why:\n\n{floats}" if floats else "",
    )
    steps = _blocks(_source(plan), _rotation(plan), _calibration(plan))
    return Making(modules, steps, RECIPE_FILE)


def packing(work: Repacking) -> Making:
    """How packing makes a checkpoint."""
    columns = [f"in {work.origin.name}", f"in {work.target.name}", "modules", "before", "after"]
    modules = _blocks(
        table(
            [*map(plain, columns)],
            [[code(line.before), *_row(line)] for line in work.lines],
            columns[2:],
        ),
        _loads_on((line.label, line.loads_on) for line in work.lines),
        f"Copied, byte for byte: {count(work.floats, 'tensor')}.",
    )
    steps = (
        f"Packed from a checkpoint in the format {code(work.origin.name)}, {plain(work.state)}: codes "
        "and scales are those of the source."
    )
    return Making(modules, _blocks(steps, _source(work)), SOURCE_RECIPE)


def _row(line: RuleLine | Packed) -> list[str]:
    """The engine's name, the number of modules, and sizes."""
    sizes = decimal(line.nbytes_before), decimal(line.nbytes_after)
    return [code(line.label), f"{line.modules:,}", *sizes]


def _loads_on(lines: Iterable[tuple[str, str | None]]) -> str:
    """Engines and hardware by label."""
    texts = (f"{code(label)} loads on {plain(where)}." for label, where in lines if where)
    return "\n\n".join(dict.fromkeys(texts))


def _stays(group: Kept) -> str:
    names = [code(name) for name in group.names[:_NAMES]]
    more = f" and {len(group.names) - _NAMES} more" if len(group.names) > _NAMES else ""
    return f"* {plain(group.reason)} ({decimal(group.nbytes)}): {', '.join(names)}{more}"


def _source(work: Work) -> str:
    return (
        f"The source has {count(work.checkpoint.on_disk, 'tensor')} of "
        f"{decimal(work.checkpoint.nbytes)}; its headers and config.json have the fingerprint "
        f"{code(work.checkpoint.fingerprint)}."
    )


def _rotation(plan: Plan) -> str:
    if plan.checkpoint.rotation is None:
        return ""
    text = plain(sentence(plan.checkpoint.rotation))
    return f"The model was {text}. It computes the same function in another basis."


def _calibration(plan: Plan) -> str:
    block = plan.recipe.file.calibration
    if not plan.needs_calibration or block is None:
        return "No data was needed: the numbers follow from the weights alone."
    name = name_of_data(block.data or "")
    sha256 = (plan.basis and plan.basis.text) or block.sha256
    digest = f" (sha256 {code(sha256)})" if sha256 else ""
    methods = ", ".join(code(method.name) for method in plan.methods)
    return (
        f"Calibrated on {count(block.samples, 'sample')} of up to {count(block.length, 'token')} from "
        f"{code(name)}{digest}, with {methods}."
    )


def _blocks(*texts: str) -> str:
    return "\n\n".join(filter(None, texts))
