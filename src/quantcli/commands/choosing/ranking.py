"""Which shipped recipes a device can serve for a model, what they take there, and their order."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from quantcli.checkpoint.config.settings import Settings
from quantcli.commands.choosing.caches import CacheSizes
from quantcli.commands.choosing.devices import NATIVE, Device
from quantcli.commands.choosing.options import Serving
from quantcli.commands.choosing.weights import (
    Model,
    modules_by_expert,
    split_faults,
    unquantized_nbytes,
    weight_nbytes,
)
from quantcli.core.errors import InputError
from quantcli.core.numerics import LATENTS, Numerics
from quantcli.core.untrusted.yaml_text import read_yaml
from quantcli.planning.plan import Plan
from quantcli.planning.planner import compare_expected, make_plan
from quantcli.recipe.recipe import Recipe, resolve
from quantcli.recipe.written import read_recipe
from quantcli.targets.base import Target

FLOAT = "float"
_FLOAT_BITS = 16
_SAMPLE = "TEXT.jsonl"
_CLASSES = (
    "8-bit weights and inputs: half of the memory, and products in 8 bits",
    "8-bit weights, float inputs: half of the memory",
    "4-bit weights: a quarter of the memory",
    "4-bit weights and inputs: a quarter of the memory, products in 4 bits, and the largest change",
)


@dataclass(frozen=True)
class Room:
    """What a model takes on each device, in bytes.

    devices:     how many share it.
    max_context: tokens that each sequence may have; 0: not even the weights fit.
    """

    devices: int
    weights: int
    cache: int
    reserve: int
    usable: int
    max_context: int

    @property
    def needed(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.reserve

    @property
    def fits(self) -> bool:
        """Whether a device has so much."""
        return self.needed <= self.usable


@dataclass(frozen=True)
class Candidate:
    """A recipe that the devices can serve.

    kernels:     NATIVE, or what a kernel does instead.
    bits:        of weights and inputs, the fewest of any module.
    mean_change: of the bundled model; None: not measured.
    own:         in the engine's own format.
    overrides:   options that the recipe needs for the device, as for `--set`.
    """

    recipe: str
    target: str
    room: Room
    kernels: str
    bits: tuple[int, int]
    needs_data: bool
    mean_change: float | None
    own: bool = False
    overrides: tuple[str, ...] = ()

    @property
    def group(self) -> int:
        """Its place in _CLASSES."""
        weights, inputs = self.bits
        return (0 if inputs <= 8 else 1) if weights >= 8 else (2 if inputs >= 8 else 3)

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorts candidates, the best first: those that fit; on most devices; in 8 bits; with kernels
        for what is stored; in the engine's own format; with the least change of the bundled model."""
        change = float("inf") if self.mean_change is None else self.mean_change
        size = 0 if self.room.fits else self.room.needed
        place = self.group, self.kernels != NATIVE, not self.own
        return not self.room.fits, size, -self.room.devices, *place, change, self.recipe

    @property
    def rank(self) -> int | None:
        """Its place among all recipes by the change of the bundled model, from 1; equal changes share a
        place. None: not measured."""
        return None if self.mean_change is None else 1 + sum(c < self.mean_change for c in _changes())

    @property
    def reason(self) -> str:
        """Why it has its place, as text."""
        words = [_CLASSES[self.group]]
        if self.kernels != NATIVE:
            words.append(f"here {self.kernels}")
        if self.rank is None:
            words.append(f"not measured on {costs()['model']}")
        else:
            words.append(f"number {self.rank} of {len(_changes())} by the change of {costs()['model']}")
        return "; ".join(words)

    def command(self, model: str) -> str:
        """What to type; TEXT.jsonl stands for the user's text."""
        words = ["quantcli", "quantize", self.recipe, "--model", model]
        for override in self.overrides:
            words += ["--set", override]
        if self.needs_data:
            words += ["--set", f"calibration.data={_SAMPLE}"]
        return shlex.join(words)


