"""AWQ: scales of channels that protect the weights which large inputs multiply (Lin et al. 2023).

As in smoothing, the source of a channel is divided by s and the columns that read it are multiplied:
the layer's function stays. What changes is how these columns are rounded. Tried are

    s_j = x_j^r                    r = 1/n .. 1, with x_j = mean |input j|
    s_j = x_j^r / w_j^(1 - r)      r = 0 .. 1, if `duo`, with w_j = mean |w| over max |w| of groups

and s = 1. Each is judged with the very scheme of every module that reads the channels (its groups, its
clips, the rounding of its inputs), on tokens of the samples. Error e_t and output y_t of token t give

    sum_t |e_t|^2 / (|y_t|^2 + median |y|^2)

summed over modules: that of a few tokens with outputs a thousand times as large, as pretrained models
have them, counts no more than that of others. The paper takes the squared error of the attention or the
MLP, which costs a run of the layer for each candidate. `benchmarks/awq.py` measures what is gained.

Scales of norms are rounded as smoothing rounds them; those of rows of a matrix, and those of channels
that a float matrix reads, are powers of two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from quantcli.calibration.channels import ChannelReader, Producer
from quantcli.calibration.methods.base import LayerWork, Method
from quantcli.calibration.methods.hessians import jobs
from quantcli.calibration.methods.scales import as_scales
from quantcli.calibration.policy import Policy
from quantcli.calibration.replay.skeleton import Segment
from quantcli.calibration.replay.taps import Matrix
from quantcli.calibration.shown import quantized
from quantcli.calibration.watch import Watch
from quantcli.core.numerics import NO_STATS, Stats
from quantcli.core.threads import Locked
from quantcli.recipe.fields import Block, Match, matches
from quantcli.schemes.arithmetic import rounding, tiles
from quantcli.schemes.arithmetic.gptq import Each
from quantcli.schemes.base import Scheme

TOKENS = 1024  # that candidates are judged on, of each input
ROWS = 256  # and of each weight; fewer, if many read one input
ALL_ROWS = 16 * ROWS  # of all that read one input
LEAST_ROWS = 16
TOKENS_NBYTES = 2**30  # of all tokens that are kept
_WIDE = 8  # float32 matrices [rows or tokens, k] that a job holds
_TINY = 1e-30  # an error or an output of nothing
_PASSES = 1.5  # see `Method.passes`: one pass, and the search


class AwqRule(Block):
    """The exponent for groups of channels that a matching module reads, in place of a search."""

    match: Match
    ratio: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="the exponent of mean |input|, 0 to 1"
    )
    skip: bool = Field(False, description="leave these groups alone")
    optional: bool = Field(False, description="do not fail when nothing matches")

    @model_validator(mode="after")
    def _one_of_both(self) -> AwqRule:
        if (self.ratio is None) != self.skip:
            raise ValueError("give either `ratio` or `skip: true`")
        return self


@dataclass(frozen=True)
class ScaledGroup:
    """Channels of a producer that were scaled, by `least` to `most`; parameters that read them.

    ratio: the exponent r. duo: whether weights have a part in it. error: of outputs, over that without
    scales; both are roots of the sum of the module.
    """

    producer: str
    ratio: float
    duo: bool
    error: float
    least: float
    most: float
    readers: list[str]


@dataclass(frozen=True)
class Candidate:
    """Scales x^ratio, or with `duo` x^ratio / w^(1 - ratio), float32 [channels]."""

    ratio: float
    duo: bool
    scale: Tensor


class Tokens(Locked):
    """Some inputs of a matrix, evenly spaced over each batch. Threads may share it."""

    def __init__(self, each: int) -> None:
        """each: the most rows of a batch."""
        super().__init__()
        self._each = each
        self._seen: dict[int, list[Tensor]] = {}

    def update(self, x: Tensor, batch: int) -> None:
        """Keep rows of x [tokens, k] in float32. `batch` is their place in the data."""
        kept = min(len(x), self._each)
        if kept:
            places = torch.arange(kept, device=x.device) * len(x) // kept
            rows = x.detach()[places].to(torch.float32, copy=True)
            with self.lock:
                self._seen.setdefault(batch, []).append(rows)

    def rows(self) -> Tensor | None:
        """All that is kept, float32 [tokens, k], in the order of the data; None without tokens."""
        parts = [x for batch in sorted(self._seen) for x in self._seen[batch]]
        return torch.cat(parts) if parts else None


class Awq(Method):
    """Scale channels so that weights which large inputs multiply are rounded with less error (AWQ)."""

    name: ClassVar[str] = "awq"
    results: ClassVar[tuple[str, ...]] = ("scaling",)
    edited_as: ClassVar[str] = "scaled"

    ratios: Annotated[int, Field(ge=1, le=100)] = Field(
        20, description="how many exponents are tried, evenly spaced up to 1"
    )
    duo: bool = Field(True, description="try each exponent also with the sizes of weights")
    least_gain: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.02,
        description="the share of the error without scales that the best ones must take away, or the "
        "channels stay as they are",
    )
    rules: list[AwqRule] = Field([], description="first match wins over the search")

    @property
    def module_rules(self) -> list[AwqRule]:
        """The rules."""
        return self.rules

    def has_work(self, modules: Sequence[str], policy: Policy) -> bool:
        """Whether channels that any of them reads may be scaled."""
        return any(self._may_scale([module], policy) for module in modules)

    def passes(self, modules: Sequence[str], policy: Policy) -> float:
        """One for the tokens; the search takes about half as long."""
        return _PASSES if self.has_work(modules, policy) else 0.0

    def nbytes(self, weights: Sequence[tuple[Scheme, int]]) -> int:
        """The tokens that are kept, and outputs."""
        tokens = min(TOKENS_NBYTES, sum(4 * TOKENS * k for _, k in weights))
        return tokens + 4 * TOKENS * ALL_ROWS

    def worker_nbytes(self, weights: Sequence[tuple[Scheme, int]]) -> int:
        """What one job of the search computes with."""
        return _WIDE * 4 * (TOKENS + ROWS) * max((k for _, k in weights), default=0)

    def _rule(self, modules: Sequence[str]) -> AwqRule | None:
        """The first rule that matches any of these."""
        for rule in self.rules:
            if any(matches(rule.match, module) for module in modules):
                return rule
        return None

    def _may_scale(self, modules: Sequence[str], policy: Policy) -> bool:
        """Whether channels that these modules read may be scaled: some are quantized, no rule says
        otherwise, and none learns scales of its own."""
        quantized = [module for module in modules if module in policy.quantized]
        schemes = [policy.quantized[module].scheme for module in quantized]
        if not quantized or any(scheme.schedule is not None for scheme in schemes):
            return False
        rule = self._rule(quantized)
        return rule is None or not rule.skip

    def edit(self, work: LayerWork) -> None:
        """One pass over the samples for tokens; then the best scales of each producer."""
        layout, run = work.layout, work.run
        groups: list[ScaledGroup] = []
        work.report.results[self.edited_as] = groups
        producers = [
            producer
            for producer in layout.producers()
            if self._may_scale(layout.modules(r.matrix for r in producer.readers), run.policy)
        ]
        if not producers:
            return
        run.progress.phase("inputs")
        tokens = self._tokens(work, producers)
        run.progress.phase("scaling")
        unseen = []
        with jobs(run.workers, run.device) as each:
            for done, producer in enumerate(producers, 1):
                search = Search(work, producer, tokens)
                if not search.parts:
                    unseen.append(producer.name)
                    continue
                tried, given = self._candidates(search)
                errors = search.errors([candidate.scale for candidate in tried], each)
                best = min(range(len(tried)), key=errors.__getitem__)  # the first of equal ones
                if given:
                    best = len(tried) - 1
                elif errors[best] > (1 - self.least_gain) ** 2 * errors[0]:
                    best = 0
                group = self._scaled(work, producer, tried[best], errors[best] / max(errors[0], _TINY))
                groups += [group] if group is not None else []
                run.progress.step(done, len(producers), noun="group")
        if unseen:
            more = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
            names = ", ".join(f"`{name}`" for name in unseen[:3])
            work.report.messages.append(f"not scaled, as no token reached what reads it: {names}{more}")
        _explain(work, [producer.name for producer in producers], groups)

    def _tokens(self, work: LayerWork, producers: Sequence[Producer]) -> dict[Matrix, Tensor | None]:
        """Some inputs of each reader."""
        leaders, run = work.layout.leaders(), work.run
        widths = {
            leaders.get(reader.matrix, reader.matrix): len(reader.channels)
            for producer in producers
            for reader in producer.readers
        }
        most = max(1, min(TOKENS, TOKENS_NBYTES // (4 * sum(widths.values()))))
        kept = {matrix: Tokens(-(-most // len(run.batches))) for matrix in widths}
        work.layer.watch(Watch({matrix: [tokens] for matrix, tokens in kept.items()}), None)
        rows = {matrix: tokens.rows() for matrix, tokens in kept.items()}
        return {
            reader.matrix: rows[leaders.get(reader.matrix, reader.matrix)]
            for producer in producers
            for reader in producer.readers
        }

    def _candidates(self, search: Search) -> tuple[list[Candidate], bool]:
        """No scales, and then all others that differ from those before them. Whether a rule gives the
        last one, in place of a search."""
        rule = self._rule([part.segment.module for part in search.parts])
        given = rule is not None and rule.ratio is not None
        steps = [step / self.ratios for step in range(self.ratios + 1)]
        pairs = [(ratio, duo) for duo in (False, True)[: 1 + self.duo] for ratio in steps]
        if rule is not None and rule.ratio is not None:
            pairs = [(rule.ratio, False)]
        tried = [Candidate(0.0, False, torch.ones(len(search.producer.used)))]
        seen = {tried[0].scale.numpy().tobytes()}
        for ratio, duo in pairs:
            scale = search.scale(ratio, 1 - ratio if duo else 0.0)
            if (content := scale.numpy().tobytes()) not in seen:
                seen.add(content)
                tried.append(Candidate(ratio, duo, scale))
        return tried, given

    def _scaled(
        self, work: LayerWork, producer: Producer, chosen: Candidate, gained: float
    ) -> ScaledGroup | None:
        """Scale a producer's channels; None if they stay."""
        if bool((chosen.scale == 1).all()):
            return None
        scale = work.layer.divide(producer, chosen.scale, work.edits)
        if bool((scale == 1).all()):
            return None
        return ScaledGroup(
            producer.name,
            chosen.ratio,
            chosen.duo,
            error=gained**0.5,
            least=float(scale.min()),
            most=float(scale.max()),
            readers=sorted({r.matrix.parameter for r in producer.readers}),
        )


