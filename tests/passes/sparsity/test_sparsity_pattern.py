"""Patterns: exact counts whatever the ties, units that go together, shapes that do not fit."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphprune.errors import RecipeError
from graphprune.passes.sparsity.sparsity_pattern import lowest, parse_pattern, removed_mask

PATTERNS = ["unstructured", "2:4", "1:3", "3:4", "2x3", "4x1", "1x4", "rows", "columns"]


def table(seed: int, rows: int, columns: int, distinct: int) -> Tensor:
    """Scores with many ties where few values are distinct."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, distinct, (rows, columns), generator=generator).double()


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(PATTERNS),
    st.integers(0, 1000),
    st.integers(1, 17),
    st.integers(1, 30),
    st.floats(0, 0.99),
    st.sampled_from([1, 2, 10, 10**6]),
    st.booleans(),
)
def test_exactly_so_many_units_go_and_they_are_the_lowest(
    text: str, seed: int, rows: int, columns: int, sparsity: float, distinct: int, per_row: bool
) -> None:
    """Straight from the definition: squares are summed unit by unit, and sorted as Python lists.

    Units at the edges hold what is left.
    """
    pattern = parse_pattern(text)
    if pattern.of:
        columns *= pattern.of
    unit_rows, unit_columns = pattern.height or rows, pattern.width or columns
    scores = table(seed, rows, columns, distinct)
    gone = removed_mask(scores, sparsity, pattern, per_row)
    assert gone.shape == scores.shape
    assert gone.dtype is torch.bool

    if pattern.of:
        for row, mask in zip(scores.tolist(), gone.tolist(), strict=True):
            for start in range(0, columns, pattern.of):
                group = range(start, start + pattern.of)
                expected = sorted(group, key=lambda j: (row[j], j))[: pattern.of - pattern.keep]
                assert {j for j in group if mask[j]} == set(expected)
        return

    units = {
        (r, c): scores[
            r * unit_rows : (r + 1) * unit_rows, c * unit_columns : (c + 1) * unit_columns
        ]
        for r in range(math.ceil(rows / unit_rows))
        for c in range(math.ceil(columns / unit_columns))
    }
    whole: dict[tuple[int, int], bool] = {}
    for r, c in units:
        part = gone[r * unit_rows : (r + 1) * unit_rows, c * unit_columns : (c + 1) * unit_columns]
        assert bool(part.all()) == bool(part.any()), "a unit goes whole or not at all"
        whole[r, c] = bool(part.any())
    # Within a row of one unit there is nothing to choose: then it is over the matrix.
    split = per_row and columns > unit_columns
    tables = [[k for k in units if k[0] == r] for r in {r for r, _ in units}] if split else [units]
    for keys in tables:
        count = min(math.floor(sparsity * len(keys) + 0.5), len(keys) - 1)
        expected_units = sorted(keys, key=lambda k: (float(units[k].square().sum()), k))[:count]
        assert {k for k in keys if whole[k]} == set(expected_units)


@pytest.mark.parametrize("scope", [False, True], ids=["layer", "row"])
def test_of_equal_scores_exactly_so_many_go(scope: bool) -> None:
    for sparsity, count in ((0.0, 0), (0.25, 3), (0.5, 6), (0.9, 11)):
        gone = removed_mask(torch.ones(5, 12), sparsity, parse_pattern("unstructured"), scope)
        assert int(gone.sum()) == (5 * count if scope else math.floor(sparsity * 60 + 0.5))
        assert gone.sum(1).tolist() == [count] * 5 or not scope


def test_of_equal_scores_the_first_go() -> None:
    scores = torch.tensor([[1.0, 0.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    expected = torch.tensor([[True, True, False, False], [True, True, False, False]])
    assert torch.equal(lowest(scores, 2), expected)


def test_n_of_m_keeps_n() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0, 8.0, 7.0, 6.0, 5.0]])
    one = removed_mask(scores, 0.0, parse_pattern("1:4"), False)
    assert one.tolist() == [[True, True, True, False, False, True, True, True]]
    three = removed_mask(scores, 0.0, parse_pattern("3:4"), False)
    assert three.tolist() == [[True, False, False, False, False, False, False, True]]
    assert parse_pattern("1:4").sparsity == 0.75
    assert parse_pattern("unstructured").sparsity is None