@cache
def costs() -> dict[str, Any]:
    """`model`, `text`, and by recipe the `mean_change` of the bundled model; None if it refuses it."""
    path = Path(__file__).with_name("costs.yaml")
    table: dict[str, Any] = read_yaml(path.read_bytes(), str(path)).data
    return table


def _changes() -> list[float]:
    """The changes that were measured."""
    return [change for change in costs()["mean_change"].values() if change is not None]


class Places:
    """What fits where: a model on some devices."""

    def __init__(self, model: Model, sizes: CacheSizes, serving: Serving, context: int) -> None:
        self.model, self.serving, self.context = model, serving, context
        self._sizes = sizes
        config = model.config
        widths = ("intermediate_size", "moe_intermediate_size", "ffn_dim")
        self._hidden = config.size("hidden_size") or 0
        self._widest = max(filter(None, map(config.size, widths)), default=4 * self._hidden)
        self._most = max(context, positions(config) or 0)

    def room(self, devices: int, weights: int, element: int) -> Room:
        """What weights of so many bytes on each device leave. element: bytes of a cached number."""
        reserve = self.serving.reserve(self._hidden, self._widest, devices)
        number = self.serving.concurrency
        left = self.serving.usable - weights - reserve
        longest = self._sizes.longest(left, number, devices, element, self._most) if left > 0 else 0
        cached = self._sizes.nbytes(self.context, number, devices, element)
        return Room(devices, weights, cached, reserve, self.serving.usable, longest)

    def unquantized(self) -> tuple[Room, str | None]:
        """The room of the float model, and why fewer devices share it than there are."""
        devices, why = self._largest(split_faults(self.model))
        weights = unquantized_nbytes(self.model, devices)
        return self.room(devices, weights, 2), why

    def candidate(self, name: str) -> Candidate:
        """A recipe on the devices. InputError, whose text is the reason, if it is not for this model
        or for them."""
        overrides = _overrides(name, self.serving.device)
        recipe = resolve(read_recipe(name, overrides))
        _must_have_kernels(recipe, self.serving.device)
        plan = self._plan(recipe)
        kernels = _kernels(plan, self.serving.device)
        devices, _ = self._largest(split_faults(self.model, plan))
        cached = plan.cache.cache.element.bits // 8 if plan.cache else 2
        room = self.room(devices, weight_nbytes(self.model, plan, devices), cached)
        numerics = [scheme.numerics for scheme, _ in modules_by_expert(_items(plan))]
        return Candidate(
            recipe=name,
            target=plan.target.name,
            room=room,
            kernels=kernels,
            bits=_bits(numerics, kernels),
            needs_data=plan.needs_calibration,
            mean_change=costs()["mean_change"].get(name),
            own=plan.target.name == self.serving.device.own,
            overrides=overrides,
        )

    def fits_on(self, candidate: Candidate, devices: int) -> bool:
        """Whether a candidate can be split over so many devices, and fits on them."""
        device = replace(self.serving.device, count=devices)
        places = copy(self)
        places.serving = replace(self.serving, device=device)
        found = places.candidate(candidate.recipe)
        return found.room.fits and found.room.devices == devices

    def _largest(self, fault: Callable[[int], str | None]) -> tuple[int, str | None]:
        """The most of the devices that can share a model, and why no more can; at worst 1."""
        why: str | None = None
        for devices in range(self.serving.device.count, 0, -1):
            found = fault(devices)
            if found is None or devices == 1:
                return devices, why
            why = why or found
        raise AssertionError("one device is always enough")

    def _plan(self, recipe: Recipe) -> Plan:
        """A plan that keeps what its recipe expects; if that is in doubt, one of all experts tells."""
        if recipe.file.rotate is not None:
            raise InputError(
                "whether a model can be rotated is not tried here; `quantize --plan` tells"
            )
        plan = make_plan(recipe, self.model.checkpoint)
        in_doubt = self.model.times and plan.coverage.quantizable_pct < 100
        judged = make_plan(recipe, self.model.whole) if in_doubt else plan
        for expected in compare_expected(judged):
            if not expected.ok:
                what = f"it expects {expected.key} {expected.limit}; the plan has {expected.value:.4g}"
                raise InputError(what)
        return plan


