"""Units that compete while a model trains: where they are, what they cost, which go first.

    neuron, head    one unit for each index of the axis
    dims of heads   one for each index under each head: the r-th weakest of every head go together
    sublayer        a residual branch with all that is left of it

Heads then keep equally many dims, each its own ones: where no tensor is shared between heads, the
order of positions inside a head is free (GRAIN's ragged heads, arXiv 2212.07634).

Scores are slopes. With a gate ξ on unit u of what a weight w [out, in] reads, y = Σ_u w_:u ξ_u x_u,

    dL/dξ_u at ξ = 1  =  Σ dL/dy · w_:u x_u  =  Σ_o w_ou g_ou,    g = dL/dw = Σ dL/dy xᵀ

so the gradients of plain training give them: sums of g·w over a unit's columns.

Costs count parameters once, however many units they belong to. In a tensor whose dimension d keeps
n_d of its N_d positions, m_d of which belong to no unit, Π n_d - Π m_d parameters of units live; a
removal that leaves n'_d frees Π n_d - Π n'_d, times the price of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from graphprune.axes import AxisGroup, AxisGroups
from graphprune.axes.sites import consumers, contractions
from graphprune.ir.program import Program
from graphprune.passes.training.penalties import site_dims

HEADS = ("head", "kv_group")
DIMS = ("qk_dim", "v_dim")


@final
@dataclass(frozen=True, slots=True)
class Place:
    """A dimension of a tensor with units along it.

    Attributes:
        tensor: its name.
        dim: the dimension.
        units: for each position its unit, or -1; int64.
    """

    tensor: str
    dim: int
    units: Tensor = field(repr=False, compare=False)

    def marked(self, chosen: Tensor) -> Tensor:
        """Which positions are of chosen units; from bool [units] to bool [positions]."""
        return torch.cat([chosen, chosen.new_zeros(1)])[self.units]  # -1 is the last one


@final
@dataclass(frozen=True, slots=True)
class Units:
    """The units of an axis group.

    Attributes:
        id: of the group.
        role: of the group.
        heads: id of the group of heads under which each has its own units; None where not.
        rows: number of heads, or 1.
        size: units of each; unit u of head h is number h · size + u.
        places: everything that goes with a unit.
        read: where Σ g·w is taken, each once.
        share: factor of that sum: 0.5 where two places give the same derivative.
        values: whether they are what a head gives, so that its density counts.
    """

    id: str
    role: str
    heads: str | None
    rows: int
    size: int
    places: tuple[Place, ...]
    read: tuple[Place, ...]
    share: float
    values: bool

    def slopes(self, sums: Mapping[tuple[str, int], Tensor]) -> Tensor:
        """Σ g·w of each unit, from the sums at each position; float64 [rows, size].

        1. Over what reads a unit it is the derivative of the loss by a gate on it (Michel et al.,
           arXiv 1905.10650, for heads; likewise for neurons and value dims).
        2. A query/key dim r has a gate on the product q_r k_r. Its derivative is Σ dL/dq_r q_r,
           which is Σ g·w over the query's rows and bias, and likewise over the key's: half of both
           needs not know which is which. Where value dims are the same axis, their rows and the
           output's columns each give the derivative of a gate on the value, and half of all is the
           sum of both gates' derivatives.

        Args:
            sums: Σ g·w at each position, by tensor and dimension; from `position_sums`.
        """
        found = torch.zeros(self.rows * self.size + 1, dtype=torch.float64)
        for place in self.read:
            if (place.tensor, place.dim) in sums:
                units = place.units % len(found)  # -1 goes to the last one
                found.index_add_(0, units, sums[place.tensor, place.dim])
        return self.share * found[:-1].view(self.rows, self.size)


@final
@dataclass(frozen=True, slots=True)
class Sublayer:
    """A residual branch that may go as a whole: what it gives is zero once its tensors are.

    Attributes:
        id: of the branch.
        tensors: parameters that only the branch reads.
        base: what goes with the last of it, beside its units' parameters, at their prices.
    """

    id: str
    tensors: frozenset[str]
    base: float


def find_units(groups: AxisGroups, group: AxisGroup) -> Units | str:
    """The units of a group that may go while a model trains; or why they may not."""
    products = [site for site, _ in consumers(groups, group) if site.window is None]
    columns = {(site.tensor, site_dims(site)[1]) for site in products}
    sites = {site.node for site in products}
    is_dim = group.role in DIMS
    if not is_dim and any(c.node not in sites for _, c in contractions(groups, group)):
        return "its output is read by something that is no linear layer"
    if not columns and group.role != "qk_dim":
        return "no linear layer reads it"
    heads = _heads_above(groups, group) if is_dim else None
    rows = 1 if heads is None else heads.size
    places = []
    for o in group.occurrences:
        units = groups.units(group, o.tensor, o.dim)
        if heads is not None:
            above = groups.units(heads, o.tensor, o.dim)
            units = torch.where(units >= 0, above * group.size + units, -1)
        places.append(Place(o.tensor, o.dim, units))
    read = [p for p in places if group.role == "qk_dim" or (p.tensor, p.dim) in columns]
    return Units(
        group.id,
        group.role,
        None if heads is None else heads.id,
        rows,
        group.size,
        tuple(places),
        tuple(read),
        0.5 if group.role == "qk_dim" else 1.0,
        is_dim and bool(columns),
    )


def _heads_above(groups: AxisGroups, group: AxisGroup) -> AxisGroup | None:
    """The heads that each have all of a group's units for themselves, in every tensor."""
    for heads in groups.with_role(*HEADS):
        if all(
            bool((groups.units(heads, o.tensor, o.dim)[inside] >= 0).all())
            for o in group.occurrences
            for inside in [groups.units(group, o.tensor, o.dim) >= 0]
        ):
            return heads
    return None