@dataclass(frozen=True)
class _Part:
    """A quantized module that reads a producer's channels.

    weight: [n, k], as it is loaded.
    places: the rows that are judged, int64.
    amax:   max |w| of each column, float32 [k].
    inputs: float32 [tokens, k].
    """

    reader: ChannelReader
    segment: Segment
    weight: Tensor
    places: Tensor
    amax: Tensor
    inputs: Tensor

    @property
    def rows(self) -> Tensor:
        """Those that are judged, float32 [rows, k]: a copy, which is not kept."""
        return self.weight[self.places].float()

    def columns(self, scale: Tensor) -> Tensor:
        """The scale of each column [k], of those of channels."""
        return scale.to(self.weight.device)[self.reader.channels.to(self.weight.device)]


class Search:
    """A producer, and what its scales change: the modules that read it and have seen tokens."""

    def __init__(
        self, work: LayerWork, producer: Producer, tokens: Mapping[Matrix, Tensor | None]
    ) -> None:
        self.producer = producer
        self._policy = work.run.policy
        self._powers = producer.norm is None or work.layout.rounded_again(
            producer, work.run.policy.quantized
        )
        self.parts: list[_Part] = []
        channels = len(producer.used)
        self._amax = torch.zeros(channels)  # max |w| of all columns that read a channel
        self._largest = float("inf")
        modules = len(work.layout.modules(reader.matrix for reader in producer.readers))
        most = max(LEAST_ROWS, min(ROWS, ALL_ROWS // modules))
        for reader in producer.readers:
            weight, inputs = work.layer.weight(reader.matrix), tokens[reader.matrix]
            amax = rounding.absmax(weight, dim=0).squeeze(0).cpu()
            self._amax.scatter_reduce_(0, reader.channels, amax, "amax")
            self._largest = min(self._largest, torch.finfo(weight.dtype).max)
            if inputs is None:
                continue
            for segment in work.layer.segments[reader.matrix.parameter][reader.matrix.expert]:
                if segment.module not in work.run.policy.quantized:
                    continue
                own = weight[segment.start : segment.stop]
                multiple = work.run.policy.quantized[segment.module].scheme.row_multiple
                places = _some(len(own), multiple, most).to(own.device)
                amax = rounding.absmax(own, dim=0).squeeze(0)
                self.parts.append(_Part(reader, segment, own, places, amax, inputs))
        self._inputs, self._weights = self._sizes(channels)

    def _sizes(self, channels: int) -> tuple[Tensor, Tensor]:
        """Of each channel: mean |input|, and the mean of |w| over max |w| of its group, of all modules
        that read it. float32 [channels], 0 for what none of them reads."""
        sums = torch.zeros(4, channels)
        for part in self.parts:
            block = self._policy.quantized[part.segment.module].scheme.numerics.weight.block
            rows = part.rows
            block = block or (1, rows.shape[1])
            largest = tiles.spread(tiles.absmax(rows, block), block, *rows.shape)
            relative = torch.where(largest > 0, rows.abs() / largest, 0.0)
            for place, values in ((0, part.inputs.abs()), (2, relative)):
                sums[place].index_add_(0, part.reader.channels, values.sum(0).cpu())
                each = torch.full((values.shape[1],), float(len(values)))
                sums[place + 1].index_add_(0, part.reader.channels, each)
        return sums[0] / sums[1].clamp_min(1), sums[2] / sums[3].clamp_min(1)

    def scale(self, inputs: float, weights: float) -> Tensor:
        """x^inputs / w^weights, float32 [channels], with 1 in the middle of least and largest."""
        exponent = inputs * self._inputs.double().log2() - weights * self._weights.double().log2()
        sound = (self._inputs > 0) & (self._weights > 0) & self.producer.used
        if bool(sound.any()):
            exponent -= (exponent[sound].min() + exponent[sound].max()) / 2
        return as_scales(
            torch.where(sound, exponent, 0.0), self._amax, self._largest, powers=self._powers
        )

    def errors(self, scales: Sequence[Tensor], each: Each) -> list[float]:
        """The error of all modules with each of these scales, see the module; infinite for NaN."""
        found = torch.zeros(len(self.parts), len(scales), dtype=torch.float64)
        outputs = [part.inputs @ part.rows.T for part in self.parts]
        sizes = [y.square().sum(1, dtype=torch.float64) for y in outputs]

        def judge(number: int) -> None:
            which, place = divmod(number, len(scales))
            part, scale = self.parts[which], scales[place]
            columns = part.columns(scale)
            x, module = part.inputs / columns, part.segment.module
            whole = self._whole(part, scale)
            quantizer = quantized(self._policy, {module: self._stats(part, x)}, lambda _: whole)
            chosen = quantizer(module, part.rows * columns, None)
            if chosen is not None:
                scheme, parts = chosen
                lost = (scheme.forward(x, parts) - outputs[which]).square_()
                size = sizes[which] + sizes[which].median() + _TINY
                found[which, place] = (lost.sum(1, dtype=torch.float64) / size).sum()

        each(judge, range(found.numel()))
        return [float(error) for error in found.sum(0).nan_to_num(torch.inf)]

    def _stats(self, part: _Part, x: Tensor) -> Stats:
        """What calibration would find of a module's inputs x [tokens, k]."""
        module = part.segment.module
        observer = self._policy.observer(module)
        stats = dict(NO_STATS)
        if observer is not None:
            observer.update(x, 0)
            stats |= observer.stats()
        if self._policy.weighs_inputs(module):
            stats["input_square"] = x.square().mean(0)
        return stats

    def _whole(self, part: _Part, scale: Tensor) -> Stats:
        """The constants that a module's scheme needs of whole weights, see `block.survey`."""
        scheme = self._policy.quantized[part.segment.module].scheme
        if not scheme.needs_weight_amax:
            return {"column_amax": part.amax * part.columns(scale)} if scheme.needs_column_amax else {}
        shared = self._policy.sharing.get(part.segment.module, [part.segment.module])
        sharing = [other for other in self.parts if other.segment.module in shared]
        amax = torch.stack([(other.amax * other.columns(scale)).amax() for other in sharing]).amax()
        return {"weight_amax": amax.view(1), "weight_coarse": torch.tensor([False])}


def _some(n: int, multiple: int, most: int) -> Tensor:
    """About `most` of n rows, evenly spaced in runs of `multiple`: int64."""
    runs = -(-n // multiple)
    kept = min(runs, max(1, most // multiple))
    starts = torch.arange(kept) * runs // kept * multiple
    rows = (starts[:, None] + torch.arange(multiple)).flatten()
    return rows[rows < n]


def _explain(work: LayerWork, names: Sequence[str], groups: Sequence[ScaledGroup]) -> None:
    """Say which channels were scaled, and which were not."""
    scaled = {group.producer: group for group in groups}
    done = [f"{name} (ratio {g.ratio:g}, error x {g.error:.3f})" for name, g in scaled.items()]
    left = [name for name in names if name not in scaled]
    text = f"{work.layer.name}: scaled {', '.join(done) or 'nothing'}"
    if left:
        text += f"; not {', '.join(left)}, which no scales make better"
    work.run.progress.detail(text)
