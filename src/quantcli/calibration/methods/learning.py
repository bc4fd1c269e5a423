"""Learning in a layer: its quantized outputs are brought near to its float ones.

Teacher and student are the same layer on the same inputs. A step's gradients are those of single
batches, each computed by one thread and summed in their order: workers change nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from quantcli.calibration.channels import LayerLayout, Producer
from quantcli.calibration.loaded import LoadedLayer
from quantcli.calibration.methods.base import LayerWork, Measurement, Method
from quantcli.calibration.methods.course import FORWARDS, Course
from quantcli.calibration.policy import Policy, unreached
from quantcli.calibration.replay.skeleton import Segments
from quantcli.calibration.replay.taps import Matrix
from quantcli.calibration.shown import quantized
from quantcli.core.errors import InputError
from quantcli.core.numerics import Stats
from quantcli.planning.measured import EditFactors
from quantcli.schemes.arithmetic.observers import ChannelAmax, Summary
from quantcli.schemes.base import Learner, LearningTask, Scalable, Schedule, Scheme

_REPORT = "learned"  # name in a layer's report


@dataclass
class LearningReport:
    """Modules that have learned together. Losses: squared error of the layer's outputs over their sum
    of squares on some samples, before and after, and with the engine's arithmetic."""

    modules: list[str]
    loss_before: float
    loss_after: float
    condition: float
    kept: str
    loss_served: float = 0.0

    @property
    def note(self) -> str:
        """A remark for the progress display."""
        text = f"loss {self.loss_before:.2e} -> {self.loss_after:.2e}"
        return text if self.kept != "the start" else f"{text}: no better, kept as it was"


@dataclass(frozen=True)
class LearningGroup:
    """Matrices that read the same input and have one scheme, which learns.

    producer: the source of their input, if its channels can be scaled.
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


def learning_groups(layout: LayerLayout, policy: Policy) -> list[LearningGroup]:
    """Every group of a layer, in the order of the layer's matrices.

    InputError if only some rows of one matrix learn.
    """
    leaders = layout.leaders()
    matrices_of: dict[tuple[Matrix, Scheme], list[Matrix]] = defaultdict(list)
    names: dict[Matrix, list[str]] = {}
    for matrix, segments in layout.matrices():
        modules = [s.module for s in segments]
        schemes = {policy.scheme(module) for module in modules}
        learning = [scheme for scheme in schemes if scheme is not None and scheme.schedule is not None]
        if not learning:
            continue
        if len(schemes) > 1:
            raise InputError(
                f"`{matrix.parameter}` is made of {', '.join(f'`{m}`' for m in modules)}, and "
                f"not all of them are {learning[0].name}",
                where=policy.quantized[next(m for m in modules if m in policy.quantized)].rule,
                fix="put them under one rule",
            )
        names[matrix] = modules
        matrices_of[leaders.get(matrix, matrix), learning[0]].append(matrix)
    return [
        LearningGroup(
            scheme,
            tuple(matrices),
            tuple(module for matrix in matrices for module in names[matrix]),
            _producer(layout, matrices),
        )
        for (_, scheme), matrices in matrices_of.items()
    ]


def _producer(layout: LayerLayout, matrices: list[Matrix]) -> Producer | None:
    """The source of the group's input, each channel for one column; other matrices may read it, too."""
    for producer in layout.producers():
        read = {reader.matrix: reader.channels for reader in producer.readers}
        if all(matrix in read for matrix in matrices):
            columns = read[matrices[0]]
            one_to_one = len(set(columns.tolist())) == len(columns)
            if one_to_one and all(torch.equal(read[matrix], columns) for matrix in matrices):
                return producer
    return None


def _learners(
    layer: LoadedLayer,
    layout: LayerLayout,
    groups: Iterable[LearningGroup],
    amax: Mapping[Matrix, Tensor],
    generator: torch.Generator,
) -> dict[Matrix, Learner]:
    """A learner for each group, by matrix. amax: max |x| of each column of a group's first matrix."""
    by_matrix: dict[Matrix, Learner] = {}
    for group in groups:
        task = LearningTask(
            {matrix: layer.weight(matrix) for matrix in group.matrices},
            amax[group.matrices[0]],
            _scalable(group, layout, layer.run.policy),
            layer.run.policy.quantized[group.modules[0]].input_dtype,
            generator,
        )
        by_matrix |= dict.fromkeys(group.matrices, group.scheme.learner(task))
    return by_matrix


def _scalable(group: LearningGroup, layout: LayerLayout, policy: Policy) -> Scalable:
    if group.producer is None:
        return "not at all"
    rounded_again = layout.rounded_again(group.producer, policy.quantized)
    return "by powers of two" if rounded_again else "freely"


