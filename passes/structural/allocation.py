"""How many units go from where: from scores to the indices that stay.

Counting is the same everywhere: removed = floor(ratio * n + 0.5); at least one unit stays; then the
kept count rounds up to a multiple of `round_to`, at most to n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphprune.errors import RecipeError
from graphprune.suggest import suggest

Keep = dict[str, Tensor]


def units_to_remove(ratio: float, size: float) -> int:
    """How many of `size` units a ratio removes."""
    return math.floor(ratio * size + 0.5)


def kept_count(removed: int, size: float, round_to: int) -> int:
    """How many of `size` units stay when `removed` are to go."""
    kept = max(size - removed, 1)
    return min(math.ceil(kept / round_to) * round_to, math.ceil(size))


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, ascending; of equal scores the first ones."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:count].sort().values


def others(size: int, gone: Tensor) -> Tensor:
    """Indices below `size` that are not among those that go, ascending."""
    stays = torch.ones(size, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero().flatten()


@dataclass(frozen=True, slots=True)
class Wanted:
    """How much is to go.

    Attributes:
        ratio: the fraction to remove: of each group, or of all groups' parameters together.
        round_to: the kept count rounds up to a multiple of this.
        steps: the same by group, where it is another number than `round_to`.
        floor: fraction of each group's units that stays whatever the ranking says.
        costs: parameters that go with one unit, by group; equal where none is given.
        sizes: units that `ratio` and `floor` are fractions of, by group: those in the dense model,
            so that units gone already count as removed. By default the current units. Not a whole
            number where another factor of the group's channels has lost some.
    """

    ratio: float
    round_to: int = 1
    floor: float = 0.0
    costs: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, float] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)

    def step(self, group: str) -> int:
        """Return what a group's kept count rounds up to a multiple of."""
        return self.steps.get(group, self.round_to)

    def kept(self, group: str, size: int) -> int:
        """How many of a group's `size` units stay if the ratio is each group's own."""
        whole = self.sizes.get(group, size)
        return min(kept_count(units_to_remove(self.ratio, whole), whole, self.step(group)), size)


def uniform(scores: Mapping[str, Tensor], wanted: Wanted) -> Keep:
    """The same ratio from every group: the lowest scores of each go."""
    return {
        group: best(values, wanted.kept(group, len(values))) for group, values in scores.items()
    }


def global_ranking(scores: Mapping[str, Tensor], wanted: Wanted) -> Keep:
    """One ranking over all groups; the ratio holds for their parameters together.

    1. Each group's scores are divided by their mean, because norms of wide and narrow layers, or of
       early and late ones, do not compare; then by the unit's cost.
    2. The best units of each group, one at least and the `floor`, stay out of the ranking.
    3. The lowest of the others go, as many as take the ratio of all parameters.
    4. Each group's kept count rounds up to `round_to`, its best removed units coming back.
    """
    names = [name for name, values in scores.items() if len(values)]
    if not names:
        return {}
    sizes = [len(scores[name]) for name in names]
    costs = torch.cat(
        [
            torch.full((n,), float(wanted.costs.get(name, 1)), dtype=torch.float64).clamp_min(1)
            for name, n in zip(names, sizes, strict=True)
        ]
    )
    flat = torch.cat([_relative(scores[name]) for name in names])
    flat = flat / (costs / costs.mean())
    whole = [wanted.sizes.get(name, n) for name, n in zip(names, sizes, strict=True)]
    protected = [
        _protected(scores[name], math.ceil(wanted.floor * n))
        for name, n in zip(names, whole, strict=True)
    ]
    flat[torch.cat(protected)] = math.inf
    # Of equal scores the last ones go, as in `best`, so flip before the stable sort.
    order = len(flat) - 1 - torch.argsort(flat.flip(0), stable=True)
    order = order[flat[order].isfinite()]
    # In units of mean cost, so that equal costs count units.
    mean = float(costs.mean())
    gone_before = sum(
        (n - len(scores[name])) * max(wanted.costs.get(name, 1), 1)
        for name, n in zip(names, whole, strict=True)
    )
    every = len(flat) + gone_before / mean
    budget = math.floor(wanted.ratio * every + 0.5) * mean - gone_before
    gone = torch.zeros(len(flat), dtype=torch.bool)
    gone[order[costs[order].cumsum(0) <= budget * (1 + 1e-12)]] = True
    keep = {}
    for name, part in zip(names, torch.split(gone, sizes), strict=True):
        size = len(part)
        keep[name] = best(scores[name], kept_count(int(part.sum()), size, wanted.step(name)))
    return keep


def _protected(scores: Tensor, count: int) -> Tensor:
    """Whether each unit is among the best that always stay, one at least; bool [size]."""
    stays = torch.zeros(len(scores), dtype=torch.bool)
    stays[best(scores, max(1, count))] = True
    return stays


def _relative(scores: Tensor) -> Tensor:
    wide = scores.double()
    # A group of zeros stays a group of zeros.
    return wide / wide.mean().clamp_min(1e-300)


Allocation = Callable[[Mapping[str, Tensor], Wanted], Keep]
# name -> function. Another allocation is one function and one line here.
ALLOCATIONS: dict[str, Allocation] = {"uniform": uniform, "global": global_ranking}


def allocation_named(name: str) -> Allocation:
    """The allocation of this name.

    Raises:
        RecipeError: there is none; near matches are named.
    """
    if name not in ALLOCATIONS:
        raise RecipeError(f"there is no allocation {name!r}; {suggest(name, ALLOCATIONS)}")
    return ALLOCATIONS[name]
