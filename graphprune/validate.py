"""Checks of the numbers that users give."""

from __future__ import annotations

import math

from graphprune.errors import GraphPruneError, RecipeError


def check_number(
    name: str,
    value: object,
    rule: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Refuse what is not a finite number in a range; a bool is no number.

    Raises:
        RecipeError: "NAME must be RULE, got VALUE".
    """
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if good:
        number = float(value)  # type: ignore[arg-type]
        above = number > low if open_low else number >= low
        below = number < high if open_high else number <= high
        good = math.isfinite(number) and above and below
    if not good:
        raise RecipeError(f"{name} must be {rule}, got {value!r}")


def check_whole(
    name: str,
    value: object,
    rule: str = "a whole number of at least 1",
    *,
    low: int = 1,
    error: type[GraphPruneError] = RecipeError,
) -> None:
    """Refuse what is not an int of at least `low`; a bool is none.

    Raises:
        RecipeError: "NAME must be RULE, got VALUE"; or the error given.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise error(f"{name} must be {rule}, got {value!r}")
