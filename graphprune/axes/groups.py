"""Axis groups: the leaves of the analysis as users and passes see them."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch
from torch import Tensor

from graphprune import notebook
from graphprune.axes import algebra
from graphprune.axes.algebra import Axis
from graphprune.axes.analysis import Axes, infer_axes
from graphprune.axes.roles import roles
from graphprune.axes.rules import RULES
from graphprune.errors import UnsupportedError
from graphprune.ir.program import Program


@dataclass(frozen=True, slots=True)
class Occurrence:
    """A place where an axis occurs: dimension `dim` of tensor `tensor`, or a part of it."""

    tensor: str
    dim: int


@dataclass(frozen=True, slots=True)
class Channels:
    """A dimension, or a segment of one, that several groups of one role are the factors of.

    A grouped convolution sees 16 channels as 4 groups of 4: half of the channels are half of 16.

    Attributes:
        id: where it occurs first, "tensor[dim]"; with ".k" for the k-th segment that is one.
        factors: ids of the groups, the outer one first.
        size: the product of their sizes.
    """

    id: str
    factors: tuple[str, ...]
    size: int


@dataclass(frozen=True, slots=True)
class AxisGroup:
    """One axis with everything that has it: removing a unit removes a slice of each.

    Attributes:
        id: its first occurrence, "tensor[dim]" or "tensor[dim].k" for the k-th part of a dimension;
            it stays the same when other parts go.
        size: number of units.
        role: what it is for, one of `graphprune.axes.ROLES`.
        occurrences: every tensor dimension that it is, or is a part of.
        frozen: why no unit can go; empty when they can.
        normalized: removing a unit changes a mean or variance, so it is not exact.
        cost: parameters that go with one unit.
    """

    id: str
    size: int
    role: str
    occurrences: tuple[Occurrence, ...]
    frozen: tuple[str, ...]
    normalized: bool
    cost: int
    axis: Axis = field(repr=False, compare=False)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that have this axis, each once."""
        return tuple(dict.fromkeys(o.tensor for o in self.occurrences))

    def to_json(self) -> dict[str, Any]:
        """The group as JSON."""
        return {
            "id": self.id,
            "role": self.role,
            "size": self.size,
            "cost": self.cost,
            "normalized": self.normalized,
            "frozen": list(self.frozen),
            "occurrences": [[o.tensor, o.dim] for o in self.occurrences],
        }


