"""Units: modules that must have one scheme, what they may take, and the bytes that it costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from quantcli.checkpoint.roles import roles_of
from quantcli.planning.choices import group_names
from quantcli.planning.plan import Plan, Quantize, quantized_items
from quantcli.schemes.base import Scheme


@dataclass(frozen=True)
class Option:
    """A scheme that modules may take.

    name:    as tables show it. scheme: None: the modules stay float.
    plan:    of the recipe in which all modules of the budget take it.
    modules: those that the budget's rules select, as far as the engine takes them with it.
    """

    name: str
    scheme: Scheme | None
    plan: Plan
    modules: frozenset[str]

    @cached_property
    def items(self) -> Mapping[str, Quantize]:
        """What is quantized, by module."""
        items = quantized_items(self.plan) if self.scheme is not None else []
        return {item.module: item for item in items if item.module in self.modules}

    def unpacked(self, module: str) -> int:
        """Bytes that the codes of a module take beyond the bits of their type."""
        item = self.items.get(module)
        if item is None:
            return 0
        bits, shape = item.scheme.numerics.weight.element.bits, item.source.spec.shape
        specs = (out.spec for out in item.outputs if out.spec.shape == shape)
        return sum(max(0, spec.nbytes - spec.numel * bits // 8) for spec in specs)


@dataclass(frozen=True)
class Unit:
    """Modules that must have one scheme.

    weights: their number of weights. nbytes: of all their tensors, for each option; None if it cannot
    be taken. packed: the same if codes take the bits of their type, as engines hold them: some formats
    store int4 in bytes.
    """

    name: str
    modules: tuple[str, ...]
    weights: int
    nbytes: tuple[int | None, ...]
    packed: tuple[int | None, ...]


@dataclass(frozen=True)
class Units:
    """All units of a model, in the order of its tensors.

    fixed_nbytes: bytes of all other tensors that are written.
    """

    options: tuple[Option, ...]
    units: tuple[Unit, ...]
    fixed_nbytes: int

    @property
    def weights(self) -> int:
        """The number of weights of all units."""
        return sum(unit.weights for unit in self.units)

    def nbytes(self, choice: Sequence[int]) -> int:
        """Bytes of all units. choice: the number of an option for each."""
        return sum(unit.nbytes[place] or 0 for unit, place in zip(self.units, choice, strict=True))

    def bits(self, choice: Sequence[int]) -> float:
        """Bits for each weight of the units, codes packed."""
        packed = (unit.packed[place] or 0 for unit, place in zip(self.units, choice, strict=True))
        return 8 * sum(packed) / self.weights

    def uniform(self, option: int) -> list[int] | None:
        """The choice of one option for all units; None if some cannot take it."""
        if any(unit.nbytes[option] is None for unit in self.units):
            return None
        return [option] * len(self.units)

    def items(self, choice: Sequence[int]) -> dict[str, Quantize]:
        """What is quantized by a choice, by module."""
        return {
            module: self.options[place].items[module]
            for unit, place in zip(self.units, choice, strict=True)
            if self.options[place].scheme is not None
            for module in unit.modules
        }


def units_of(options: Sequence[Option]) -> Units:
    """The units of plans that differ in the scheme of a budget's modules alone."""
    recipe, checkpoint = options[0].plan.recipe, options[0].plan.checkpoint
    modules = dict.fromkeys(
        name
        for tensor in checkpoint.tensors
        if (name := tensor.removesuffix(".weight")) != tensor
        and any(name in option.modules for option in options)
    )
    roles = roles_of(checkpoint)
    name_of = group_names(recipe, {name: recipe.rule_of(name, roles.get(name)) for name in modules})
    together: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        together[name_of(module)].append(module)
    sizes = [_sizes(option.plan) for option in options]
    units = []
    for name, members in together.items():
        nbytes = [
            sum(of_module[member] for member in members)
            if option.scheme is None or all(member in option.modules for member in members)
            else None
            for option, of_module in zip(options, sizes, strict=True)
        ]
        weights = sum(checkpoint.tensors[f"{member}.weight"].spec.numel for member in members)
        packed = [
            None if n is None else n - sum(map(option.unpacked, members))
            for option, n in zip(options, nbytes, strict=True)
        ]
        units.append(Unit(name, tuple(members), weights, tuple(nbytes), tuple(packed)))
    fixed = options[0].plan.weight_nbytes - sum(sizes[0][module] for module in modules)
    return Units(tuple(options), tuple(units), fixed)


def _sizes(plan: Plan) -> dict[str, int]:
    """Bytes of all tensors of each module in the output."""
    sizes: dict[str, int] = defaultdict(int)
    for shard in plan.shards:
        for spec in shard.tensors:
            sizes[spec.name.rpartition(".")[0]] += spec.nbytes
    return sizes
