"""The choice of an option for each unit: a multiple-choice knapsack, solved by HiGHS.

Q. Huangfu and J. A. J. Hall, "Parallelizing the dual revised simplex method", 2018; branch and bound
for the whole numbers. One thread and a fixed seed: the same numbers give the same choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import highspy
import numpy as np

from quantcli.core.errors import MachineError

_GAP = 1e-5  # of the best value, within which a choice counts as the best


class _Silent(highspy.Highs):
    """A solver that prints nothing: standard output is for data."""

    def enableCallbacks(self) -> None:
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()  # type: ignore[no-untyped-call]


Costs = Sequence[Sequence[float | None]]  # of each unit: for each option a cost; None: cannot be taken


def allocate(aim: Costs, limited: Costs, limit: float) -> list[int] | None:
    """The number of an option for each unit, so that the sum of `aim` is least and that of `limited` is
    at most `limit`. None if the least sum of `limited` is above it.

    MachineError if the solver fails.
    """
    least = sum(min(value for value in costs if value is not None) for costs in limited)
    if least > limit:
        return None
    places = [
        (unit, option)
        for unit, costs in enumerate(limited)
        for option, cost in enumerate(costs)
        if cost is not None
    ]
    objective = np.array([aim[unit][option] for unit, option in places], dtype=np.float64)
    weights = np.array([limited[unit][option] for unit, option in places], dtype=np.float64)
    scale = float(weights.max()) or 1.0
    column = np.arange(len(places), dtype=np.int32)
    solver = _Silent()  # type: ignore[no-untyped-call]
    for name, value in (("threads", 1), ("random_seed", 0), ("mip_rel_gap", _GAP)):
        solver.setOptionValue(name, value)
    ones, zeros = np.ones(len(places)), np.zeros(len(places))
    nothing, none = np.empty(0, np.int32), np.empty(0)
    largest = float(objective.max()) or 1.0
    solver.addCols(len(places), objective / largest, zeros, ones, 0, nothing, nothing, none)
    solver.changeColsIntegrality(
        len(places), column, np.full(len(places), highspy.HighsVarType.kInteger)
    )
    units = np.array([unit for unit, _ in places])
    for unit in range(len(limited)):
        own = column[units == unit]
        solver.addRow(1.0, 1.0, len(own), own, np.ones(len(own)))
    solver.addRow(-highspy.kHighsInf, limit / scale, len(places), column, weights / scale)
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        raise MachineError(
            f"HiGHS finds no allocation: {solver.modelStatusToString(solver.getModelStatus())}",
            fix="install another version of highspy",
        )
    values = np.asarray(solver.getSolution().col_value)
    choice = [0] * len(limited)
    for place in np.flatnonzero(values > 0.5):
        unit, option = places[place]
        choice[unit] = option
    return _within(choice, aim, limited, limit)


def _within(choice: list[int], aim: Costs, limited: Costs, limit: float) -> list[int]:
    """The choice, changed so that it keeps the limit exactly: the solver has a tolerance."""

    def cost(costs: Costs, unit: int, option: int) -> float:
        return costs[unit][option] or 0.0

    while sum(cost(limited, unit, option) for unit, option in enumerate(choice)) > limit:
        steps = [
            (cost(aim, unit, other) - cost(aim, unit, option), unit, other)
            for unit, option in enumerate(choice)
            for other, value in enumerate(limited[unit])
            if value is not None and value < cost(limited, unit, option)
        ]
        _, unit, other = min(steps)
        choice[unit] = other
    return choice
