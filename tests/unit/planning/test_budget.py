"""The allocation: against every choice there is, and its edges."""

from __future__ import annotations

import itertools
import random

import pytest

from quantcli.planning.budget.allocation import allocate


def cost(costs, choice):
    return sum(of_unit[option] for of_unit, option in zip(costs, choice, strict=True))


def best(aim, limited, limit):
    """The least sum of `aim` over all choices."""
    choices = itertools.product(*(range(len(costs)) for costs in limited))
    taken = [c for c in choices if all(limited[u][o] is not None for u, o in enumerate(c))]
    return min(cost(aim, c) for c in taken if cost(limited, c) <= limit)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_best_of_all_choices(seed: int) -> None:
    draw = random.Random(seed)
    limited = [[draw.randint(10, 90) for _ in range(3)] + [160] for _ in range(6)]
    limited[2][0] = None
    aim = [[draw.random() for _ in range(3)] + [0.0] for _ in range(6)]
    limit = 420
    choice = allocate(aim, limited, limit)
    assert choice is not None
    assert cost(limited, choice) <= limit
    assert cost(aim, choice) == pytest.approx(best(aim, limited, limit), rel=1e-4)
    assert choice == allocate(aim, limited, limit)


def test_an_exact_limit_is_kept() -> None:
    limited = [[3, 7], [3, 7], [3, 7]]
    assert allocate([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]], limited, 17) == [1, 1, 0]
    assert allocate([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]], limited, 16.999) == [1, 0, 0]
    assert allocate([[3.0, 0.0]] * 3, limited, 9) == [0, 0, 0]


def test_no_choice_is_small_enough() -> None:
    assert allocate([[1.0, 0.0]], [[3, 7]], 2.9) is None


def test_it_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    allocate([[1.0, 0.0]], [[3, 7]], 5)
    assert capfd.readouterr() == ("", "")
