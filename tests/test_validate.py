"""Numbers that users give: in their range, finite, and no bool."""

from __future__ import annotations

import math
from typing import Any

import pytest

from graphprune.errors import RecipeError, TrainingError
from graphprune.validate import check_number, check_whole


@pytest.mark.parametrize(
    ("given", "good"),
    [(0.5, True), (1, True), (0, False), (2.5, False), (math.nan, False), (True, False),
     ("1", False), (None, False)],
)  # fmt: skip
def test_a_number_is_finite_and_in_its_range(given: Any, good: bool) -> None:
    if good:
        check_number("x", given, "above 0, to 2", low=0, high=2, open_low=True)
        return
    with pytest.raises(RecipeError, match="x must be above 0, to 2, got"):
        check_number("x", given, "above 0, to 2", low=0, high=2, open_low=True)


@pytest.mark.parametrize("given", [0, True, 2.0, "3", None])
def test_a_whole_number_is_no_bool_and_not_below_the_least(given: Any) -> None:
    check_whole("n", 1)
    check_whole("n", 0, low=0)
    with pytest.raises(TrainingError, match="n must be a whole number of at least 1, got"):
        check_whole("n", given, error=TrainingError)
