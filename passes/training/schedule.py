"""How a quantity goes from one value to another while training runs: a gradual schedule.

    cubic    v(p) = last + (first - last)(1 - x)³,  x = (p - begin) / (end - begin)   (1710.01878)
    linear   v(p) = last + (first - last)(1 - x)

Before `begin` it is `first`, from `end` on it is `last`. The cubic one goes fast while there is
much to take, and comes to rest at `end`: its slope there is zero.
"""

from __future__ import annotations

from graphprune.errors import RecipeError
from graphprune.suggest import suggest
from graphprune.validate import check_number

SCHEDULES = ("cubic", "linear")


def scheduled(
    progress: float, begin: float, end: float, first: float, last: float, shape: str = "cubic"
) -> float:
    """The value of a schedule (Zhu and Gupta, arXiv 1710.01878); exactly `last` from `end` on.

    Args:
        progress: fraction of all training steps that is done, 0 to 1.
        begin, end: fractions of all steps between which the value moves; equal ones make it jump.
        first, last: the value before and after.
        shape: one of `SCHEDULES`.
    """
    if progress >= end:
        return last
    if progress <= begin:
        return first
    left = (end - progress) / (end - begin)
    return last + (first - last) * (left**3 if shape == "cubic" else left)


def check_schedule(shape: object, begin: object, end: object) -> None:
    """Raise RecipeError for a schedule that does not exist or ends before it begins."""
    if shape not in SCHEDULES:
        raise RecipeError(f"there is no schedule {shape!r}; {suggest(str(shape), SCHEDULES)}")
    check_number("begin", begin, "a fraction of all steps, 0 to 1", low=0, high=1)
    check_number("end", end, "a fraction of all steps, 0 to 1", low=0, high=1)
    if float(end) < float(begin):  # type: ignore[arg-type]
        raise RecipeError(f"the schedule ends at {end!r}, before it begins at {begin!r}")
