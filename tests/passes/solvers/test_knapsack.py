"""Levels within a budget: brute force, limits that are never broken, several budgets."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.passes.solvers import knapsack
from graphprune.passes.solvers.knapsack import solve_levels


def drawn(seed: int, items: int, levels: int) -> tuple[list[list[float]], list[list[float]]]:
    """Errors that fall and amounts that rise with the level."""
    generator = np.random.default_rng(seed)
    amounts = np.sort(generator.uniform(size=(items, levels)), axis=1)
    errors = -np.sort(-generator.uniform(size=(items, levels)), axis=1)
    return errors.tolist(), amounts.tolist()


def brute(
    errors: list[list[float]], amounts: list[list[list[float]]], limits: list[float]
) -> float | None:
    """The least error of all choices within the limits."""
    found = [
        sum(row[j] for row, j in zip(errors, chosen, strict=True))
        for chosen in itertools.product(*(range(len(row)) for row in errors))
        if all(total(rows, chosen) <= limit for rows, limit in zip(amounts, limits, strict=True))
    ]
    return min(found, default=None)


def total(rows: list[list[float]], chosen: tuple[int, ...] | list[int]) -> float:
    return sum(row[j] for row, j in zip(rows, chosen, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 6), st.floats(0, 1))
def test_is_never_over_the_budget_and_as_good_as_brute_force(
    seed: int, items: int, levels: int, tightness: float
) -> None:
    errors, amounts = drawn(seed, items, levels)
    low, high = (sum(pick(row) for row in amounts) for pick in (min, max))
    limit = low + tightness * (high - low)
    found = solve_levels(errors, [amounts], [limit])
    best = brute(errors, [amounts], [limit])
    assert found is not None
    assert best is not None
    assert total(amounts, found) <= limit * (1 + 1e-9)
    # Rounding up may lose what fits to a ten-thousandth of the room.
    smaller = brute(errors, [amounts], [limit - items * (limit - low) / knapsack.BUCKETS])
    assert best <= total(errors, found) + 1e-12
    assert smaller is None or total(errors, found) <= smaller + 1e-12


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 5))
def test_keeps_several_budgets(seed: int, items: int, levels: int) -> None:
    pytest.importorskip("scipy", reason="several budgets at once need scipy")
    errors, amounts = drawn(seed, items, levels)
    _, others = drawn(seed + 1, items, levels)
    limits = [0.6 * items, 0.5 * items]
    found = solve_levels(errors, [amounts, others], limits)
    best = brute(errors, [amounts, others], limits)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert all(
            total(rows, found) <= limit * (1 + 1e-6)
            for rows, limit in zip((amounts, others), limits, strict=True)
        )
        assert total(errors, found) <= best + 1e-3 * abs(best) + 1e-9


def test_what_cannot_be_kept_is_none() -> None:
    assert solve_levels([[1.0, 0.0]], [[[2.0, 3.0]]], [1.9]) is None
    assert solve_levels([[1.0, 0.0]], [[[2.0, 3.0]]], [2.0]) == [0]


def test_a_budget_that_fits_exactly_is_kept_without_buckets() -> None:
    amounts = [[0.1, 0.3], [0.1, 0.3]]
    assert solve_levels([[1.0, 0.0]] * 2, [amounts], [0.6]) == [1, 1]


def test_without_budgets_the_least_error_wins() -> None:
    assert solve_levels([[2.0, 1.0, 3.0]], [], []) == [1]
