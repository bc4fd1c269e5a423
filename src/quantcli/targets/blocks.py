"""Where blocks of weights are cut that engines merge or split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quantcli.core.numerics import Module
from quantcli.targets.siblings import EXPERT, FUSED

_DOWN = frozenset({"down_proj", "w2"})


def check_blocks(module: Module, labels: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What an engine refuses, and what to do: parts of a merged parameter must begin with a block.

    labels: of all modules, by name. Nothing for a module whose scales are not of blocks.
    """
    if module.numerics is None or module.numerics.weight.per != "block":
        return
    assert module.numerics.weight.block is not None
    rows, columns = module.numerics.weight.block
    n, k = module.shape
    parent, _, last = module.name.rpartition(".")
    group = next((group for group in FUSED if last in group), ())
    later = group[group.index(last) + 1 :] if last in group else ()
    fix = "use a scheme without blocks for these modules"
    if n % rows and any(f"{parent}.{sibling}" in labels for sibling in later):
        yield f"the engine fuses it with others, and its {n} rows are no multiple of {rows}", fix
    elif last in {"gate_up_proj", "gate_up"} and n % (2 * rows):
        yield f"it holds two projections of {n // 2} rows, which are no multiple of {rows}", fix
    elif EXPERT.fullmatch(module.name) and (k % columns if last in _DOWN else n % rows):
        width = k if last in _DOWN else n
        yield f"inner widths of experts must be multiples of {rows}; this one is {width}", fix