def position_sums(
    units: Sequence[Units], parameters: Mapping[str, nn.Parameter]
) -> dict[tuple[str, int], Tensor]:
    """Sum g·w, gradient times weight, at each position of each dimension that is read.

    Returns:
        By tensor and dimension, float64 [size of the dimension] on the CPU. Parameters without a
        gradient are left out.
    """
    found: dict[tuple[str, int], Tensor] = {}
    for place in (p for u in units for p in u.read):
        parameter = parameters.get(place.tensor)
        key = place.tensor, place.dim
        if key in found or parameter is None or parameter.grad is None:
            continue
        product = parameter.grad * parameter.detach()
        others = [d for d in range(product.dim()) if d != place.dim]
        found[key] = (product.sum(others) if others else product).double().cpu()
    return found


Removal = Sequence[tuple[Units, Tensor]]
"""Units that go together: bool [rows · size] of each axis."""


@final
class Ledger:
    """Which units are gone, and how many parameters with them, each counted once.

    With prices it counts in these instead, milliseconds for example, and sublayers compete too.

    Attributes:
        units: by group id.
        sublayers: by id of the branch.
        gone: by group id, bool [rows, size].
        dropped: ids of the sublayers that are gone.
        counts: by tensor, how many of its parameters belong to any unit.
        total: what all units and sublayers cost.
        removed: what those of them cost that are gone.
        limit: what may be gone in the end; a sublayer that costs too much for that is not waited
            for.
        must: ids of sublayers that go first, and at once: without them the limit is out of reach.
    """

    def __init__(
        self,
        program: Program,
        units: Sequence[Units],
        prices: Mapping[str, float] | None = None,
        sublayers: Sequence[Sublayer] = (),
    ) -> None:
        self.units = {u.id: u for u in units}
        self.sublayers = {s.id: s for s in sublayers}
        self.prices = prices
        self.gone = {u.id: torch.zeros(u.rows, u.size, dtype=torch.bool) for u in units}
        self.dropped: list[str] = []
        names = {p.tensor for u in units for p in u.places if p.tensor in program.parameters}
        self._alive = {
            name: [torch.ones(n, dtype=torch.bool) for n in program.tensors[name].shape]
            for name in sorted(names)
        }
        self._inside = {
            u.id: s.id
            for u in units
            for s in sublayers
            if (mine := {p.tensor for p in u.places} & names) and mine <= s.tensors
        }
        every = [(u, torch.ones(u.rows * u.size, dtype=torch.bool)) for u in units]
        self._rest = dict.fromkeys(self._alive, 0)  # parameters of no unit, Π m_d
        rest = {name: math.prod(_counts(dims)) for name, dims in self._without(every).items()}
        self.counts = {n: math.prod(_counts(self._alive[n])) - rest[n] for n in self._alive}
        self._rest = rest
        self.total = self._cost(every) + sum(s.base for s in sublayers)
        self.removed: float = 0
        self.limit = math.inf
        self.must: Sequence[str] = ()

    @property
    def density(self) -> float:
        """The fraction of the cost of all units that is left."""
        return 1 - self.removed / self.total

    def drain(self) -> Ledger:
        """Of a new ledger: let all units go but the first of each axis, and of each head."""
        chosen = {name: torch.ones_like(gone) for name, gone in self.gone.items()}
        for units in chosen.values():
            units[:, 0] = False
        self.load(chosen)
        return self

    def load(self, gone: Mapping[str, Tensor], dropped: Sequence[str] = ()) -> None:
        """Take these as gone, by group id, and these sublayers."""
        self._remove([(self.units[name], chosen.flatten().cpu()) for name, chosen in gone.items()])
        for name in dropped:
            self._remove([], self.sublayers[name])
        self._settle()

    def remove(self, scores: Mapping[str, Tensor], budget: float, *, fill: bool = False) -> bool:
        """Let the units with the lowest score for their cost go, until the next one costs too much.

        Waiting for that one, instead of going on to cheaper ones, gives large units their turn. The
        last unit of an axis, and the last dim of a head, stay, but in a sublayer that goes.

        Args:
            scores: by group id, [rows, size].
            budget: what may be gone, all together.
            fill: there is no later turn: go on to cheaper ones until none fits.

        Returns:
            Whether any went.
        """
        if budget <= self.removed:
            return False
        before = self.removed
        for name in self.must:
            if name not in self.dropped:
                self._remove([], self.sublayers[name])
        ranked = [(u, *self._ranked(u, scores[u.id])) for u in self.units.values()]
        whole = self._sublayers_ranked(scores)
        values = [*(value for _, value, _ in ranked), *(value for _, value in whole)]
        lengths = torch.tensor([len(value) for value in values])
        owners = torch.repeat_interleave(torch.arange(len(values)), lengths)
        ranks = torch.cat([torch.arange(len(value)) for value in values])
        too_dear: set[str] = set()
        for position in torch.argsort(torch.cat(values), stable=True):
            owner, k = int(owners[position]), int(ranks[position])
            removal: Removal = []
            sublayer = None
            if owner < len(ranked):
                unit, _, numbers = ranked[owner]
                if unit.id in too_dear or self._inside.get(unit.id) in self.dropped:
                    continue
                removal, name = [(unit, self._chosen(unit, numbers[:, k]))], unit.id
            else:
                sublayer, _ = whole[owner - len(ranked)]
                name = sublayer.id
            cost = self._cost(removal, sublayer)
            if self.removed + cost <= budget:
                self._remove(removal, sublayer)
            elif fill:
                # For good: a later removal makes it cheaper by at most what it takes of the budget.
                # The other units of its axis cost the same.
                too_dear.add(name)
            elif sublayer is None or self.removed + cost <= self.limit:
                break
        self._settle()
        return self.removed > before

    def required(self, limit: float) -> list[str]:
        """Sublayers of a drained ledger without which what is gone stays below a limit."""
        costs = {s.id: self._cost([], s) for s in self.sublayers.values()}
        most = self.removed + sum(costs.values())
        return [name for name, cost in costs.items() if most - cost < limit]

    def meet(self, scores: Mapping[str, Tensor], budget: float) -> bool:
        """Let one more go where less than the budget is gone: the weakest that is enough.

        Returns:
            Whether any went.
        """
        before = self.removed
        while self.removed < budget:
            found: list[tuple[bool, float, Removal, Sublayer | None]] = []
            missing = budget - self.removed
            for unit in self.units.values():
                values, numbers = self._ranked(unit, scores[unit.id])
                if len(values):
                    removal = [(unit, self._chosen(unit, numbers[:, 0]))]
                    cost = self._cost(removal)
                    found.append((cost < missing, float(values[0]) * cost, removal, None))
            for sublayer, value in self._sublayers_ranked(scores):
                cost = self._cost([], sublayer)
                found.append((cost < missing, float(value) * cost, [], sublayer))
            if not found:
                break
            _, _, chosen, last = min(found, key=lambda each: each[:2])
            self._remove(chosen, last)
        self._settle()
        return self.removed > before

    def _ranked(self, unit: Units, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores for their cost, ascending, [n], and the units' numbers, [rows that live, n].

        Empty where a removal costs nothing.
        """
        gone = self.gone[unit.id]
        rows = self.living_rows(unit)
        order = scores.masked_fill(gone, math.inf)[rows].sort(dim=1, stable=True)
        count = max(self.left(unit) - 1, 0)
        numbers = rows[:, None] * unit.size + order.indices[:, :count]
        if not count:
            return scores.new_zeros(0), numbers
        # All units of an axis cost the same.
        cost = self._cost([(unit, self._chosen(unit, numbers[:, 0]))])
        if self.prices is None:
            cost = max(cost, 1)
        elif cost <= 0:
            return scores.new_zeros(0), numbers
        return order.values[:, :count].sum(0) / cost, numbers

    def _sublayers_ranked(self, scores: Mapping[str, Tensor]) -> list[tuple[Sublayer, Tensor]]:
        """Sublayers that are left, and the score of all of their units for their cost, [1]."""
        found = []
        for sublayer in self.sublayers.values():
            cost = self._cost([], sublayer)
            if sublayer.id not in self.dropped and cost > 0:
                score = sum(
                    scores[u.id].masked_fill(self.gone[u.id], 0)[self.living_rows(u)].sum()
                    for u in self.counted(sublayer)
                )
                found.append((sublayer, torch.as_tensor(score).view(1) / cost))
        return found

    def counted(self, sublayer: Sublayer) -> list[Units]:
        """Units whose scores add up to a sublayer's: heads count with their dims in them."""
        mine = [u for u in self.units.values() if self._inside.get(u.id) == sublayer.id]
        heads = any(u.role in HEADS for u in mine)
        return [u for u in mine if not (heads and u.role in DIMS)]

    def _chosen(self, unit: Units, numbers: Tensor) -> Tensor:
        chosen = torch.zeros(unit.rows * unit.size, dtype=torch.bool)
        chosen[numbers] = True
        return chosen

    def left(self, unit: Units) -> int:
        """How many units of an axis are left: of each head the same number."""
        if self._inside.get(unit.id) in self.dropped:
            return 0
        return int((~self.gone[unit.id][self.living_rows(unit)[0]]).sum())

    def living_rows(self, unit: Units) -> Tensor:
        """The heads whose dims count: those that are not gone; int64."""
        heads = self.gone.get(unit.heads) if unit.heads is not None else None
        return torch.arange(unit.rows) if heads is None else (~heads[0]).nonzero().flatten()

    def lost(self, tensors: Iterable[str]) -> float:
        """The cost of the parameters of units that are gone from these tensors."""
        return sum(
            self._price(name) * (self.counts[name] - self._living(name, self._alive[name]))
            for name in tensors
            if name in self._alive
        )

    def _price(self, tensor: str) -> float:
        return 1 if self.prices is None else self.prices.get(tensor, 0.0)

    def _living(self, tensor: str, dims: Sequence[Tensor]) -> int:
        """How many parameters of units live in a tensor: Π n_d - Π m_d."""
        return max(math.prod(_counts(dims)) - self._rest[tensor], 0)

    def _cost(self, removals: Removal, sublayer: Sublayer | None = None) -> float:
        """The cost of what would go with these units, or a sublayer: Π n_d - Π n'_d, priced."""
        return (0 if sublayer is None else sublayer.base) + sum(
            self._price(name) * (self._living(name, self._alive[name]) - self._living(name, dims))
            for name, dims in self._without(removals, sublayer).items()
        )

    def _remove(self, removals: Removal, sublayer: Sublayer | None = None) -> None:
        self.removed += self._cost(removals, sublayer)
        self._alive |= self._without(removals, sublayer)
        for unit, chosen in removals:
            self.gone[unit.id] |= chosen.view(unit.rows, unit.size)
        if sublayer is not None:
            self.dropped.append(sublayer.id)

    def _settle(self) -> None:
        """Count again what is gone, so that the sum does not depend on the order of removal."""
        bases = (s.base for s in self.sublayers.values() if s.id in self.dropped)
        self.removed = self.lost(self._alive) + sum(bases)

    def _without(
        self, removals: Removal, sublayer: Sublayer | None = None
    ) -> dict[str, list[Tensor]]:
        """Positions that would live along each dimension of the tensors that lose some."""
        found: dict[str, list[Tensor]] = {}
        for unit, chosen in removals:
            for place in unit.places:
                if place.tensor in self._alive:
                    dims = found.setdefault(place.tensor, list(self._alive[place.tensor]))
                    dims[place.dim] = dims[place.dim] & ~place.marked(chosen)
        for name in () if sublayer is None else sorted(sublayer.tensors & self._alive.keys()):
            found[name] = [torch.zeros_like(dim) for dim in self._alive[name]]
        return found

    def masks(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By tensor name, true where weights may live."""
        found = {}
        for name, dims in self._alive.items():
            parameter = parameters.get(name)
            if parameter is None or all(bool(d.all()) for d in dims):
                continue
            # The outer "and" of all dimensions: true where every coordinate lives.
            mask = torch.ones((), dtype=torch.bool, device=parameter.device)
            for dim in dims:
                mask = mask.unsqueeze(-1) & dim.to(parameter.device)
            found[name] = mask
        for name in self.emptied:
            if name in parameters:
                found[name] = torch.zeros_like(parameters[name], dtype=torch.bool)
        return found

    @property
    def emptied(self) -> frozenset[str]:
        """Parameters of the sublayers that are gone."""
        return frozenset[str]().union(*(self.sublayers[name].tensors for name in self.dropped))

    def keep(self) -> dict[str, Tensor]:
        """By group id, the units that stay once tensors are `arranged`; groups that lose some.

        Without those of sublayers that are gone.
        """
        found = {}
        for unit in self.units.values():
            if self._inside.get(unit.id) in self.dropped:
                continue
            alive = ~self.gone[unit.id][self.living_rows(unit)[0]]
            if not bool(alive.all()):
                kept = alive.nonzero().flatten()
                found[unit.id] = kept if unit.heads is None else torch.arange(len(kept))
        return found

    def arranged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors shaped like the program's, the dims of each head that are gone at its end.

        The same order in everything that has the axis, so that all sums are over the same things.
        """
        found = dict(tensors)
        for unit in self.units.values():
            gone = self.gone[unit.id]
            if unit.heads is None or not bool(gone.any()):
                continue
            # Of each head the living dims first, both in their old order.
            order = gone.int().argsort(dim=1, stable=True)
            numbers = (order + torch.arange(unit.rows)[:, None] * unit.size).flatten()
            for place in unit.places:
                if place.tensor in found:
                    index = _moved(place.units, numbers)
                    tensor = found[place.tensor]
                    found[place.tensor] = tensor.index_select(place.dim, index.to(tensor.device))
        return found


def _counts(dims: Iterable[Tensor]) -> list[int]:
    """How many live along each dimension."""
    return [int(dim.sum()) for dim in dims]


def _moved(units: Tensor, numbers: Tensor) -> Tensor:
    """Positions to take from, so that unit `numbers[i]` moves to the place of unit i; int64."""
    inside = (units >= 0).nonzero().flatten()
    # All positions of a unit, in their order: as many for each.
    positions = inside[units[inside].argsort(stable=True)].view(len(numbers), -1)
    index = torch.arange(len(units))
    index[positions] = positions[numbers]
    return index