def test_blocks_are_scored_by_their_norm() -> None:
    """Neither the largest value nor the largest sum decides: 36 + 0 < 4 · 16, 36 > 4 · 4."""
    for large, first in ((4.0, True), (2.0, False)):
        scores = torch.tensor([[6.0, 0.0, large, large], [0.0, 0.0, large, large]])
        gone = removed_mask(scores, 0.5, parse_pattern("2x2"), False)
        assert gone.tolist() == [[first, first, not first, not first]] * 2


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 1000), st.integers(1, 20), st.integers(1, 12), st.sampled_from(["3x2", "8x4"])
)
def test_the_norm_is_what_zeroing_a_block_costs(
    seed: int, rows: int, columns: int, text: str
) -> None:
    """With uncorrelated inputs Σ |ΔW x|² is the squared norm of |w| · ‖x‖, at the edges too."""
    pattern, generator = parse_pattern(text), torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    size = torch.rand(columns, generator=generator, dtype=torch.float64)
    units = pattern.units(weight.abs() * size)
    assert units.shape == pattern.shape(rows, columns)
    for r, c in itertools.product(*map(range, units.shape)):
        one = torch.zeros_like(units)
        one[r, c] = 1
        change = weight * pattern.spread(one, rows, columns)
        cost = float((change @ size.square().diag() @ change.T).trace())
        assert cost == pytest.approx(float(units[r, c]) ** 2)


def test_the_smallest_numbers_have_norms_too() -> None:
    """Or a block of them could go before one of zeros, which would come back."""
    scores = torch.tensor([[1e-44, 1e-30, 0.0, 0.0]])
    gone = removed_mask(scores, 0.5, parse_pattern("1x2"), False)
    assert gone.tolist() == [[False, False, True, True]]


def test_outputs_come_first_in_a_block() -> None:
    """OUTxIN: 2x1 joins two rows of one column."""
    scores = torch.tensor([[0.0, 5.0, 1.0], [0.0, 0.0, 1.0]])
    gone = removed_mask(scores, 0.3, parse_pattern("2x1"), False)
    assert gone.tolist() == [[True, False, False]] * 2


def test_rows_and_columns_go_whole() -> None:
    scores = torch.arange(12.0).reshape(3, 4)
    rows = removed_mask(scores, 0.34, parse_pattern("rows"), False)
    assert rows.all(1).tolist() == [True, False, False]
    columns = removed_mask(scores, 0.5, parse_pattern("columns"), False)
    assert columns.all(0).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("pattern", "shape"),
    [("rows", (4, 3)), ("1x3", (4, 3)), ("unstructured", (4, 1)), ("2x3", (8, 3))],
)
def test_where_a_row_is_one_unit_rows_compete(pattern: str, shape: tuple[int, int]) -> None:
    """All or none would go otherwise."""
    scores = torch.rand(shape)
    gone = removed_mask(scores, 0.5, parse_pattern(pattern), True)
    assert float(gone.double().mean()) == 0.5
    assert torch.equal(gone, removed_mask(scores, 0.5, parse_pattern(pattern), False))


@pytest.mark.parametrize(
    ("pattern", "shape", "sentence"),
    [
        ("2:4", (3, 6), "its 6 inputs are no multiple of 4"),
        ("32x4", (20, 3), "all of its 20 outputs and 3 inputs are one block"),
        ("32x4", (32, 4), "all of its 32 outputs and 4 inputs are one block"),
        ("32x4", (33, 4), ""),
        ("32x4", (1, 5), ""),
        ("2:4", (3, 8), ""),
        ("32x4", (64, 8), ""),
        ("unstructured", (1, 1), ""),
        ("rows", (7, 5), ""),
        ("columns", (7, 5), ""),
    ],
)
def test_what_does_not_fit_is_said(pattern: str, shape: tuple[int, int], sentence: str) -> None:
    assert parse_pattern(pattern).obstacle(*shape) == sentence


@pytest.mark.parametrize("text", ["", "sinlge", "4", "2:4:8", "x4", "0x4", "4x0", "-1:4", 2, None])
def test_unknown_patterns_are_refused_with_the_known_ones(text: Any) -> None:
    with pytest.raises(RecipeError, match=r"there is no pattern .*'n:m' \(keeps n of m"):
        parse_pattern(text)


def test_the_former_name_of_single_weights_is_refused_with_the_new_one() -> None:
    with pytest.raises(RecipeError, match="called 'unstructured', not 'single'"):
        parse_pattern("single")


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4"])
def test_n_must_lie_below_m(text: str) -> None:
    with pytest.raises(RecipeError, match=r"write n:m with 0 < n < m, as 2:4"):
        parse_pattern(text)


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("lead", [(), (3,)])
def test_values_of_units_spread_over_their_weights(text: str, lead: tuple[int, ...]) -> None:
    pattern = parse_pattern(text)
    units = pattern.units(torch.rand(*lead, 5, 13, dtype=torch.float64))
    assert units.shape == (*lead, *pattern.shape(5, 13))
    spread = pattern.spread(units, 5, 13)
    assert spread.shape == (*lead, 5, 13)
    sizes = pattern.units(torch.ones(5, 13, dtype=torch.float64)).square()
    torch.testing.assert_close(pattern.units(spread), units * sizes.sqrt())
    assert float(sizes.sum()) == pytest.approx(5 * 13)


def test_a_transposed_pattern_is_that_of_the_transposed_matrix() -> None:
    pattern, scores = parse_pattern("3x2"), torch.rand(8, 5, dtype=torch.float64)
    assert torch.equal(pattern.transposed.units(scores.T).T, pattern.units(scores))