def _items(plan: Plan) -> list[Any]:
    return [item for shard in plan.shards for item in shard.items]


def _overrides(name: str, device: Device) -> tuple[str, ...]:
    """What a recipe of the device's engine needs next to its own keys."""
    if not device.options:
        return ()
    written = read_recipe(name).file.target
    if written != "ascend":
        return ()
    options = ", ".join(f"{key}: {value}" for key, value in device.options.items())
    return (f"target={{name: {written}, {options}}}",)


def labels_of(recipe: Recipe) -> Iterator[str]:
    """Labels of the rules, as far as they are known without a model."""
    for rule in recipe.rules:
        if rule.scheme is not None:
            for scheme in (rule.scheme, *rule.scheme.choices):
                try:
                    yield recipe.target.label(scheme.numerics)
                except InputError:
                    continue


def _must_have_kernels(recipe: Recipe, device: Device) -> None:
    """InputError if the device's engine has no kernel for any rule: the model need not be planned."""
    labels = list(labels_of(recipe))
    for label in labels:
        for expert in (False, True):
            if device.kernel(recipe.target.name, label, expert=expert):
                return
    if labels:
        raise _no_kernel(recipe.target, labels[0], device)


def _no_kernel(target: Target, label: str, device: Device, what: str = "") -> InputError:
    return InputError(f"{device.engine} has no kernel for {label} ({target.name}){what}")


def _kernels(plan: Plan, device: Device) -> str:
    """What the kernels do with the modules of a plan. InputError if there is none for some of them."""
    result = NATIVE
    for scheme, expert in modules_by_expert(_items(plan)):
        label = plan.target.label(scheme.numerics)
        found = device.kernel(plan.target.name, label, expert=expert)
        if found is None:
            raise _no_kernel(plan.target, label, device, " of experts" if expert else "")
        result = found if found != NATIVE else result
    if plan.cache is not None:
        cache = plan.cache.cache
        word = "latents" if cache == LATENTS else cache.dtype.partition("_")[0]
        if word not in device.cache:
            what = f"{device.engine} takes no scales of a cache in {cache}"
            raise InputError(what)
    return result


def _bits(numerics: list[Numerics], kernels: str) -> tuple[int, int]:
    """The fewest bits of weights and of inputs, as the kernels compute with them."""
    weights = min((n.weight.element.bits for n in numerics), default=_FLOAT_BITS)
    inputs = min(
        (n.input.element.bits if n.input else _FLOAT_BITS for n in numerics), default=_FLOAT_BITS
    )
    return weights, _INPUT_BITS.get(kernels, inputs)


_INPUT_BITS = {"inputs stay float": 16, "inputs become mxfp4": 4, "inputs become int8": 8}


def positions(config: Settings) -> int | None:
    """Tokens that a model was made for; None if config.json does not say."""
    value = config.size("max_position_embeddings")
    return value if value and value <= 2**30 else None


def row(candidate: Candidate, model: str, place: int) -> dict[str, Any]:
    """A candidate as flat, JSON-able data."""
    room = asdict(candidate.room)
    return {
        "place": place,
        "recipe": candidate.recipe,
        "target": candidate.target,
        "fits": candidate.room.fits,
        "devices": room["devices"],
        "weights_bytes": room["weights"],
        "cache_bytes": room["cache"],
        "reserve_bytes": room["reserve"],
        "usable_bytes": room["usable"],
        "max_context": room["max_context"],
        "needs_data": candidate.needs_data,
        "mean_change": candidate.mean_change,
        "rank": candidate.rank,
        "kernels": candidate.kernels,
        "reason": candidate.reason,
        "overrides": list(candidate.overrides),
        "command": candidate.command(model),
    }
