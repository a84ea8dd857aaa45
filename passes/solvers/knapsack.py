"""One level for each item, so that costs are least and every resource stays within its limit.

For items l with levels j, errors e[l][j] and what a level takes of resource r, a_r[l][j]:

    min Σ e[l][j(l)]    such that    Σ a_r[l][j(l)] <= limit_r    for every r

One resource is a dynamic program (SPDY, arXiv 2201.13096). The limit is cut into B = 10,000
buckets, amounts become whole numbers of buckets c[l][j], and D[l][b] is the least error of the
items up to l within b buckets:

    D[l][b] = min over j with c[l][j] <= b of    D[l - 1][b - c[l][j]] + e[l][j],    D[-1] = 0

The answer is D[last][B], traced back through the minima; it takes O(items · levels · B) steps.
Amounts round up, so that a sum within the buckets is within the limit; SPDY rounds to nearest,
which can exceed it. Several resources are a mixed-integer program.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from graphprune.errors import RecipeError

BUCKETS = 10_000

_Rows = Sequence[Sequence[float]]


def solve_levels(
    errors: _Rows, amounts: Sequence[_Rows], limits: Sequence[float]
) -> list[int] | None:
    """The level of each item, or None where no choice keeps within the limits.

    Args:
        errors: of each item's levels.
        amounts: of each resource, what each item's levels take; 0 or more.
        limits: of each resource, how much all items may take together.

    Raises:
        RecipeError: there are several resources, and scipy is not installed.
    """
    # A sum that fits exactly must not fail by rounding.
    room = [limit + 1e-9 * abs(limit) for limit in limits]
    least = [sum(min(row) for row in rows) for rows in amounts]
    if any(low > limit for low, limit in zip(least, room, strict=True)):
        return None
    if not amounts:
        return [int(np.argmin(row)) for row in errors]
    if len(amounts) == 1:
        return _by_buckets(errors, amounts[0], room[0])
    return _by_milp(errors, amounts, room)


def check_scipy() -> None:
    """Refuse several resources where scipy is not installed.

    Raises:
        RecipeError: it is not.
    """
    try:
        import scipy  # noqa: F401
    except ImportError as e:
        raise RecipeError(
            "several budgets at once are solved with scipy, which is not installed: "
            'pip install "graphprune[budget]", or give one of them'
        ) from e


def _by_buckets(errors: _Rows, amounts: _Rows, limit: float) -> list[int] | None:
    # The least of every item is no choice: it is subtracted, and not rounded.
    least = [min(row) for row in amounts]
    bucket = (limit - sum(least)) / BUCKETS
    best: npt.NDArray[np.float64] = np.zeros(BUCKETS + 1)
    chosen = []
    for row, costs, low in zip(amounts, errors, least, strict=True):
        taken = [_buckets(amount - low, bucket) for amount in row]
        tried = np.full((len(row), BUCKETS + 1), np.inf)
        for j, (count, cost) in enumerate(zip(taken, costs, strict=True)):
            if count <= BUCKETS:  # the recursion for all b at once: b - count is a shift
                tried[j, count:] = best[: BUCKETS + 1 - count] + cost
        best = tried.min(0)
        chosen.append((tried.argmin(0), taken))
    if not np.isfinite(best[-1]):
        return None
    at, levels = BUCKETS, []
    for argmin, taken in reversed(chosen):
        levels.append(int(argmin[at]))
        at -= taken[levels[-1]]
    return levels[::-1]


def _buckets(amount: float, bucket: float) -> int:
    """How many buckets an amount takes, rounded up; more than there are where it cannot fit."""
    if amount <= 0:
        return 0
    if bucket <= 0 or amount > bucket * (BUCKETS + 1):
        return BUCKETS + 1
    return int(np.ceil(amount / bucket * (1 - 1e-12)))


def _by_milp(errors: _Rows, amounts: Sequence[_Rows], limits: Sequence[float]) -> list[int] | None:
    """Solve with a binary variable for every level, exactly one of each item, by HiGHS."""
    check_scipy()
    from scipy.optimize import Bounds, LinearConstraint, milp

    sizes = [len(row) for row in errors]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    one_of = np.zeros((len(sizes), starts[-1]))
    for item, (start, size) in enumerate(zip(starts, sizes, strict=False)):
        one_of[item, start : start + size] = 1
    flat = [np.concatenate([np.asarray(row, float) for row in rows]) for rows in amounts]
    # As fractions of the limit, so that the solver's tolerances mean the same for ms and bytes.
    scaled = np.stack([row / max(limit, 1e-300) for row, limit in zip(flat, limits, strict=True)])
    found = milp(
        np.concatenate([np.asarray(row, float) for row in errors]),
        integrality=np.ones(starts[-1]),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_of, 1, 1), LinearConstraint(scaled, -np.inf, 1)],
        options={"mip_rel_gap": 1e-4},
    )
    if found.x is None:
        return None
    return [
        int(np.argmax(found.x[start : start + size]))
        for start, size in zip(starts, sizes, strict=False)
    ]