def schedule_of(groups: Iterable[LearningGroup]) -> Schedule:
    """The one schedule of a layer. InputError if its groups have several."""
    schedules = {group.scheme.schedule: group for group in groups}
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
    groups: Iterable[LearningGroup],
    by_matrix: Mapping[Matrix, Learner],
    segments: Segments,
) -> dict[str, Stats]:
    """Stats of every module of the groups; of those by row, its own rows."""
    stats_of: dict[str, Stats] = {}
    for group in groups:
        for matrix in group.matrices:
            stats = by_matrix[matrix].stats(matrix)
            for segment in segments[matrix.parameter][matrix.expert]:
                stats_of[segment.module] = {
                    name: tensor[segment.start : segment.stop].clone()
                    if name in group.scheme.row_stats
                    else tensor
                    for name, tensor in stats.items()
                }
    return stats_of


class Learning(Method):
    """The stats of schemes that learn while a layer runs (`Scheme.schedule`, `Scheme.learner`)."""

    name: ClassVar[str] = "learning"
    for_schemes: ClassVar[bool] = True
    results: ClassVar[tuple[str, ...]] = ("transforms",)
    edited_as: ClassVar[str] = "smoothed"  # by the learned scales of channels
    hidden_states: ClassVar[int] = 1  # the teacher's outputs
    by_layer: ClassVar[bool] = True
    against_running: ClassVar[tuple[str, str] | None] = ("learns a transform", "its scheme")

    def batch_tokens(self, schemes: Sequence[Scheme], length: int) -> int | None:
        """Half a step's, so that two threads share it."""
        steps = (scheme.schedule.batch for scheme in schemes if scheme.schedule is not None)
        return min((-(-step // 2) * length for step in steps), default=None)

    def passes(self, modules: Sequence[str], policy: Policy) -> float:
        """Magnitudes of inputs and the epochs."""
        schedules = [s.schedule for s in map(policy.scheme, modules) if s is not None and s.schedule]
        return 1.0 + FORWARDS * schedules[0].epochs if schedules else 0.0

    def asked(self, work: LayerWork) -> Iterator[tuple[Matrix, type[Summary]]]:
        """The inputs of the groups that learn."""
        for group in learning_groups(work.layout, work.run.policy):
            yield group.matrices[0], ChannelAmax

    def edit(self, work: LayerWork) -> None:
        """Learn, and fold learned scales of channels into their producers."""
        groups = learning_groups(work.layout, work.run.policy)
        if not groups:
            return
        learned, report = learn(work.layer, work.layout, groups, work.edits)
        work.stats |= learned
        if report is not None:
            work.report.results[_REPORT] = report
            work.report.note = report.note

    def measure(self, work: LayerWork) -> Measurement | None:
        """The loss with the engine's arithmetic, if anything was learned."""
        report = work.report.results.get(_REPORT)
        return None if report is None else _ServedLoss(work, report)


class _ServedLoss(Measurement):
    """The loss with the engine's arithmetic in the modules that have learned."""

    def __init__(self, work: LayerWork, report: LearningReport) -> None:
        self._work = work
        self._report = report

    def review(self) -> None:
        policy = self._work.run.policy
        only = replace(policy, quantized={m: policy.quantized[m] for m in self._report.modules})
        self._work.run.progress.phase("loss as the engine computes", passes=0)
        course = Course(self._work.layer, {})
        whole = self._work.layer.whole(self._work.edits)
        self._report.loss_served = course.served_loss(quantized(only, self._work.stats, whole))


def learn(
    layer: LoadedLayer, layout: LayerLayout, groups: list[LearningGroup], edits: dict[str, EditFactors]
) -> tuple[dict[str, Stats], LearningReport | None]:
    """Let a loaded layer's groups learn. Statistics by module, and a report; adds edits of producers.

    Nothing is learned of modules that no token reaches. InputError for these if the recipe says so,
    for groups with different schedules, and if learning diverges.
    """
    policy = layer.run.policy
    generator = torch.Generator().manual_seed(policy.seed * 2**20 + layer.index)
    widths = {g.matrices[0]: layer.weight(g.matrices[0]).shape[1] for g in groups}
    layer.run.progress.phase("magnitudes")
    amax = layer.channel_amax(widths)
    empty = [m for g in groups if not bool(amax[g.matrices[0]].any()) for m in g.modules]
    if empty and policy.uncalibrated != "dynamic":
        raise unreached(empty, policy.quantized[empty[0]].rule)
    groups = [group for group in groups if group.modules[0] not in empty]
    if not groups:
        return {}, None
    by_matrix = _learners(layer, layout, groups, amax, generator)
    course = Course(layer, by_matrix)
    before, after = course.learn(schedule_of(groups), generator)
    for group in groups:
        learner = by_matrix[group.matrices[0]]
        scale = learner.channel_scale
        if group.producer is not None and scale is not None:
            by_channel = torch.ones(len(group.producer.used))
            by_channel[group.columns] = 1 / scale
            layer.divide(group.producer, by_channel, edits)
    report = LearningReport(
        modules=sorted(module for group in groups for module in group.modules),
        loss_before=before,
        loss_after=after,
        condition=max(learner.condition for learner in by_matrix.values()),
        kept="what was learned" if after < before else "the start",
    )
    return settle(groups, by_matrix, layout.segments), report
