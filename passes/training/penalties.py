"""Penalties that make weights go to zero where zeros become structure, and where they act.

    feed-forward   Σ_u v_u Σ_j |w_uj|,  v_u = 1 / (fraction of u's weights that is alive)
    attention      Σ_i (Σ |w| over all of q, k, v that reads input feature i)^½

The first is preferential attachment (NeuroPrune, arXiv 2404.01306): a unit with few connections
pays more for each, so rows die whole. The second is a group penalty on input features. Both are
found from axis groups and linear sites, in fused, transposed and gated weights too. Their gradients
are v_u sign(w) and sign(w) / (2 (s_i + δ)^½), s_i the sum under the root.

On blocks a connection is a block B of n weights, its strength √n ‖w_B‖ in place of |w| (a group
lasso, whose root of the size makes blocks of unlike size comparable), and a unit is a row of
blocks: |w| is the same of a block of one. The gradient of √n ‖w_B‖ is √n w_B / ‖w_B‖, which moves
all weights of a block to zero together, and 0 at a dead block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from graphprune.axes import AxisGroup, AxisGroups
from graphprune.axes.sites import LinearSite, linear_sites
from graphprune.ir.program import Program
from graphprune.passes.sparsity.sparsity_pattern import Pattern

SINGLE = Pattern("unstructured")
DELTA = 1e-8  # under the root: the slope at a dead group stays finite


@final
@dataclass(frozen=True, slots=True)
class Part:
    """A weight, or some rows and columns of one, seen as [..., units, others].

    Attributes:
        tensor: its name.
        unit_dim: the dimension whose entries are units.
        other_dim: the dimension that a unit's connections run along.
        units: positions along `unit_dim` that belong to it; None for all.
        others: likewise along `other_dim`.
        by_outputs: whether units are the outputs of the matrix, or else its inputs.
    """

    tensor: str
    unit_dim: int
    other_dim: int
    units: tuple[int, ...] | None = None
    others: tuple[int, ...] | None = None
    by_outputs: bool = True

    def oriented(self, pattern: Pattern) -> Pattern:
        """Blocks OUTxIN as blocks of units x others."""
        return pattern if self.by_outputs else pattern.transposed

    def matrix(self, weight: Tensor) -> Tensor:
        """The whole weight as [..., out, in], a view."""
        dims = (self.unit_dim, self.other_dim)
        return weight.movedim(dims if self.by_outputs else dims[::-1], (-2, -1))

    def view(self, weight: Tensor) -> Tensor:
        """The weight as [..., units, others], differentiable."""
        moved = weight.movedim((self.unit_dim, self.other_dim), (-2, -1))
        if self.units is not None:
            moved = moved.index_select(-2, torch.tensor(self.units, device=weight.device))
        if self.others is not None:
            moved = moved.index_select(-1, torch.tensor(self.others, device=weight.device))
        return moved


@final
@dataclass(frozen=True, slots=True)
class Parts:
    """The weights of a program that are regularized.

    Attributes:
        expanding: weights that make neurons; units are neurons.
        contracting: weights that read neurons; units are outputs, or neurons if asked for.
        attention: for each input of an attention, the parts that read it; units are its features.
    """

    expanding: tuple[Part, ...]
    contracting: tuple[Part, ...]
    attention: tuple[tuple[Part, ...], ...]

    @property
    def all(self) -> tuple[Part, ...]:
        """Every part, each once."""
        parts = (*self.expanding, *self.contracting, *(p for ps in self.attention for p in ps))
        return tuple(dict.fromkeys(parts))


def find_parts(groups: AxisGroups, columns: bool = False) -> Parts:
    """The feed-forward and attention weights of a program.

    Args:
        groups: of the program.
        columns: units of contracting weights are neurons (their columns) instead of outputs.
    """
    expanding: dict[Part, None] = {}
    contracting: dict[Part, None] = {}
    attention: dict[tuple[Part, ...], None] = {}
    # Experts share a tensor, which counts once.
    every = [s for entry in groups.program.entries for s in linear_sites(groups, entry)]
    sites = [site for site in every if site.expert in (None, 0) and site.window is None]
    for group in groups.with_role("neuron"):
        for site in sites:
            row, column = site_dims(site)
            made = _positions(groups, [group], site, row)
            if made is not None:
                expanding.setdefault(Part(site.tensor, row, column, units=_or_all(made)))
            read = _positions(groups, [group], site, column)
            if read is not None and columns:
                part = Part(site.tensor, column, row, units=_or_all(read), by_outputs=False)
                contracting.setdefault(part)
            elif read is not None:
                contracting.setdefault(Part(site.tensor, row, column, others=_or_all(read)))
    for members in _attentions(groups, {site.tensor for site in sites}):
        # One attention's query, key and value read one input; in cross-attention there are two.
        inputs: dict[tuple[str, str], dict[Part, None]] = {}
        for site in sites:
            row, column = site_dims(site)
            made = _positions(groups, members, site, row)
            if made is not None:
                part = Part(site.tensor, column, row, others=_or_all(made), by_outputs=False)
                inputs.setdefault((site.entry, site.operand.name), {}).setdefault(part)
        for parts in inputs.values():
            attention.setdefault(tuple(parts))
    return Parts(tuple(expanding), tuple(contracting), tuple(attention))


def connectivity(weight: Tensor, threshold: float, pattern: Pattern = SINGLE) -> Tensor:
    """The fraction of each unit's connections that is alive, at least one of them; [..., units].

    A block is alive where its root mean square is `threshold` or more.
    """
    weight = weight.detach()
    if pattern.is_block:
        weight = _norms(weight, pattern) / _roots(weight, pattern)
    count = weight.shape[-1]
    alive = (weight.abs() >= threshold).sum(-1).to(weight.dtype)
    return (alive / count).clamp_min(1 / count)


def connections(weight: Tensor, pattern: Pattern = SINGLE) -> Tensor:
    """|w|, or √n ‖w‖ of each block of n weights; [..., units, others] or so many blocks."""
    if not pattern.is_block:
        return weight.abs()
    return _norms(weight, pattern) * _roots(weight, pattern)


def attachment_penalty(weight: Tensor, threshold: float, pattern: Pattern = SINGLE) -> Tensor:
    """Return Σ_u v_u Σ_j |w_uj| of [..., units, others]; v is a constant for the gradient.

    On blocks of units x others |w_uj| is a block's strength, and u a row of blocks.
    """
    strengths = connections(weight, pattern).sum(-1)
    return (strengths / connectivity(weight, threshold, pattern)).sum()


def group_penalty(weights: Sequence[Tensor], pattern: Pattern = SINGLE) -> Tensor:
    """Return Σ_i (Σ |w| of unit i in all weights)^½, weights [..., units, others], equal units.

    On blocks of units x others |w| is a block's strength, and i a row of blocks.
    """
    sums = torch.stack([connections(w, pattern).sum(-1) for w in weights]).sum(0)
    return (sums + DELTA).sqrt().sum()


def _norms(weight: Tensor, pattern: Pattern) -> Tensor:
    # Its gradient is 0 where the norm is, not NaN as of a root.
    return torch.linalg.vector_norm(pattern.tiles(weight), dim=(-3, -1))


def _roots(weight: Tensor, pattern: Pattern) -> Tensor:
    """√n of each block of n weights: fewer at the edges."""
    ones = torch.ones(weight.shape[-2:], dtype=weight.dtype, device=weight.device)
    return _norms(ones, pattern)


def views(parts: Sequence[Part], tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The parts that train, seen in these tensors."""
    return [view for _, view in seen(parts, tensors)]


