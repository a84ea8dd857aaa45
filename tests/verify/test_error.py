"""The measure of differences, against plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.verify.error import relative_error, row_errors


def by_hand(expected: list[list[float]], actual: list[list[float]]) -> tuple[list[float], ...]:
    """Differences and scales of rows, by loops over Python numbers."""
    differences, scales, typical = [], [], []
    for a, b in zip(expected, actual, strict=True):
        each = [
            0.0
            if x == y or (math.isnan(x) and math.isnan(y))
            else abs(x - y)
            if math.isfinite(x) and math.isfinite(y)
            else math.inf
            for x, y in zip(a, b, strict=True)
        ]
        differences.append(max(each))
        finite = sorted(abs(x) for x in a if math.isfinite(x))
        scales.append(finite[int(0.9 * (len(finite) - 1))] if finite else 0.0)
        typical += scales[-1:] if finite else []
    middle = sorted(typical)[(len(typical) - 1) // 2] if typical else 0.0
    return differences, [max(scale, 1e-3 * middle, 1e-300) for scale in scales]


VALUES = st.floats(-100, 100) | st.sampled_from([0.0, math.inf, -math.inf, math.nan])


@st.composite
def pairs(draw: Any) -> tuple[list[list[float]], list[list[float]]]:
    """Two tables of one shape that agree in many places."""
    width = draw(st.integers(1, 12))
    rows = draw(st.lists(st.lists(VALUES, min_size=width, max_size=width), min_size=1, max_size=4))
    other = [[draw(st.just(v) | st.just(v) | VALUES) for v in row] for row in rows]
    return rows, other


@settings(max_examples=60, deadline=None)
@given(pairs())
def test_row_errors_are_those_of_a_loop(tables: tuple[Any, Any]) -> None:
    expected, actual = (torch.tensor(t, dtype=torch.float64) for t in tables)
    difference, scale = row_errors(expected, actual)
    wanted_difference, wanted_scale = by_hand(*tables)
    assert difference.tolist() == wanted_difference
    assert scale.tolist() == wanted_scale
    worst = max(d / s for d, s in zip(wanted_difference, wanted_scale, strict=True))
    assert relative_error(expected, actual) == worst


def test_what_is_no_float_must_be_equal() -> None:
    a, b = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 5]])
    assert row_errors(a, b)[0].tolist() == [0, math.inf]
    assert relative_error(a > 2, b > 2) == 0
    assert [relative_error(x, y) for x, y in [(None, None), (3, 3), (3, 4), (a, None)]] == [
        0, 0, math.inf, math.inf,
    ]  # fmt: skip
    assert relative_error(a, a[:1]) == math.inf
    assert relative_error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0


def test_complex_numbers_are_compared_part_by_part() -> None:
    a = torch.tensor([[1 + 2j, 2 - 1j]])
    assert relative_error(a, a + 0.5j) == relative_error(
        torch.view_as_real(a).flatten(1), torch.view_as_real(a + 0.5j).flatten(1)
    )


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [2.0, -4.0], 1.0),
        ([1.0, math.inf], [1.0, math.inf], 0.0),
        ([1.0, math.inf], [1.0, 3.0], math.inf),
        ([1.0, math.nan], [1.0, math.nan], 0.0),
        ([1.0, 2.0], [1.0, math.nan], math.inf),
        ([1.0, 2.0], [[1.0, 2.0]], math.inf),
        ([1, 2], [1, 2], 0.0),
        ([1, 2], [1, 3], math.inf),
        ([0.0], [0.0], 0.0),
        ([], [], 0.0),
    ],
)
def test_relative_error(expected: list[float], actual: list[float], error: float) -> None:
    got = relative_error(torch.tensor(expected), torch.tensor(actual))
    assert got == error or (got > 1e300 and error == math.inf)


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        # A row of next to nothing counts as a thousandth of the typical row.
        ([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0], [0.0, 1e-6]], 1e-3),
        # Each row by itself: the large one does not excuse the small one.
        ([[1e6, 1e6], [1.0, 1.0], [1.0, 1.0]], [[1e6, 1e6], [1.0, 1.0], [1.0, 1.1]], 0.1),
        # One large value in a row is not its scale.
        ([[1e6, 1.0, 1.0, 1.0]], [[1e6, 1.0, 1.0, 1.5]], 0.5),
        ([[torch.inf, 2.0, 2.0]], [[torch.inf, 2.0, 3.0]], 0.5),
        ([[torch.nan, 2.0, 2.0]], [[torch.nan, 2.0, 3.0]], 0.5),
    ],
)
def test_rows_have_scales_of_their_own(expected: Any, actual: Any, error: float) -> None:
    got = relative_error(torch.tensor(expected).double(), torch.tensor(actual).double())
    assert got == pytest.approx(error, rel=1e-6)
