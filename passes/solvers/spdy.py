"""SPDY's search: the levels with the least loss of the whole model, within a budget.

Item l has levels j with errors e[l][j], of the layer alone, and costs that a solver keeps within
the budget. The loss F of the model is not the sum of these errors: some layers matter more. With a
sensitivity g[l] >= 0 for each item,

    j(g) = argmin Σ g[l] e[l][j(l)]    within the budget          (`knapsack`)
    min over g of F(j(g))                                         (here)

The second problem has few variables, and no gradient, since j(g) is a step function: it is searched
at random, then by changing ever fewer entries of the best g (SPDY, arXiv 2201.13096, section 3.2:
from a tenth of them down to one, 100 attempts without success each). Scaling g changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import final

import numpy as np
import numpy.typing as npt

Levels = tuple[int, ...]
Sensitivities = npt.NDArray[np.float64]

RANDOM = 0.4  # fraction of the evaluations that go to random sensitivities


@final
@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search.

    Attributes:
        levels: of each item, the best.
        sensitivities: that chose them.
        losses: of all that was tried, by levels.
        curve: the lowest loss after each evaluation.
    """

    levels: Levels
    sensitivities: Sensitivities
    losses: Mapping[Levels, float]
    curve: tuple[float, ...]

    def ranked(self, count: int) -> list[Levels]:
        """The best levels that were tried, the best one first."""
        return sorted(self.losses, key=lambda levels: self.losses[levels])[:count]


def search(
    solve: Callable[[Sensitivities], Levels],
    evaluate: Callable[[Levels], float],
    prior: npt.ArrayLike,
    generator: np.random.Generator,
    at_most: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """Search sensitivities: the prior, random ones, then ever fewer entries of the best changed.

    Args:
        solve: the levels of least weighted error that keep the budget.
        evaluate: the model's loss at these levels; called once for each.
        prior: a first guess at each item's sensitivity, above 0.
        generator: of the random numbers.
        at_most: evaluations.
        progress: called with (done, total) evaluations.
    """
    work = _Search(solve, evaluate, at_most, progress)
    guess = np.asarray(prior, dtype=np.float64)
    for sensitivities in (guess, np.ones_like(guess), np.sqrt(guess)):
        work.improves(sensitivities)
    count = math.ceil(RANDOM * at_most)
    for i in range(4 * count):  # many sensitivities choose the same levels
        if len(work.losses) >= count:
            break
        drawn = generator.uniform(size=guess.shape)
        # Alternately uniform, as the paper does, and uniform times the prior.
        work.improves(drawn if i % 2 else drawn * guess)
    changed = max(1, round(0.1 * len(guess)))
    for several in range(changed, 0, -1):
        misses = 0
        while misses < 100 and len(work.losses) < at_most:
            tried = work.best.copy()
            at = generator.choice(len(guess), several, replace=False)
            # Only ratios count: the largest entry sets the scale.
            tried[at] = generator.uniform(size=several) * tried.max()
            misses = 0 if work.improves(tried) else misses + 1
    progress(at_most, at_most)
    return Found(work.levels, work.best, work.losses, tuple(work.curve))


@final
@dataclass(slots=True)
class _Search:
    """How far a search is."""

    solve: Callable[[Sensitivities], Levels]
    evaluate: Callable[[Levels], float]
    at_most: int
    progress: Callable[[int, int], None]
    best: Sensitivities = field(default_factory=lambda: np.zeros(0))
    levels: Levels = ()
    losses: dict[Levels, float] = field(default_factory=dict)
    curve: list[float] = field(default_factory=list)

    def improves(self, sensitivities: Sensitivities) -> bool:
        """Try sensitivities; whether what they choose is better than all before."""
        levels = self.solve(sensitivities)
        if levels in self.losses or len(self.losses) >= self.at_most:
            return False
        lowest = self.losses.get(self.levels, math.inf)
        self.losses[levels] = loss = self.evaluate(levels)
        better = loss < lowest or not self.levels
        if better:
            self.best, self.levels = sensitivities, levels
        self.curve.append(min(loss, lowest))
        self.progress(len(self.losses), self.at_most)
        return better