def seen(parts: Sequence[Part], tensors: Mapping[str, Tensor]) -> Iterator[tuple[Part, Tensor]]:
    """The parts that train, each with its view of these tensors."""
    for part in parts:
        if part.tensor in tensors:
            yield part, part.view(tensors[part.tensor])


def degrees(parts: Sequence[Part], program: Program, threshold: float) -> Tensor:
    """How many connections of each unit are alive, float64, all units of all parts in one row."""
    found = [
        (view.abs() >= threshold).sum(-1).flatten().double().cpu()
        for view in views(parts, program.tensors)
    ]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def site_dims(site: LinearSite) -> tuple[int, int]:
    """The dimensions of a site's tensor with output units, and with input features."""
    first = 0 if site.expert is None else 1
    return (first + 1, first) if site.transposed else (first, first + 1)


def _attentions(groups: AxisGroups, weights: Collection[str]) -> list[list[AxisGroup]]:
    """The axes of each attention: heads and dims, as far as they meet in some of these weights.

    Dims count too because one head alone, or keys and values that all heads share, are no axis of
    heads. Of a single head, query and key meet, and value and output.
    """
    found: list[tuple[set[str], list[AxisGroup]]] = []
    for group in groups.with_role("head", "kv_group", "qk_dim", "v_dim"):
        touched = {place.tensor for place in group.occurrences if place.tensor in weights}
        mates = [mate for mate in found if mate[0] & touched]
        joined = (
            touched.union(*(tensors for tensors, _ in mates)),
            [*(g for _, members in mates for g in members), group],
        )
        found = [mate for mate in found if mate not in mates] + [joined]
    return [members for _, members in found]


def _positions(
    groups: AxisGroups, members: Iterable[AxisGroup], site: LinearSite, dim: int
) -> tuple[Tensor, int] | None:
    """Where along a dimension units of these groups are, and how long it is; None if nowhere."""
    units = [groups.units(group, site.tensor, dim) >= 0 for group in members]
    found = torch.stack(units).any(0).nonzero().flatten()
    return (found, len(units[0])) if len(found) else None


def _or_all(positions: tuple[Tensor, int]) -> tuple[int, ...] | None:
    found, size = positions
    return None if len(found) == size else tuple(found.tolist())
