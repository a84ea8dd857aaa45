"""How many units go from where: from scores to the indices that stay.

Counting is the same everywhere: removed = floor(ratio * n + 0.5); at least one unit stays; then the
kept count rounds up to a multiple of `round_to`, at most to n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from graphprune.errors import RecipeError
from graphprune.registry import suggest

Keep = dict[str, Tensor]
Allocation = Callable[[Mapping[str, Tensor], float, int], Keep]


def removed_count(ratio: float, size: int) -> int:
    """How many of `size` units a ratio removes."""
    return math.floor(ratio * size + 0.5)


def kept_count(removed: int, size: int, round_to: int) -> int:
    """How many of `size` units stay when `removed` are to go."""
    kept = max(size - removed, 1)
    return min(math.ceil(kept / round_to) * round_to, size)


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, ascending; of equal scores the first ones."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:count].sort().values


def uniform(scores: Mapping[str, Tensor], ratio: float, round_to: int) -> Keep:
    """The same ratio from every group: the lowest scores of each go."""
    keep = {}
    for group, values in scores.items():
        size = len(values)
        keep[group] = best(values, kept_count(removed_count(ratio, size), size, round_to))
    return keep


def global_ranking(scores: Mapping[str, Tensor], ratio: float, round_to: int) -> Keep:
    """One ranking over all groups; the ratio holds for their units together, not for each group.

    1. Each group's scores are divided by their mean, because norms of wide and narrow layers, or of
       early and late ones, do not compare.
    2. The best unit of each group stays out of the ranking: no group is ever emptied.
    3. The lowest floor(ratio * all units + 0.5) of the others go.
    4. Each group's kept count rounds up to `round_to`, its best removed units coming back.
    """
    names = [name for name, values in scores.items() if len(values)]
    relative = {name: _relative(scores[name]) for name in names}
    protected = {name: int(relative[name].argmax()) for name in names}
    rankable = []
    for name in names:
        ranked = relative[name].clone()
        ranked[protected[name]] = math.inf
        rankable.append(ranked)
    flat = torch.cat(rankable) if rankable else torch.empty(0)
    count = min(removed_count(ratio, len(flat)), len(flat) - len(names))
    gone = torch.zeros(len(flat), dtype=torch.bool)
    # Of equal scores the last ones go, as in `best`, so flip before the stable sort.
    lowest = torch.argsort(flat.flip(0), stable=True)[:count]
    gone[len(flat) - 1 - lowest] = True
    keep = {}
    for name, part in zip(names, torch.split(gone, [len(r) for r in rankable]), strict=True):
        size = len(part)
        keep[name] = best(scores[name], kept_count(int(part.sum()), size, round_to))
    return keep


def _relative(scores: Tensor) -> Tensor:
    wide = scores.double()
    # A group of zeros stays a group of zeros.
    return wide / wide.mean().clamp_min(1e-300)


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
