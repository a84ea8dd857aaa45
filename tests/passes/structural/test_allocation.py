from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphprune.passes.structural.allocation import (
    ALLOCATIONS,
    Wanted,
    best,
    global_ranking,
    kept_count,
    uniform,
    units_to_remove,
)


@pytest.mark.parametrize(
    ("ratio", "size", "removed"),
    [
        (0.33, 12, 4),
        (0.5, 12, 6),
        (0.5, 3, 2),
        (0.25, 2, 1),
        (0.1, 4, 0),
        (0.0, 8, 0),
        (0.99, 3, 3),
    ],
)
def test_removed_is_floor_of_ratio_times_size_plus_a_half(
    ratio: float, size: int, removed: int
) -> None:
    assert units_to_remove(ratio, size) == removed


@pytest.mark.parametrize(
    ("removed", "size", "round_to", "kept"),
    [(3, 3, 1, 1), (6, 12, 8, 8), (1, 12, 8, 12), (4, 12, 4, 8), (5, 6, 16, 6), (0, 7, 4, 7)],
)
def test_kept_rounds_up_but_never_beyond_the_size(
    removed: int, size: int, round_to: int, kept: int
) -> None:
    assert kept_count(removed, size, round_to) == kept


def test_of_equal_scores_the_first_stay() -> None:
    assert best(torch.tensor([1.0, 2.0, 1.0, 1.0]), 3).tolist() == [0, 1, 2]
    equal = {"a": torch.ones(4)}
    assert uniform(equal, Wanted(0.5))["a"].tolist() == [0, 1]
    assert global_ranking(equal, Wanted(0.5))["a"].tolist() == [0, 1]


def test_uniform_takes_the_ratio_from_each() -> None:
    keep = uniform(
        {"a": torch.tensor([4.0, 3, 2, 1]), "b": torch.tensor([100.0, 200])}, Wanted(0.5)
    )
    assert {k: v.tolist() for k, v in keep.items()} == {"a": [0, 1], "b": [1]}


def test_global_takes_from_where_scores_are_relatively_low() -> None:
    even = torch.tensor([1.0, 1.0, 1.0, 1.0])
    uneven = torch.tensor([0.1, 0.1, 0.1, 9.0]) * 1000  # larger, but that is only a matter of scale
    keep = global_ranking({"even": even, "uneven": uneven}, Wanted(3 / 8))
    assert {k: v.tolist() for k, v in keep.items()} == {"even": [0, 1, 2, 3], "uneven": [3]}


def test_global_never_empties_a_group() -> None:
    scores = {"a": torch.tensor([0.0, 0.0]), "b": torch.tensor([5.0, 6.0, 7.0])}
    keep = global_ranking(scores, Wanted(0.9))
    assert {k: v.tolist() for k, v in keep.items()} == {"a": [0], "b": [2]}


@pytest.mark.parametrize("names", [("cheap", "dear"), ("dear", "cheap")])
def test_costs_count_parameters_not_units(names: tuple[str, str]) -> None:
    scores = {name: torch.ones(4) for name in names}
    keep = global_ranking(scores, Wanted(0.5, costs={"cheap": 1, "dear": 3}))
    # Of equal scores the dear units are worth less a parameter: they go first, wherever they stand.
    assert {k: len(v) for k, v in keep.items()} == {"cheap": 4, "dear": 2}


def test_the_floor_stays_in_every_group() -> None:
    low = torch.tensor([0.0] * 7 + [8.0])
    scores = {"low": low, "high": torch.ones(8)}
    assert len(global_ranking(scores, Wanted(7 / 16))["low"]) == 1
    assert len(global_ranking(scores, Wanted(7 / 16, floor=0.5))["low"]) == 4


def test_nothing_to_allocate_is_fine() -> None:
    for allocate in ALLOCATIONS.values():
        assert allocate({}, Wanted(0.5)) == {}


_scores = st.dictionaries(
    st.sampled_from("abcd"),
    st.lists(st.floats(0, 100), min_size=1, max_size=9).map(
        lambda x: torch.tensor(x, dtype=torch.float64)
    ),
    min_size=1,
)


@given(
    _scores,
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 5),
    st.sampled_from(["uniform", "global"]),
)
def test_what_stays_is_sorted_rounded_and_the_best(
    scores: dict[str, Tensor], ratio: float, round_to: int, name: Any
) -> None:
    keep = ALLOCATIONS[name](scores, Wanted(ratio, round_to))
    assert keep.keys() == scores.keys()
    for group, indices in keep.items():
        values, size = scores[group], len(scores[group])
        kept = indices.tolist()
        assert kept == sorted(set(kept))
        assert 1 <= len(kept) <= size
        assert len(kept) == size or len(kept) % round_to == 0
        gone = [i for i in range(size) if i not in kept]
        if gone:
            assert float(values[gone].max()) <= float(values[kept].min())


@given(_scores, st.floats(0, 1, exclude_max=True))
def test_global_counts_over_all_groups(scores: dict[str, Tensor], ratio: float) -> None:
    total = sum(len(v) for v in scores.values())
    keep = global_ranking(scores, Wanted(ratio))
    removed = total - sum(len(v) for v in keep.values())
    assert removed == min(units_to_remove(ratio, total), total - len(scores))
