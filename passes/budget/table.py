"""Table of costs: time, bytes and FLOPs of every level of every item, and what is outside of them.

A branch is measured alone, at each of its levels; its lowest, where it is gone, takes nothing.
Items without a branch of their own are measured in the whole model, and count from their lowest
level. What is left of the whole model is fixed:

    fixed = whole - Σ dense items        cost of a choice = fixed + Σ items at their levels

Branches alone take longer than in the model where other programs empty the caches between them. The
fixed time would be negative then, and a small model's prediction too fast; one factor makes it 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from torch import Tensor

from graphprune.axes import AxisGroup, AxisGroups, axis_groups
from graphprune.errors import UnsupportedError
from graphprune.ir.batches import sized as sized_inputs
from graphprune.ir.cost import flops
from graphprune.ir.program import Program
from graphprune.passes.budget.blocks import thinned_out
from graphprune.passes.budget.items import Item, Level
from graphprune.passes.sparsity.sparsity_pattern import Pattern
from graphprune.pipeline.device import Device
from graphprune.rewrite.drop import drop
from graphprune.rewrite.extract import extract
from graphprune.rewrite.shrink import shrink

RESOURCES = ("ms", "bytes", "flops")
WHOLE, FLOAT = "the model", "the model in float"
_MOST = 1000.0  # times faster than dense, that is ever predicted
# An item that is timed in the whole model is so at these levels; between them on straight lines.
_IN_WHOLE = 4


@final
@dataclass(frozen=True, slots=True)
class Table:
    """Costs of levels.

    Attributes:
        amounts: by resource, of each item the levels' costs.
        whole: by resource, of the dense model, quantized where the result will be.
        dense_ms: of the dense float model, which a speed-up is of.
    """

    amounts: Mapping[str, tuple[tuple[float, ...], ...]]
    whole: Mapping[str, float]
    dense_ms: float

    def fixed(self, resource: str) -> float:
        """The cost outside of all items."""
        return self.whole[resource] - sum(row[-1] for row in self.amounts[resource])

    def bounded(self) -> Table:
        """The table whose items take no more time than the whole model, by one factor for all."""
        items = self.whole["ms"] - self.fixed("ms")
        if items <= self.whole["ms"]:
            return self
        return self._scaled(self.whole["ms"] / items)

    def total(self, resource: str, levels: Sequence[int]) -> float:
        """The cost of the model at these levels."""
        rows = self.amounts[resource]
        amount = self.fixed(resource) + sum(row[j] for row, j in zip(rows, levels, strict=True))
        # Savings of items that share weights do not add up; no model takes no time.
        return max(amount, self.whole["ms"] / _MOST) if resource == "ms" else amount

    def least(self, resource: str) -> float:
        """The cost of the model with every item at its cheapest level."""
        return self.fixed(resource) + sum(min(row) for row in self.amounts[resource])

    def corrected(self, levels: Sequence[int], ms: float) -> Table:
        """The table whose time of these levels is the one that was measured.

        One factor corrects all items; the time of the whole model stays.
        """
        whole, predicted = self.whole["ms"], self.total("ms", levels)
        factor = (whole - ms) / (whole - predicted) if predicted < whole else 1.0
        return self._scaled(factor)

    def _scaled(self, factor: float) -> Table:
        rows = tuple(tuple(factor * amount for amount in row) for row in self.amounts["ms"])
        return replace(self, amounts={**self.amounts, "ms": rows})


@final
@dataclass(frozen=True, slots=True)
class Sized:
    """A program with the sizes that it is measured at.

    Attributes:
        program: the dense one.
        groups: its axis groups.
        items: what there is to choose.
        batch: samples and tokens; the example's where it is empty.
        pattern: of zero blocks; None where there are none to choose.
    """

    program: Program
    groups: AxisGroups
    items: Sequence[Item]
    batch: tuple[int, ...]
    pattern: Pattern | None = None

    def inputs(self, program: Program) -> tuple[Tensor, ...]:
        """The flat inputs that this program, or a smaller one made of it, is measured on."""
        entry = program.entries[program.deployed]
        return tuple(sized_inputs(entry, self.batch)) if self.batch else entry.example

    def in_float(self) -> Program:
        """The dense model without a mark of quantization."""
        return (
            replace(self.program, quantization=None) if self.program.quantization else self.program
        )

    def sizes(self) -> tuple[int, ...]:
        """Samples, and tokens of each, that are measured; after a cache tokens of the past."""
        entry = self.program.entries[self.program.deployed]
        found: dict[str, int] = {}
        for name, tensor in zip(entry.input_names, self.inputs(self.program), strict=True):
            for dim, symbol in entry.dynamic.get(name, {}).items():
                found[symbol] = int(tensor.shape[dim])
        wanted = ("batch", "past" if entry.cache else "sequence")
        return tuple(found[symbol] for symbol in wanted if symbol in found)

    def models(self) -> dict[tuple[str, Level], Program]:
        """Programs to measure, by item and level: branches alone, whole models, WHOLE and FLOAT.

        Branches of one structure are one model.
        """
        found: dict[tuple[str, Level], Program] = {
            (WHOLE, None): self.program,
            (FLOAT, None): self.in_float(),
        }
        built: dict[tuple[object, Level], Program] = {}
        for item in self.items:
            if item.branch is None:
                for level in _few(item.levels):
                    found[item.id, level] = _cut(self.program, item.groups, level)
                continue
            nodes = item.branch.nodes(self.program, self.program.deployed)
            structure = tuple(
                (
                    str(n.target) if n.op == "call_function" else n.op,
                    _shapes(n.meta.get("val")),
                    *(self._form(str(n.target), item) if n.op == "get_attr" else ()),
                )
                for n in nodes
            )
            missing = [c for c in item.levels if c is not None and (structure, c) not in built]
            if missing:
                alone = self._alone([node.name for node in nodes])
                built |= {(structure, c): self._at(alone, item, c) for c in missing}
            found |= {
                (item.id, level): built[structure, level]
                for level in item.levels
                if level is not None
            }
        return found

    def at(self, levels: Sequence[int]) -> Program:
        """The whole model at these levels, whichever units it keeps: for its time only."""
        chosen = [item.levels[j] for item, j in zip(self.items, levels, strict=True)]
        gone = [i.branch for i, c in zip(self.items, chosen, strict=True) if c is None and i.branch]
        program = drop(self.program, gone) if gone else self.program
        keep = {
            group.id: range(kept)
            for item, level in zip(self.items, chosen, strict=True)
            if level is not None
            for group, kept in zip(item.groups, level.units, strict=True)
            if kept < group.size
        }
        program = shrink(program, keep) if keep else program
        return self._thinned_out(program, zeros_by_tensor(self.items, chosen))

    def _form(self, tensor: str, item: Item) -> tuple[bool, bool]:
        """Whether a tensor will be quantized, and whether its blocks may be zero."""
        mark = self.program.quantization
        return mark is not None and mark.takes(tensor), tensor in item.sparse

    def _at(self, alone: Program, item: Item, level: Level) -> Program:
        """A branch as a model of its own, at a level."""
        smaller = _cut(alone, item.groups, level)
        return self._thinned_out(smaller, zeros_by_tensor([item], [level]))

    def _thinned_out(self, program: Program, zeros: Mapping[str, float]) -> Program:
        return program if self.pattern is None else thinned_out(program, self.pattern, zeros)

    def _alone(self, nodes: Sequence[str]) -> Program:
        """A branch as a model of its own."""
        return extract(self.program, nodes, self.inputs(self.program), self.program.deployed)


def zeros_by_tensor(items: Sequence[Item], levels: Sequence[Level]) -> dict[str, float]:
    """The fraction of zero blocks of every weight that has some."""
    return {
        name: level.zeros
        for item, level in zip(items, levels, strict=True)
        if level is not None and level.zeros
        for name in item.sparse
    }


def _shapes(value: object) -> str:
    """The shapes of what a node computes, as text."""
    if isinstance(value, list | tuple):
        return ",".join(map(_shapes, value))
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else ""


def _cut(program: Program, groups: Sequence[AxisGroup], level: Level) -> Program:
    assert level is not None
    here = axis_groups(program)
    keep = {
        _same(here, group).id: range(kept)
        for group, kept in zip(groups, level.units, strict=True)
        if kept < group.size
    }
    return shrink(program, keep) if keep else program


def _same(groups: AxisGroups, group: AxisGroup) -> AxisGroup:
    """A group of the whole model, in a part of it."""
    for own in groups:
        if (own.id, own.size) == (group.id, group.size):
            return own
    places = set(group.occurrences)
    found = [g for g in groups if g.size == group.size and places & set(g.occurrences)]
    if len(found) != 1:
        raise UnsupportedError(f"{group.id!r} is not to be found in the branch around it")
    return found[0]


def _few(levels: Sequence[Level]) -> list[Level]:
    at = np.unique(np.linspace(0, len(levels) - 1, _IN_WHOLE).round().astype(int))
    return [levels[i] for i in at]


def named_models(sized: Sized) -> tuple[dict[str, Program], dict[str, tuple[Tensor, ...]]]:
    """Programs that a device measures, by name, and their inputs."""
    models = sized.models()
    # Parts of a graph have static sizes, and examples of them.
    whole = {
        (WHOLE, None),
        (FLOAT, None),
        *((i.id, c) for i in sized.items if i.branch is None for c in i.levels),
    }
    inputs = {_name(key): sized.inputs(model) for key, model in models.items() if key in whole}
    return {_name(key): model for key, model in models.items()}, inputs


def measured_table(sized: Sized, device: Device) -> Table:
    """Measure every level of every item.

    Args:
        sized: the program and the items.
        device: measures, or looks up what was measured.
    """
    models, inputs = named_models(sized)
    found = device.measure(models, inputs=inputs)
    alike = {id(model): (model, inputs.get(name)) for name, model in models.items()}
    counted = {key: _flops(model, given) for key, (model, given) in alike.items()}
    costs = {
        name: {
            "ms": found[name].ms,
            "bytes": float(found[name].bytes),
            "flops": counted[id(model)],
        }
        for name, model in models.items()
    }
    table = Table(
        {
            resource: tuple(_row(item, resource, costs) for item in sized.items)
            for resource in RESOURCES
        },
        costs[WHOLE],
        costs[FLOAT]["ms"],
    )
    return table.bounded()


def _flops(program: Program, inputs: tuple[Tensor, ...] | None) -> float:
    name = program.deployed
    if inputs is not None:
        entries = {**program.entries, name: replace(program.entries[name], example=inputs)}
        program = replace(program, entries=entries)
    return float(flops(program, name))


def _name(key: tuple[str, Level]) -> str:
    name, level = key
    return name if level is None else f"{name} at {level.text}"


def _row(item: Item, resource: str, costs: Mapping[str, Mapping[str, float]]) -> tuple[float, ...]:
    """Costs of an item's levels: noise makes none dearer than one with more units."""
    if item.branch is not None:
        row = [
            0.0 if level is None else costs[_name((item.id, level))][resource]
            for level in item.levels
        ]
    else:
        known = _few(item.levels)
        at = [item.levels.index(level) for level in known]
        values = [costs[_name((item.id, level))][resource] for level in known]
        row = list(np.interp(range(len(item.levels)), at, values) - min(values))
    found = np.asarray(row)
    for zeros in {level.zeros for level in item.levels if level is not None}:
        mine = [j for j, level in enumerate(item.levels) if level is None or level.zeros == zeros]
        found[mine] = np.maximum.accumulate(found[mine])
    return tuple(found.tolist())
