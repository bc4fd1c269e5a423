"""Which matrices of a layer learn together, and what comes of it: statistics and edits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantcli.calibration.layout import LayerLayout, Producer
from quantcli.calibration.learning import Course
from quantcli.calibration.loaded import Layer
from quantcli.calibration.skeleton import Segment
from quantcli.calibration.taps import Matrix
from quantcli.calibration.wishes import Wishes, unreached
from quantcli.core.errors import InputError
from quantcli.core.numerics import Stats
from quantcli.planning.measured import Factors
from quantcli.schemes.base import Learner, Scalable, Schedule, Scheme


@dataclass(frozen=True)
class Group:
    """Matrices that read the same input and have one scheme, which learns.

    producer: what makes their input, if its channels can be scaled.
    """

    scheme: Scheme
    matrices: tuple[Matrix, ...]
    modules: tuple[str, ...]
    producer: Producer | None

    @property
    def columns(self) -> Tensor | None:
        """The producer's channel of each column, int64 [k]."""
        if self.producer is None:
            return None
        return next(r.channels for r in self.producer.readers if r.matrix == self.matrices[0])


def groups(layout: LayerLayout, wishes: Wishes) -> list[Group]:
    """Every group of a layer, in the order of the layer's matrices.

    InputError where some rows of one matrix, or some modules that the engine merges, learn alone.
    """
    leaders = layout.leaders()
    found: dict[tuple[Matrix, Scheme], list[Matrix]] = defaultdict(list)
    names: dict[Matrix, list[str]] = {}
    for matrix, segments in layout.matrices():
        modules = [s.module for s in segments]
        schemes = {wishes.scheme(module) for module in modules}
        learning = [scheme for scheme in schemes if scheme is not None and scheme.schedule is not None]
        if not learning:
            continue
        if len(schemes) > 1:
            raise InputError(
                f"`{matrix.parameter}` is made of {', '.join(f'`{m}`' for m in modules)}, and "
                f"not all of them are {learning[0].name}",
                where=wishes.quantized[next(m for m in modules if m in wishes.quantized)].rule,
                fix="put them under one rule",
            )
        names[matrix] = modules
        found[leaders.get(matrix, matrix), learning[0]].append(matrix)
    return [
        Group(
            scheme,
            tuple(matrices),
            tuple(module for matrix in matrices for module in names[matrix]),
            _producer(layout, matrices),
        )
        for (_, scheme), matrices in found.items()
    ]


def _producer(layout: LayerLayout, matrices: list[Matrix]) -> Producer | None:
    """What makes the group's input, each channel for one column; other matrices may read it, too."""
    for producer in layout.producers():
        read = {reader.matrix: reader.channels for reader in producer.readers}
        if all(matrix in read for matrix in matrices):
            columns = read[matrices[0]]
            one_to_one = len(set(columns.tolist())) == len(columns)
            if one_to_one and all(torch.equal(read[matrix], columns) for matrix in matrices):
                return producer
    return None


def learners(
    found: Iterable[Group],
    layout: LayerLayout,
    wishes: Wishes,
    weight: Callable[[Matrix], Tensor],
    amax: Mapping[Matrix, Tensor],
    generator: torch.Generator,
) -> dict[Matrix, Learner]:
    """A learner for each group, by matrix. amax: max |x| of each column of a group's first matrix."""
    made: dict[Matrix, Learner] = {}
    for group in found:
        first = group.matrices[0]
        held = wishes.quantized[group.modules[0]].held_input
        learner = group.scheme.learner(
            {matrix: weight(matrix) for matrix in group.matrices},
            amax[first],
            _scalable(group, layout, wishes),
            held,
            generator,
        )
        made |= dict.fromkeys(group.matrices, learner)
    return made


def _scalable(group: Group, layout: LayerLayout, wishes: Wishes) -> Scalable:
    if group.producer is None:
        return "not at all"
    modules = layout.modules(reader.matrix for reader in group.producer.readers)
    if group.producer.matrix is not None:
        modules += layout.modules([group.producer.matrix])
    rounded_again = any(module not in wishes.quantized for module in modules)
    return "by powers of two" if rounded_again else "freely"


def schedule_of(found: Iterable[Group]) -> Schedule:
    """The one schedule of a layer. InputError where its groups have several."""
    schedules = {group.scheme.schedule: group for group in found}
    if len(schedules) > 1:
        names = [f"`{group.modules[0]}`" for group in schedules.values()]
        raise InputError(
            f"{' and '.join(names)} are in one layer, and learn for different `epochs` or `batch`",
            fix="give their rules the same ones",
        )
    (schedule,) = schedules
    assert schedule is not None
    return schedule


def settle(
    found: Iterable[Group],
    made: Mapping[Matrix, Learner],
    segments: Mapping[str, list[list[Segment]]],
) -> dict[str, Stats]:
    """What every module of the groups takes: its own rows of what is by row."""
    settled: dict[str, Stats] = {}
    for group in found:
        for matrix in group.matrices:
            stats = made[matrix].stats(matrix)
            for segment in segments[matrix.parameter][matrix.expert]:
                settled[segment.module] = {
                    name: tensor[segment.start : segment.stop].clone()
                    if name in group.scheme.row_stats
                    else tensor
                    for name, tensor in stats.items()
                }
    return settled


def learn(
    layer: Layer, layout: LayerLayout, found: list[Group], edits: dict[str, Factors]
) -> tuple[dict[str, Stats], dict[str, Any] | None]:
    """Let a loaded layer's groups learn. Statistics by module, and a report; adds edits of producers.

    Nothing is learned of modules that no token reaches. InputError for these where the recipe says so,
    and where learning goes astray, or does not go together.
    """
    wishes = layer.run.wishes
    generator = torch.Generator().manual_seed(wishes.seed * 2**20 + layer.index)
    widths = {g.matrices[0]: layer.weight(g.matrices[0]).shape[1] for g in found}
    amax = layer.channel_amax(widths)
    empty = [m for g in found if not bool(amax[g.matrices[0]].any()) for m in g.modules]
    if empty and wishes.uncalibrated != "dynamic":
        raise unreached(empty, wishes.quantized[empty[0]].rule)
    found = [group for group in found if group.modules[0] not in empty]
    if not found:
        return {}, None
    made = learners(found, layout, wishes, layer.weight, amax, generator)
    course = Course(layer, made)
    before, after = course.learn(schedule_of(found), generator)
    for group in found:
        learner = made[group.matrices[0]]
        scale = learner.channel_scale
        if group.producer is not None and scale is not None:
            by_channel = torch.ones(len(group.producer.used))
            by_channel[group.columns] = 1 / scale
            layer.divide(layout, group.producer, by_channel, edits)
    report = {
        "modules": sorted(module for group in found for module in group.modules),
        "loss_before": before,
        "loss_after": after,
        "kept": "what was learned" if after < before else "the start",
        "condition": max(learner.condition for learner in made.values()),
    }
    return settle(found, made, layout.segments), report