class AxisGroups(Sequence[AxisGroup]):
    """All axis groups of a program, in the order of its tensors."""

    def __init__(self, axes: Axes, groups: Sequence[AxisGroup]) -> None:
        """Groups that are named by position; they get the names that the program has for them."""
        self.axes = axes
        self.program = axes.program
        self._by_position = groups
        names = self.program.axis_names
        self._groups = [replace(g, id=names.get(g.id, g.id)) for g in groups]
        self._by_id = {g.id: g for g in self._groups}

    def on(self, program: Program) -> AxisGroups:
        """The same groups of a program whose graphs have nodes of the same names, such as a fork.

        They go by the names that this program has for them.
        """
        facts = {n: f.on(program.entries[n].graph) for n, f in self.axes.facts.items()}
        return AxisGroups(Axes(program, self.axes.tensors, facts), self._by_position)

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, key: int | str) -> AxisGroup: ...
    @overload
    def __getitem__(self, key: slice) -> list[AxisGroup]: ...
    def __getitem__(self, key: int | str | slice) -> AxisGroup | list[AxisGroup]:
        if isinstance(key, str):
            if key not in self._by_id:
                raise UnsupportedError(f"no axis group {key!r}; `graphprune inspect` lists them")
            return self._by_id[key]
        return self._groups[key]

    def __iter__(self) -> Iterator[AxisGroup]:
        return iter(self._groups)

    def __contains__(self, key: object) -> bool:
        return key in self._by_id if isinstance(key, str) else key in self._groups

    def with_role(self, *wanted: str) -> list[AxisGroup]:
        """The groups of these roles, frozen ones included."""
        return [g for g in self._groups if g.role in wanted]

    def of(self, tensor: str, dim: int) -> list[AxisGroup]:
        """The groups that make up a tensor's dimension."""
        parts = set(algebra.leaves(self.axes.tensors[tensor][dim]))
        return [g for g in self._groups if algebra.find(g.axis) in parts]

    def channels(self, group: AxisGroup) -> list[Channels]:
        """The dimensions that the group and others of its role are factors of."""
        named = {algebra.find(g.axis): g for g in self._groups if g.role == group.role}
        leaf = algebra.find(self[group.id].axis)
        found: dict[frozenset[str], Channels] = {}  # shuffled channels are the same ones
        for place in self[group.id].occurrences:
            terms = algebra.terms(self.axes.tensors[place.tensor][place.dim])
            for k, term in enumerate(terms):
                factors = tuple(dict.fromkeys(named[part].id for part in term if part in named))
                if leaf in term and len(factors) > 1:
                    name = f"{place.tensor}[{place.dim}]" + (f".{k}" if len(terms) > 1 else "")
                    size = math.prod(self[factor].size for factor in factors)
                    found.setdefault(frozenset(factors), Channels(name, factors, size))
        return list(found.values())

    def keep(self, kept: Mapping[str, Any]) -> dict[Axis, Tensor]:
        """Group ids with indices, checked, as leaves with sorted int64 indices.

        Raises:
            UnsupportedError: a group is unknown, frozen, or the indices are not units of it.
        """
        result = {}
        for name, indices in kept.items():
            group = self[name]
            index = _checked_indices(group, indices)
            if len(index) == group.size:
                continue
            if group.frozen:
                raise UnsupportedError(
                    f"cannot prune {group.role} axis {name!r}: {'; '.join(group.frozen)}"
                )
            if not len(index) or int(index[0]) < 0 or int(index[-1]) >= group.size:
                raise UnsupportedError(
                    f"axis {name!r} has units 0 to {group.size - 1} and keeps at least one, "
                    f"got {index.tolist()}"
                )
            result[algebra.find(group.axis)] = index
        return result

    def indices(self, tensor: str, dim: int, kept: Mapping[str, Any]) -> Tensor:
        """Positions along a tensor's dimension that stay when groups keep these units."""
        return algebra.expanded(self.axes.tensors[tensor][dim], self.keep(kept))

    def units(self, group: AxisGroup, tensor: str, dim: int) -> Tensor:
        """For each position along a tensor's dimension, its unit of the group, or -1."""
        # By name: a group of another analysis of the same program has other axis objects.
        return algebra.unit_labels(self.axes.tensors[tensor][dim], self[group.id].axis)

    def num_parameters(self, kept: Mapping[str, Any]) -> int:
        """Parameters of the program once groups keep these units."""
        return _num_parameters(self.axes, self.keep(kept))

    def alike(self) -> list[tuple[str, list[AxisGroup]]]:
        """Groups that differ by numbers in their names alone, under that name with stars."""
        rows: dict[object, list[AxisGroup]] = {}
        for group in self._groups:
            state = (starred_numbers(group.frozen[0]), len(group.frozen)) if group.frozen else ()
            same = (group.role, group.size, group.cost, group.normalized, state)
            rows.setdefault((_starred(group.id), *same), []).append(group)
        return [
            (_starred(members[0].id) if len(members) > 1 else members[0].id, members)
            for members in rows.values()
        ]

    def summary(self) -> str:
        """How many groups there are, and how many of them can be cut."""
        frozen = sum(bool(g.frozen) for g in self._groups)
        return (
            f"{len(self)} axis groups, {len(self) - frozen} free, {frozen} frozen; "
            f"{self.program.num_parameters():,} parameters"
        )

    def __repr__(self) -> str:
        return f"AxisGroups({self.summary()})"

    def _repr_html_(self) -> str:
        rows = [
            (
                name,
                members[0].role,
                len(members),
                f"{members[0].size:,}",
                f"{members[0].cost:,}",
                "; ".join(members[0].frozen[:1]) or ("normalized" if members[0].normalized else ""),
            )
            for name, members in sorted(self.alike(), key=lambda row: bool(row[1][0].frozen))
        ]
        header = ("axis", "role", "groups", "units", "parameters of a unit", "frozen")
        return notebook.block(
            self.summary(),
            notebook.table(header, rows),
            notebook.folded("sizes of inputs", self.program.limit_lines()),
        )

    def __str__(self) -> str:
        lines = [f"{'role':18}{'size':>7}{'params/unit':>13}  axis"]
        for g in self._groups:
            note = f"  frozen: {g.frozen[0]}" if g.frozen else ""
            note += "  normalized" if g.normalized and not g.frozen else ""
            lines.append(f"{g.role:18}{g.size:>7}{g.cost:>13,}  {g.id}{note}")
        limits = self.program.limit_lines()
        if limits:
            lines += ["", "sizes of inputs:", *(f"  {line}" for line in limits)]
        return "\n".join(lines)


