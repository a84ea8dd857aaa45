"""The search over sensitivities: it finds the model's optimum where errors alone mislead."""

import itertools

import numpy as np

from graphprune.passes.solvers.knapsack import solve_levels
from graphprune.passes.solvers.spdy import Levels, Sensitivities, search

ITEMS, LEVELS, LIMIT = 4, 5, 8.0
ERRORS = [[(1 - j / (LEVELS - 1)) ** 2 for j in range(LEVELS)]] * ITEMS
AMOUNTS = [[float(j) for j in range(LEVELS)]] * ITEMS
MATTERS = np.array([5.0, 0.1, 1.0, 0.01])  # what layer errors do not say


def loss(levels: Levels) -> float:
    return float(
        sum(m * ERRORS[i][j] for i, (m, j) in enumerate(zip(MATTERS, levels, strict=True)))
    )


def solve(sensitivities: Sensitivities) -> Levels:
    weighted = [[s * e for e in row] for s, row in zip(sensitivities, ERRORS, strict=True)]
    found = solve_levels(weighted, [AMOUNTS], [LIMIT])
    assert found is not None
    return tuple(found)


def found(seed: int = 0, at_most: int = 60):  # type: ignore[no-untyped-def]
    return search(solve, loss, np.ones(ITEMS), np.random.default_rng(seed), at_most)


def test_finds_what_brute_force_finds() -> None:
    every = itertools.product(range(LEVELS), repeat=ITEMS)
    best = min(loss(levels) for levels in every if sum(levels) <= LIMIT)
    assert found().losses[found().levels] == best
    assert loss(solve(np.ones(ITEMS))) > 2 * best


def test_is_repeatable_and_keeps_to_its_evaluations() -> None:
    assert found().levels == found().levels
    calls: list[Levels] = []

    def counted(levels: Levels) -> float:
        calls.append(levels)
        return 1.0

    for most in (1, 7):
        calls.clear()
        search(solve, counted, MATTERS, np.random.default_rng(0), most)
        assert len(calls) == len(set(calls)) <= most


def test_curve_falls_and_ranks_are_in_order() -> None:
    run = found()
    assert list(run.curve) == sorted(run.curve, reverse=True)
    assert run.ranked(1) == [run.levels]
    losses = [run.losses[levels] for levels in run.ranked(5)]
    assert losses == sorted(losses)
