"""Schedules against their closed forms."""

from __future__ import annotations

import itertools

import pytest

from graphprune.errors import RecipeError
from graphprune.passes.training.schedule import SCHEDULES, check_schedule, scheduled

shapes = pytest.mark.parametrize("shape", SCHEDULES)


@shapes
def test_ends_are_exact_and_nothing_moves_outside(shape: str) -> None:
    before = [scheduled(p, 0.2, 0.7, 0.1, 0.8, shape) for p in (0.0, 0.1, 0.2)]
    after = [scheduled(p, 0.2, 0.7, 0.1, 0.8, shape) for p in (0.7, 0.9, 1.0)]
    assert before == [0.1] * 3
    assert after == [0.8] * 3


@shapes
@pytest.mark.parametrize(("first", "last"), [(0.0, 0.9), (1.0, 0.3)])
def test_it_never_turns_back(shape: str, first: float, last: float) -> None:
    values = [scheduled(i / 200, 0.1, 0.8, first, last, shape) for i in range(201)]
    sign = 1 if last > first else -1
    steps = [sign * (b - a) for a, b in itertools.pairwise(values)]
    assert min(steps) >= 0
    assert max(steps) > 0


def test_values_are_those_of_the_closed_forms() -> None:
    # Half way: 1 - (1/2)^3 of the way by the cubic, half by the line.
    assert scheduled(0.5, 0.25, 0.75, 0.0, 0.8) == pytest.approx(0.7, abs=1e-15)
    assert scheduled(0.5, 0.25, 0.75, 0.0, 0.8, "linear") == pytest.approx(0.4, abs=1e-15)
    # A fifth of the way: 0.8 (1 - 0.8^3).
    assert scheduled(0.2, 0.0, 1.0, 0.0, 0.8) == pytest.approx(0.8 * (1 - 0.512), abs=1e-15)


def test_the_cubic_comes_to_rest_and_begins_thrice_as_steep_as_the_line() -> None:
    h = 1e-6
    slope_end = (scheduled(0.7, 0, 0.7, 0, 0.8) - scheduled(0.7 - h, 0, 0.7, 0, 0.8)) / h
    slope_begin = (scheduled(h, 0, 0.7, 0, 0.8) - scheduled(0, 0, 0.7, 0, 0.8)) / h
    assert slope_end == pytest.approx(0, abs=1e-9)
    assert slope_begin == pytest.approx(3 * 0.8 / 0.7, rel=1e-5)


@shapes
def test_equal_ends_make_it_jump(shape: str) -> None:
    assert scheduled(0.29, 0.3, 0.3, 0.0, 0.8, shape) == 0.0
    assert scheduled(0.3, 0.3, 0.3, 0.0, 0.8, shape) == 0.8
    assert scheduled(0.0, 0.0, 0.0, 0.0, 0.8, shape) == 0.8


@pytest.mark.parametrize(
    ("shape", "begin", "end", "words"),
    [
        ("cubik", 0, 1, "did you mean"),
        ("cubic", -0.1, 1, "begin"),
        ("cubic", 0, 1.5, "end"),
        ("linear", 0.5, 0.4, "ends at 0.4, before"),
    ],
)
def test_refusals(shape: str, begin: float, end: float, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        check_schedule(shape, begin, end)
