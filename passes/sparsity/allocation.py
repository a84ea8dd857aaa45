"""How sparse each matrix gets: the same everywhere, by outliers (OWL), or by one ranking of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from graphprune.axes.sites import LinearSite
from graphprune.calibration.stream import Stream
from graphprune.errors import RecipeError
from graphprune.ir.program import Program
from graphprune.passes.sparsity.sparsity_pattern import Pattern, removed_count, removed_mask
from graphprune.pipeline.base import Context
from graphprune.suggest import suggest

ALLOCATIONS = ("uniform", "owl", "global")


@final
@dataclass(frozen=True, slots=True)
class Share:
    """The fraction to remove from one site, and what goes together."""

    sparsity: float
    pattern: Pattern

    def zeroed(self, weight: Tensor, scores: Tensor, *, per_row: bool = False) -> Tensor:
        """A weight [out, in] without the units of lowest scores [out, in]; see `removed_mask`."""
        return weight.masked_fill(removed_mask(scores, self.sparsity, self.pattern, per_row), 0)


def check_allocation(name: object, known: Sequence[str] = ALLOCATIONS) -> None:
    """Raise RecipeError for an unknown allocation."""
    if name not in known:
        raise RecipeError(f"there is no allocation {name!r}; {suggest(str(name), known)}")


def global_shares(
    program: Program,
    sites: Sequence[LinearSite],
    asked: Share,
    norms: Mapping[str, Tensor] | None,
) -> dict[str, Share]:
    """Distribute a sparsity by one ranking of all sites' units, by |w| or by |w| · ‖x‖.

    Args:
        norms: site name -> L2 norm of each input feature, [in]; None to rank by |w|.
    """
    scores = {}
    for site in sites:
        score = site.matrix(program).abs().float()
        if norms is not None:
            if not bool(norms[site.name].any()):
                continue  # no row reaches it: nothing to rank it by
            # Layers compare only relative to themselves: their inputs have scales of their own.
            score = score * norms[site.name].float()
            score = score / score.mean().clamp_min(1e-30)
        scores[site.name] = asked.pattern.units(score)
    shares = {site.name: asked for site in sites}
    found = global_sparsities(scores, asked.sparsity)
    return shares | {name: Share(part, asked.pattern) for name, part in found.items()}


def owl_shares(
    program: Program,
    sites: Sequence[LinearSite],
    asked: Share,
    norms: Mapping[str, Tensor],
    *,
    threshold: float,
    spread: float,
) -> dict[str, Share]:
    """Distribute a sparsity so that blocks with many outliers lose less (OWL).

    Args:
        norms: site name -> L2 norm of each input feature, [in].
        threshold: how many times the mean score makes an outlier.
        spread: half of the range of the blocks' densities; with n:m, weights of each m.
    """
    members: dict[str, list[LinearSite]] = {}
    blocks = blocks_of([site.tensor for site in sites])
    for site in sites:
        members.setdefault(blocks[site.tensor], []).append(site)
    ratios, sizes = {}, {}
    for block, inside in members.items():
        scores = [s.matrix(program).abs().float() * norms[s.name].float() for s in inside]
        ratios[block] = outlier_ratio(scores, threshold)
        sizes[block] = sum(s.numel() for s in scores)
    pattern, mean = asked.pattern, asked.sparsity
    offsets = owl_offsets(ratios, sizes, spread / 2 if pattern.of else spread)
    parts = within_bounds({b: mean - offset for b, offset in offsets.items()}, sizes, mean)
    shares: dict[str, Share] = {}
    for block, offset in offsets.items():
        share = Share(parts[block], pattern)
        if pattern.of:
            keep = min(max(pattern.keep + round(offset), 1), pattern.of)
            kept = Pattern(f"{keep}:{pattern.of}", 1, 1, keep, pattern.of)
            share = Share(1 - keep / pattern.of, kept)
        shares |= {site.name: share for site in members[block]}
    return shares


def input_norms(program: Program, sites: Sequence[LinearSite], ctx: Context) -> dict[str, Tensor]:
    """Measure the L2 norm of every input feature of every site of the dense model, float64 [in].

    Raises:
        RecipeError: there is no calibration.
    """
    squares = {s.name: torch.zeros(s.matrix(program).shape[1], dtype=torch.float64) for s in sites}

    def observe(site: LinearSite, rows: Tensor) -> None:
        squares[site.name] += rows.float().square().sum(0)

    Stream(program, ctx.batches()).collect(
        program,
        sites,
        observe,
        lambda done, total: ctx.progress(done, total, "batches for the allocation"),
    )
    return {name: total.sqrt() for name, total in squares.items()}


def blocks_of(tensors: Sequence[str]) -> dict[str, str]:
    """The repeated part of a model that each tensor is in: its name up to the number that counts.

    "model.layers.3.mlp.up.weight" is in "model.layers.3". A number that is the same for all with
    the same beginning, as the 0 of a container of one, does not count; a name without one that does
    is a block of its own.
    """
    values: dict[str, set[str]] = {}
    for name in tensors:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                values.setdefault(".".join(parts[:i]), set()).add(part)
    found = {}
    for name in tensors:
        parts = name.split(".")
        ends = [
            i + 1
            for i, part in enumerate(parts)
            if part.isdigit() and len(values[".".join(parts[:i])]) > 1
        ]
        found[name] = ".".join(parts[: ends[0]]) if ends else name
    return found


def outlier_ratio(scores: Sequence[Tensor], threshold: float) -> float:
    """Percentage of scores above `threshold` times the mean of all of them (OWL's D)."""
    count = sum(s.numel() for s in scores)
    mean = sum(float(s.sum(dtype=torch.float64)) for s in scores) / max(count, 1)
    return 100 * sum(int((s > threshold * mean).sum()) for s in scores) / max(count, 1)


def owl_offsets(
    ratios: Mapping[str, float], sizes: Mapping[str, int], spread: float
) -> dict[str, float]:
    """How far each block's density is above the mean (OWL, arXiv 2310.05175).

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


def within_bounds(
    parts: Mapping[str, float], sizes: Mapping[str, int], mean: float
) -> dict[str, float]:
    """Fractions in [0.01, 0.99], shifted by one amount until their mean by size is as asked."""
    low, high = min(0.01, mean), max(0.99, mean)
    total = sum(sizes.values())

    def shifted(by: float) -> dict[str, float]:
        return {name: min(max(part + by, low), high) for name, part in parts.items()}

    def excess(by: float) -> float:
        return sum(part * sizes[name] for name, part in shifted(by).items()) / total - mean

    below, above = -2.0, 2.0
    for _ in range(60):
        middle = (below + above) / 2
        below, above = (middle, above) if excess(middle) < 0 else (below, middle)
    return shifted((below + above) / 2)


def global_sparsities(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """The fraction of each matrix that lies among the lowest `sparsity` of all scores.

    Args:
        scores: of each matrix's units, any shape; comparable with each other.
        sparsity: fraction of all units to remove.
    """
    flats = {name: s.flatten().to(torch.float32, copy=True) for name, s in scores.items()}
    for values in flats.values():
        values[values.argmax()] = torch.inf  # the best of each matrix stays in any case
    flat = torch.cat(list(flats.values()))
    count = min(removed_count(sparsity, len(flat)), len(flat) - len(flats))
    if count == 0:
        return dict.fromkeys(scores, 0.0)
    limit = float(flat.kthvalue(count).values)
    below = {name: int((values < limit).sum()) for name, values in flats.items()}
    # Of those equal to the limit so many go that the sum is exact, first come first.
    left = count - sum(below.values())
    for name, values in flats.items():
        more = min(left, int((values == limit).sum()))
        below[name] += more
        left -= more
    return {name: below[name] / s.numel() for name, s in scores.items()}
