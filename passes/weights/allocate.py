"""How sparse each matrix gets: the same everywhere, by outliers (OWL), or by one ranking of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphprune.errors import RecipeError
from graphprune.registry import suggest

ALLOCATIONS = ("uniform", "owl", "global")


def check_allocation(name: str) -> None:
    """Raise RecipeError for an unknown allocation."""
    if name not in ALLOCATIONS:
        raise RecipeError(f"there is no allocation {name!r}; {suggest(name, ALLOCATIONS)}")


def block_of(tensor: str) -> str:
    """The repeated part of a model that a tensor is in: its name up to the first number.

    "model.layers.3.mlp.up.weight" is in "model.layers.3"; a name without a number is its own.
    """
    parts = tensor.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return tensor


def outlier_ratio(scores: Sequence[Tensor], threshold: float) -> float:
    """Percentage of scores above `threshold` times the mean of all of them (OWL's D)."""
    count = sum(s.numel() for s in scores)
    mean = sum(float(s.sum(dtype=torch.float64)) for s in scores) / max(count, 1)
    return 100 * sum(int((s > threshold * mean).sum()) for s in scores) / max(count, 1)


def owl_offsets(
    ratios: Mapping[str, float], sizes: Mapping[str, int], spread: float
) -> dict[str, float]:
    """What each block's density is above the mean (OWL, arXiv 2310.05175).

    2 · spread · (D - min D) / (max D - min D), less its mean weighted by size, so that the whole
    keeps the density asked for. All zero where every block has the same ratio.

    Args:
        ratios: each block's outlier ratio.
        sizes: each block's weights.
        spread: half of the range of densities.
    """
    low, high = min(ratios.values()), max(ratios.values())
    if high == low:
        return dict.fromkeys(ratios, 0.0)
    raised = {name: 2 * spread * (ratio - low) / (high - low) for name, ratio in ratios.items()}
    mean = sum(raised[name] * sizes[name] for name in raised) / sum(sizes.values())
    return {name: value - mean for name, value in raised.items()}


def global_sparsities(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """What part of each matrix lies among the lowest `sparsity` of all scores.

    Args:
        scores: of each matrix's units, any shape; comparable with each other.
        sparsity: part of all units to remove.
    """
    flat = torch.cat([s.flatten().float() for s in scores.values()])
    count = int(sparsity * len(flat) + 0.5)
    if count == 0:
        return dict.fromkeys(scores, 0.0)
    limit = float(flat.kthvalue(count).values)
    below = {name: int((s.float() < limit).sum()) for name, s in scores.items()}
    # Of those equal to the limit so many go that the sum is exact, first come first.
    left = count - sum(below.values())
    for name, s in scores.items():
        more = min(left, int((s.float() == limit).sum()))
        below[name] += more
        left -= more
    return {name: below[name] / s.numel() for name, s in scores.items()}
