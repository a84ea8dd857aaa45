"""Redundant heads: find those that equal another one, and merge them into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from graphprune.axes import AxisGroup, AxisGroups
from graphprune.axes.sites import consumers, contractions
from graphprune.ir.program import Program
from graphprune.passes.training.penalties import site_dims


@final
@dataclass(frozen=True, slots=True)
class Merge:
    """Heads of one group that go into others.

    Attributes:
        into: for each head, its representative; itself where it stays.
        distances: largest absolute difference of the incoming weights of each pair, [k, k].
    """

    into: tuple[int, ...]
    distances: Tensor

    @property
    def kept(self) -> list[int]:
        return sorted(set(self.into))


def find_dominating(similar: Tensor) -> list[int]:
    """Each node's representative in a similarity graph (NeuroPrune, algorithm 3).

    A node goes to a similar one whose neighborhood contains its own, strictly, or equals it and
    comes later. So a representative is similar to those that it stands for, stands for itself, and
    the kept nodes dominate the graph; a node whose neighborhood no other contains stays.

    Args:
        similar: bool [k, k], symmetric, true on the diagonal.
    """
    table = similar.to(torch.int8)
    found = []
    for i in range(len(table)):
        r = i
        for j in range(len(table)):
            difference = table[r] - table[j]
            contained = not bool((difference == 1).any())
            strictly = bool((difference == -1).any())
            if contained and (strictly or (not bool(difference.any()) and r < j)):
                r = j
        found.append(r)
    return found


def plan_merge(program: Program, groups: AxisGroups, group: AxisGroup, theta: float) -> Merge | str:
    """Which units of a group are redundant; or why it cannot be merged.

    Compared is everything of a unit but what leaves it: rows of query, key and value, their biases,
    a position bias of its own. With theta = 0 these are equal, and merging changes nothing.
    """
    if group.frozen:
        return f"its axis is frozen: {group.frozen[0]}"
    if group.normalized:
        return "its axis is normalized: a unit's output is not simply added"
    sites = {site.node for site, _ in consumers(groups, group) if site.window is None}
    if not sites or any(c.node not in sites for _, c in contractions(groups, group)):
        return "its output is read by something that is no linear layer"
    distances = unit_distances(program, groups, group)
    return Merge(tuple(find_dominating(distances <= theta)), distances)


def unit_distances(program: Program, groups: AxisGroups, group: AxisGroup) -> Tensor:
    """The largest absolute difference of the incoming weights of each pair of units, [k, k]."""
    leaving = {(s.tensor, site_dims(s)[1]) for s, _ in consumers(groups, group)}
    rows = []
    for place in group.occurrences:
        if (place.tensor, place.dim) in leaving:
            continue
        units = groups.units(group, place.tensor, place.dim)
        moved = program.tensors[place.tensor].movedim(place.dim, 0).cpu()
        rows.append(torch.stack([moved[units == u].flatten() for u in range(group.size)]))
    every = torch.cat([r.double() for r in rows], 1)
    return torch.cdist(every, every, p=torch.inf)


def merge_units(
    program: Program, groups: AxisGroups, group: AxisGroup, into: Sequence[int]
) -> Program:
    """Add the outgoing weights of each unit to its representative's, at the old shapes."""
    done = set()
    for site, units in consumers(groups, group):
        if site.name in done:
            continue
        done.add(site.name)
        matrix = site.matrix(program).clone()
        for unit, other in enumerate(into):
            if unit != other:
                here = (units == unit).nonzero().flatten().to(matrix.device)
                there = (units == other).nonzero().flatten().to(matrix.device)
                matrix[:, there] += matrix[:, here]
        program = site.with_matrix(program, matrix)
    return program