def _starred(group_id: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", group_id)


def starred_numbers(reason: str) -> str:
    """A reason with stars for numbers: it names modules and nodes, numbered through the layers."""
    return re.sub(r"(?<=\.)\d+\b|(?<=_)\d+\b", "*", reason)


def axis_groups(program: Program) -> AxisGroups:
    """The axis groups of a program: what can be removed from it, and what cannot, and why.

    The last few analyses are kept, so that a program with other values costs none. A copy of its
    graphs has `axis_groups(program).on(copy)`. What lost units is analyzed again: rules compare
    sizes (a broadcast, the boundaries of a reshape), and sizes that meet by chance, or are one now,
    say something else than they did.
    """
    content = _content(program)
    for held, groups in _kept:
        if held == content:
            return groups.on(program)
    shapes = {name: t.to("meta") for name, t in program.tensors.items()}
    # A fork, which nobody else edits, and which holds no weights.
    own = replace(program, tensors=shapes, axis_names={}, report=None).fork()
    axes = infer_axes(own)
    groups = AxisGroups(axes, _groups(axes))
    _kept.append((content, groups))
    return groups.on(program)


_kept: deque[tuple[Any, AxisGroups]] = deque(maxlen=4)


def _content(program: Program) -> Any:
    """All that the axes of a program follow from: two that are equal have the same."""
    entries = {
        name: (
            [(n, n.name, n.target, n.args, n.kwargs) for n in entry.graph.nodes],
            {name: dict(dims) for name, dims in entry.dynamic.items()},
            dict(entry.cache),
        )
        for name, entry in program.entries.items()
    }
    shapes = [(name, t.shape) for name, t in program.tensors.items()]
    return entries, shapes, program.parameters, program.overlapping, dict(RULES)


def _groups(axes: Axes) -> list[AxisGroup]:
    occurrences: dict[Axis, list[Occurrence]] = {}
    names: dict[Axis, str] = {}
    for tensor, dims in axes.tensors.items():
        for dim, axis in enumerate(dims):
            parts = list(algebra.leaves(axis))
            for k, leaf in enumerate(parts):
                found = occurrences.setdefault(leaf, [])
                if Occurrence(tensor, dim) not in found:
                    found.append(Occurrence(tensor, dim))
                names.setdefault(leaf, f"{tensor}[{dim}]" + (f".{k}" if len(parts) > 1 else ""))
    known = roles(axes)
    return [
        AxisGroup(
            id=names[leaf],
            size=int(leaf.size),
            role=known.get(leaf, "other"),
            occurrences=tuple(places),
            frozen=tuple(leaf.frozen),
            normalized=leaf.normalized,
            cost=_unit_cost(axes, leaf, places),
            axis=leaf,
        )
        for leaf, places in occurrences.items()
        if leaf.size > 1
    ]


def names_after(before: AxisGroups, keep: Mapping[Axis, Tensor], after: Program) -> dict[str, str]:
    """Name the groups of a program that lost units or tensors, so that each keeps its name.

    An axis that is down to one unit is none any more, and those beside it in a dimension would be
    counted again: "w[0].1" would become "w[0]". One whose first tensor is gone would be named after
    the next. Of an axis that fell apart, the first part has the name.

    Args:
        before: the groups before, with their names.
        keep: leaves with the units that stay; others stay whole.
        after: the program with those units alone; names it has are left out of account.

    Returns:
        for `Program.axis_names`: name by position -> name before, where they differ.
    """
    old = {algebra.find(group.axis): group.id for group in before}
    found: dict[str, str] = {}
    taken: set[str] = set()
    plain = axis_groups(replace(after, axis_names={}))
    for group in plain:
        place = group.occurrences[0]
        new_parts = _parts(plain, place, {})
        old_parts = _parts(before, place, keep)
        if len(new_parts) == len(old_parts):
            leaf = algebra.find(group.axis)
            # It may be there twice, in both halves of a concatenation.
            former = next(o for n, o in zip(new_parts, old_parts, strict=True) if n is leaf)
            name = old.get(former, group.id)
            if name != group.id and name not in taken:
                found[group.id] = name
        taken.add(found.get(group.id, group.id))
    return found


def _parts(groups: AxisGroups, place: Occurrence, keep: Mapping[Axis, Tensor]) -> list[Axis]:
    """The parts of a tensor's dimension that have several units left."""
    parts = algebra.leaves(groups.axes.tensors[place.tensor][place.dim])
    return [part for part in parts if algebra.new_size(part, keep) > 1]


def _checked_indices(group: AxisGroup, indices: Any) -> Tensor:
    """Unit numbers as sorted int64 without repetitions; masks and fractions are refused."""
    given = torch.as_tensor(indices if isinstance(indices, Tensor) else list(indices))
    if given.numel() and (given.is_floating_point() or given.dtype is torch.bool):
        raise UnsupportedError(
            f"axis {group.id!r} keeps units by number, got values of type {given.dtype}; a mask "
            "becomes numbers with mask.nonzero().flatten()"
        )
    return torch.unique(given.to(torch.int64))


def _unit_cost(axes: Axes, leaf: Axis, places: Sequence[Occurrence]) -> int:
    keep = {leaf: torch.arange(int(leaf.size) - 1)}
    names = {o.tensor for o in places if o.tensor in axes.program.parameters}
    return sum(
        axes.program.tensors[name].numel() - _numel(axes.tensors[name], keep) for name in names
    )


def _numel(dims: Sequence[Axis], keep: Mapping[Axis, Tensor]) -> int:
    return int(algebra.sympy_product([algebra.new_size(a, keep) for a in dims]))


def _num_parameters(axes: Axes, keep: Mapping[Axis, Tensor]) -> int:
    return sum(_numel(axes.tensors[name], keep) for name in axes.program.parameters)
