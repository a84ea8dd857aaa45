"""The choices of a budget: for each part of a model, how many units stay, or that it goes.

With zero blocks, also how many of the blocks in what stays are zero.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

from graphprune.axes import AxisGroup, AxisGroups
from graphprune.axes.branches import Branch
from graphprune.passes.structural.statistics import in_execution_order

# Neighboring levels differ by this factor, and small groups have a level for each unit.
STEP = 0.87
EACH = 16

# Fractions of zero blocks, for every `EVERY`-th number of units: between them the table would be
# measured at more points than noise tells apart.
ZEROS = (0.3, 0.5, 0.7)
EVERY = 2


@final
@dataclass(frozen=True, slots=True, order=True)
class Kept:
    """What stays of an item.

    Attributes:
        units: that stay, of each of its groups.
        zeros: the fraction of blocks that are zero in the products of what stays.
    """

    units: tuple[int, ...]
    zeros: float = 0.0

    @property
    def text(self) -> str:
        """As a name: "8", "8 at 50% zeros"."""
        units = "+".join(map(str, self.units)) or "all"
        return f"{units} at {self.zeros:.0%} zeros" if self.zeros else units


Level = Kept | None
"""What stays of an item; None where the whole branch goes."""


@final
@dataclass(frozen=True, slots=True)
class Item:
    """One choice: groups that are cut in the same proportion, and the branch around them.

    Attributes:
        id: the branch's, or the first group's.
        kind: the branch's, or the first group's role.
        groups: with the units to cut; none where the branch can only stay or go.
        branch: the branch around them; None where they are in none, or in several.
        levels: from the least to all there is; the first is None where the branch may go. Those
            with zero blocks come before those without.
        sparse: names of the weights that have them.
    """

    id: str
    kind: str
    groups: tuple[AxisGroup, ...]
    branch: Branch | None
    levels: tuple[Level, ...]
    sparse: tuple[str, ...] = ()

    @property
    def dense(self) -> int:
        """The level at which all stays."""
        return len(self.levels) - 1

    @property
    def whole(self) -> list[int]:
        """The levels without zero blocks at which something stays, the least first."""
        return [j for j, level in enumerate(self.levels) if level is not None and not level.zeros]


def find_items(
    groups: AxisGroups,
    usable: Sequence[AxisGroup],
    branches: Sequence[Branch],
    *,
    droppable: Collection[str],
    round_to: int,
    sparse: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> list[Item]:
    """The items of a program, in execution order of their groups.

    1. Groups that lie in one branch alone belong to it, and are cut in the same proportion.
    2. A group that several branches share, or that lies in none, is an item of its own.
    3. A branch without such groups can only stay or go.

    Args:
        groups: of the program.
        usable: those that may be cut.
        branches: that items may have.
        droppable: ids of those that may go.
        round_to: large groups keep multiples of this many units.
        sparse: by branch, names of the weights whose blocks may be zero.
    """
    ordered = in_execution_order(groups, usable)
    owner = {g.id: _branch_of(g, groups, branches) for g in ordered}
    place = {g.id: i for i, g in enumerate(ordered)}
    found: list[tuple[float, Item]] = []
    last = -1.0
    for branch in branches:
        mine = tuple(g for g in ordered if owner[g.id] is branch)
        if mine or branch.id in droppable:
            gone: list[Level] = [None] if branch.id in droppable else []
            whole = _levels(mine, round_to)
            weights = tuple(sparse.get(branch.id, ()))
            zeros = _with_zeros(whole) if weights else []
            choice = (*gone, *zeros, *whole)
            last = float(place[mine[0].id]) if mine else last + 1e-6
            found.append((last, Item(branch.id, branch.kind, mine, branch, choice, weights)))
    for g in ordered:
        if owner[g.id] is None:
            levels = tuple(_levels((g,), round_to))
            found.append((place[g.id], Item(g.id, g.role, (g,), None, levels)))
    return [item for _, item in sorted(found, key=lambda pair: pair[0]) if len(item.levels) > 1]


def _branch_of(group: AxisGroup, groups: AxisGroups, branches: Sequence[Branch]) -> Branch | None:
    """The branch that has all of a group's parameters for itself."""
    names = {name for name in group.tensors if name in groups.program.parameters}
    return next((b for b in branches if names and names <= b.tensors), None)


def _with_zeros(whole: Sequence[Kept]) -> list[Kept]:
    """Some of these levels with zero blocks, from the least to all units."""
    some = whole[::-1][::EVERY][::-1]
    return [Kept(level.units, zeros) for zeros in reversed(ZEROS) for level in some]


def _levels(groups: Sequence[AxisGroup], round_to: int) -> list[Kept]:
    """Units that stay of each group, ascending, the last one all; one level without groups."""
    if not groups:
        return [Kept(())]
    widest = max(g.size for g in groups)
    if widest <= EACH:
        fractions = [(k + 1) / widest for k in range(widest)]
    else:
        steps = math.ceil(math.log(min(round_to, widest) / widest) / math.log(STEP))
        fractions = [STEP**k for k in range(steps, -1, -1)]
    levels = {Kept(tuple(_kept(g.size, f, round_to) for g in groups)) for f in fractions}
    return sorted(levels)


def _kept(size: int, fraction: float, round_to: int) -> int:
    """At least one unit; of a large group a multiple of `round_to`."""
    kept = max(1, round(fraction * size))
    if size <= EACH:
        return kept
    return min(size, max(round_to, round(kept / round_to) * round_to))
