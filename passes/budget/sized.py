"""What a budget measures: a program at the sizes that count, whole and branch by branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

import numpy as np
import torch
from torch import Tensor

from graphprune.axes import AxisGroup, AxisGroups, axis_groups
from graphprune.axes.branches import branches
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.ir.batches import sized as sized_inputs
from graphprune.ir.program import Program
from graphprune.ir.quantization import Mark
from graphprune.passes.budget.blocks import block_sites, thinned_out
from graphprune.passes.budget.items import Item, Level, find_items
from graphprune.passes.name_patterns import TensorNames
from graphprune.passes.sparsity.sparsity_pattern import Pattern, parse_pattern
from graphprune.passes.structural.selection import Selector, select
from graphprune.rewrite.drop import drop
from graphprune.rewrite.extract import extract
from graphprune.rewrite.shrink import shrink

if TYPE_CHECKING:
    from graphprune.passes.budget.budget import Budget

ROLES = ("head", "kv_group", "neuron")
WHOLE, FLOAT = "the model", "the model in float"
# An item that is timed in the whole model is so at these levels; between them on straight lines.
_IN_WHOLE = 4


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
                for level in few(item.levels):
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


def sized_for(options: Budget, program: Program, mark: Mark | None) -> Sized:
    """The program at the sizes that count, with what there is to choose.

    Args:
        options: of the pass.
        program: the dense one.
        mark: how the result will be quantized.

    Raises:
        RecipeError: there are zero blocks to choose, and it will not be quantized for them.
    """
    groups, found = axis_groups(program), branches(program)
    usable = select(program, groups, Selector(ROLES, (), options.targets, options.ignore)).groups
    names = TensorNames(program)

    def reached(tensors: frozenset[str], patterns: tuple[str, ...]) -> bool:
        return any(names.match(tensor, patterns) for tensor in tensors)

    mine = [
        branch
        for branch in found
        if branch.tensors
        and not reached(branch.tensors, options.ignore)
        and (not options.targets or reached(branch.tensors, options.targets))
    ]
    droppable = {branch.id for branch in mine} if options.drop else set()
    if program.entries[program.deployed].cache:
        # A cache of no layers is none.
        droppable -= {next((b.id for b in found if b.kind == "attention"), "")}
    pattern, sparse = None, {}
    if options.blocks:
        if mark is None or mark.scheme != "int8-dynamic":
            raise RecipeError(
                "zero blocks are skipped in int8: put Quantize('int8-dynamic') after the budget, "
                "on the command line --quantize int8-dynamic, or leave blocks out"
            )
        pattern = parse_pattern(options.blocks)
        for branch in mine:
            sites = block_sites(groups, branch.tensors, pattern)
            sparse[branch.id] = [site.tensor for site in sites if mark.takes(site.tensor)]
        mark = replace(mark, blocks=options.blocks)
    items = find_items(
        groups, usable, mine, droppable=droppable, round_to=options.round_to, sparse=sparse
    )
    return Sized(replace(program, quantization=mark), groups, items, options.batch, pattern)


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


def few(levels: Sequence[Level]) -> list[Level]:
    """The levels at which an item without a branch is measured."""
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
    inputs = {name_of(key): sized.inputs(model) for key, model in models.items() if key in whole}
    return {name_of(key): model for key, model in models.items()}, inputs


def name_of(key: tuple[str, Level]) -> str:
    """How a device is asked for an item at a level, or for a whole model."""
    name, level = key
    return name if level is None else f"{name} at {level.text}"
