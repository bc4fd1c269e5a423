"""Scales of the cache of keys and values, from both as they enter it.

They are measured on the edited model, after rotary embeddings and norms of keys: weights give no bound
for them. A layer that reads the cache of an earlier one has none. If latents are cached, one scale is
that of keys and of values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, field_validator
from torch import Tensor, nn

from quantcli.calibration.methods.base import LayerWork, Measurement, Method
from quantcli.calibration.policy import Policy, not_finite
from quantcli.calibration.replay.cache import entering
from quantcli.calibration.replay.skeleton import Segments
from quantcli.calibration.watch import current_batch
from quantcli.core.errors import InputError
from quantcli.core.numerics import CACHES, LATENTS, Cache, Stats
from quantcli.core.threads import Locked
from quantcli.schemes.arithmetic.cache import Magnitudes, absorbed_amax, paired, scales_of
from quantcli.schemes.arithmetic.observers import Observer
from quantcli.schemes.base import Scheme, has_effect
from quantcli.targets.kv_cache import AttentionLayer

_SIDES = ("k", "v")


class KvCache(Method):
    """Measure scales of the cache of keys and values."""

    model_config = ConfigDict(serialize_by_alias=True)
    name: ClassVar[str] = "kv_cache"
    results: ClassVar[tuple[str, ...]] = ("scales of the cache",)
    of_weights: ClassVar[bool] = False
    divisible: ClassVar[bool] = True

    format: Literal["fp8", "fp8_per_head", "c8"] = Field(
        description="fp8: one scale for the keys of a layer and one for its values; fp8_per_head: one "
        "for each head of them; c8: int8, one for each channel, or one for the latents of a layer, for "
        "Ascend"
    )
    chosen_by: Literal["minmax", "percentile", "mse"] = Field(
        "minmax", alias="observer", description="how the range of keys and of values is chosen"
    )
    percentile: Annotated[float, Field(gt=50, le=100)] = Field(
        99.99, description="for percentile: how much of them lies in the range"
    )

    _has_effect = field_validator("percentile")(has_effect)

    @property
    def cache(self) -> Cache:
        """That of `format`."""
        return CACHES[self.format]

    def has_work(self, modules: Sequence[str], policy: Policy) -> bool:
        """Whether a layer of attention is among their parents."""
        return any(module.rpartition(".")[0] in policy.attention for module in modules)

    def nbytes(self, weights: Sequence[tuple[Scheme, int]]) -> int:
        """Counts of keys and values: of 2,048 magnitudes of 8,192 channels, 32,768 of 256 heads."""
        return 0 if self.chosen_by == "minmax" else 2**28

    def measure(self, work: LayerWork) -> Measurement:
        """One pass over the samples."""
        return CachePass(self, work)


class CacheInputs(Locked):
    """Hooks: what enters the cache of a layer's attention.

    observers: of each layer of attention and side, with the summary.
    shapes:    likewise: heads, and the width of all of them.
    queries:   max |q| of each head that reads latents.
    """

    def __init__(
        self, new: Callable[[], Magnitudes], attention: Mapping[str, AttentionLayer], plain: int
    ) -> None:
        """new: a summary. plain: numbers of a query's head that are not rotated, with latents."""
        super().__init__()
        self.observers: dict[tuple[str, str], Observer] = {}
        self.shapes: dict[tuple[str, str], tuple[int, int]] = {}
        self.queries: dict[str, Tensor] = {}
        self._new = new
        self._attention = attention
        self._plain = plain

    @property
    def sides(self) -> Sequence[str]:
        """What is seen: one side of latents."""
        return _SIDES[:1] if any(layer.queries for layer in self._attention.values()) else _SIDES

    def part(self) -> CacheInputs:
        """One that has seen nothing."""
        return CacheInputs(self._new, self._attention, self._plain)

    def absorb(self, part: CacheInputs) -> None:
        """Count what a part has seen."""
        for place, observer in part.observers.items():
            self._at(place, part.shapes[place]).absorb(observer)
        for layer, amax in part.queries.items():
            self._add_queries(layer, amax)

    def entered(
        self, name: str, layer: nn.Module, segments: Segments
    ) -> AbstractContextManager[object]:
        """Keys and values are seen, or latents of both and the queries for them."""
        return entering(name, layer, segments, self._attention, self._enter, self._see_queries)

    def _see_queries(self, layer: str, queries: Tensor, weight: Tensor) -> None:
        if (batch := current_batch()) is not None:
            mask = batch[1]
            rows = queries.detach()
            rows = rows.flatten(0, 1) if mask is None else rows[mask.to(rows.device)]
            heads = self._attention[layer].queries
            self._add_queries(layer, absorbed_amax(rows, weight.detach(), heads, self._plain).cpu())

    def _add_queries(self, layer: str, amax: Tensor) -> None:
        with self.lock:
            so_far = self.queries.get(layer)
            self.queries[layer] = amax if so_far is None else torch.maximum(so_far, amax)

    def _enter(self, layer: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if (batch := current_batch()) is not None:
            number, mask = batch
            for side, states in zip(self.sides, (key, value), strict=False):
                rows = states.detach().transpose(1, 2)
                tokens = rows.flatten(0, 1) if mask is None else rows[mask.to(rows.device)]
                heads, width = tokens.shape[1:]
                self._at((layer, side), (heads, heads * width)).update(tokens, number)
        return key, value

    def _at(self, place: tuple[str, str], shape: tuple[int, int]) -> Observer:
        with self.lock:
            self.shapes[place] = shape
            return self.observers.setdefault(place, Observer(self._new()))


class CachePass(Measurement):
    """The keys and values of a layer's attention."""

    def __init__(self, method: KvCache, work: LayerWork) -> None:
        self._method = method
        self._work = work
        self._attention = work.run.policy.attention
        latents = any(layer.queries for layer in self._attention.values())
        self._cache = LATENTS if latents else method.cache
        new = partial(Magnitudes, self._cache, counted=method.chosen_by != "minmax")
        sizes = work.run.skeleton.checkpoint.text_config
        self._seen = CacheInputs(
            new, self._attention, (sizes.size("qk_nope_head_dim") or 0) if latents else 0
        )

    def hooks(self) -> Sequence[CacheInputs]:
        """What enters the cache."""
        return (self._seen,)

    def settle(self) -> None:
        """Add the scales of each layer of attention. InputError for NaN or Inf, and for keys of other
        sizes than the plan has."""
        report = self._work.report.results.setdefault("cache", {})
        for name in sorted({layer for layer, _ in self._seen.observers}):
            stats: dict[str, Tensor] = {}
            tokens = 0
            for side in self._seen.sides:
                observer = self._seen.observers[name, side]
                if not observer.finite:
                    raise not_finite(name, str(self._work.run.skeleton.checkpoint.path))
                self._must_fit(self._attention[name], side)
                stats[f"{side}_scale"] = self._scale(observer.summary, side, self._attention[name])
                tokens = observer.tokens
            if self._cache == LATENTS:
                # the engine must find both, and reads neither: it rounds queries by token
                stats["v_scale"] = stats["k_scale"]
                queries, dtype = self._seen.queries[name], self._work.run.policy.serving_dtype
                if not bool(torch.isfinite(queries).all()):
                    raise not_finite(name, str(self._work.run.skeleton.checkpoint.path))
                stats["q_scale"] = scales_of(queries, LATENTS, dtype)
            if self._cache.element.family == "int":
                stats |= {f"{s[0]}_offset": torch.zeros_like(scale) for s, scale in stats.items()}
            self._work.stats[name] = stats
            report[name] = {"tokens": tokens, **_largest(stats)}

    def _scale(self, summary: Magnitudes, side: str, layer: AttentionLayer) -> Tensor:
        """Of each unit, float32."""
        method, codes = self._method, self._cache.element.family
        dtype = self._work.run.policy.serving_dtype if codes == "int" else torch.float32
        scale = summary.scales(method.chosen_by, method.percentile, dtype)
        if self._cache.per == "channel" and side == "k":
            scale = paired(scale, layer.heads, self._rotated(layer))
        return scale

    def _rotated(self, layer: AttentionLayer) -> int:
        """Channels of a head that rotary embeddings turn."""
        config = self._work.run.skeleton.checkpoint.text_config
        width = layer.widths[0] // layer.heads
        share, rope = config.number("partial_rotary_factor"), config.table("rope_parameters")
        if share is None and rope is not None:
            share = rope.number("partial_rotary_factor")
        return int(width * share) if share is not None and 0 < share < 1 else width

    def _must_fit(self, layer: AttentionLayer, side: str) -> None:
        heads, width = self._seen.shapes[layer.name, side]
        expected = layer.heads, layer.widths[side == "v"]
        if (heads, width) != expected and self._cache.per != "tensor":
            what = (
                f"the cache is given {heads} heads of {width // heads} numbers; by its weights and "
                f"config.json the engine keeps {expected[0]} of {expected[1] // expected[0]}"
            )
            fix = "use `kv_cache: fp8`, with one scale for all heads, or leave `kv_cache` out"
            raise InputError(what, where=f"`{layer.name}`", fix=fix)


def _largest(stats: Stats) -> dict[str, float]:
    """The largest number of each scale."""
    return {name: float(scale.max()) for name, scale in stats.items() if name.endswith("_scale")}
