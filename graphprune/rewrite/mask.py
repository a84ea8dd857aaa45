"""The reference of `shrink`: removed units set to zero, at the old shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.axes import algebra
from graphprune.axes.algebra import Axis
from graphprune.axes.facts import Contraction, Facts
from graphprune.axes.groups import axis_groups
from graphprune.ir.graph import bound_arguments, flat_outputs, output_node, set_bound
from graphprune.ir.program import Entry, Program

MASK = "graphprune_mask_"  # name prefix of the tensors and nodes that `mask` adds


def mask(program: Program, kept: Mapping[str, Any], *, everywhere: bool = False) -> Program:
    """The reference of `shrink`: old shapes, removed units set to zero where they are summed.

    Zeroing parameters would not do: a unit may have a constant of its own (elu(x) + 1 has one).
    Keys and values that go out into a cache come without the removed units, as `shrink` gives them;
    those that come in have all of them.

    Args:
        program: left as it is.
        kept: group id -> indices of the units that stay.
        everywhere: mask every activation that carries a removed unit, not the operands of sums.
            That equals the other for the same reason that shrinking does, but does not rely on
            where sums are recorded: a sum over weights alone, or one without a record, shows.
            (Where no activation carries the units, as between constants, sums are masked.)
    """
    fork = program.fork()
    groups = axis_groups(program).on(fork)
    keep = groups.keep(kept)
    tensors = dict(fork.tensors)
    for name, facts in groups.axes.facts.items():
        graph = fork.entries[name].graph
        carried = _carried(facts) if everywhere else set()
        for contraction in facts.contractions:
            cut = {leaf for leaf in algebra.leaves(contraction.axis) if leaf in keep}
            # A statistic over a normalized axis stays that of all units: the drift is from there.
            statistic = contraction.kind == "reduction" and any(leaf.normalized for leaf in cut)
            # A weight that an operator sums over by itself, as a recurrent layer does.
            inside = contraction.operand not in facts.activations
            inside &= contraction.node in facts.activations
            if cut and not statistic and (inside or cut.isdisjoint(carried)):
                _mask_operand(graph, contraction, keep, tensors)
        _cut_outputs(fork.entries[name], facts, keep, tensors)
        if everywhere:
            _mask_activations(graph, facts, keep, tensors)
    return replace(fork, tensors=tensors)


def _cut_outputs(
    entry: Entry, facts: Facts, keep: Mapping[Axis, Tensor], tensors: dict[str, Tensor]
) -> None:
    """Drop the removed units from what an entry gives to be cached."""
    graph = entry.graph
    results = list(flat_outputs(graph))
    for number in entry.cache.values():
        for dim, axis in enumerate(facts.dims[results[number]]):
            if not any(leaf in keep for leaf in algebra.leaves(axis)):
                continue
            name = f"{MASK}{len(tensors)}"
            tensors[name] = algebra.expanded(axis, keep)
            with graph.inserting_before(output_node(graph)):
                results[number] = graph.call_function(
                    torch.ops.aten.index_select.default,
                    (results[number], dim, graph.create_node("get_attr", name)),
                )
    output_node(graph).args = (tuple(results),)


def _mask_operand(
    graph: fx.Graph,
    contraction: Contraction,
    keep: Mapping[Axis, Tensor],
    tensors: dict[str, Tensor],
) -> None:
    argument, _, index = contraction.slot.partition(":")
    current = bound_arguments(contraction.node)[argument]
    operand = current[int(index)] if index else current
    with graph.inserting_before(contraction.node):
        masked = _masked(graph, operand, contraction.dim, contraction.axis, keep, tensors)
    several = [*current[: int(index)], masked, *current[int(index) + 1 :]] if index else masked
    set_bound(contraction.node, {argument: several})


def _carried(facts: Facts) -> set[Axis]:
    """Leaves of all activations."""
    dims = (facts.dims.get(node) for node in facts.activations)
    return {
        part for d in dims if isinstance(d, tuple) for axis in d for part in algebra.leaves(axis)
    }


def _mask_activations(
    graph: fx.Graph, facts: Facts, keep: Mapping[Axis, Tensor], tensors: dict[str, Tensor]
) -> None:
    for node in list(graph.nodes):
        dims = facts.dims.get(node)
        if node not in facts.activations or not isinstance(dims, tuple):
            continue
        value = node
        for dim, axis in enumerate(dims):
            parts = list(algebra.leaves(axis))
            # Folded into a batch of unknown size it has no places; before and after it has.
            whole = all(isinstance(part.size, int) for part in parts)
            if whole and any(part in keep for part in parts):
                with graph.inserting_before(value.next):
                    value = _masked(graph, value, dim, axis, keep, tensors)
        if value is not node:
            node.replace_all_uses_with(
                value, delete_user_cb=lambda user: not user.name.startswith(MASK)
            )


def _masked(
    graph: fx.Graph,
    value: fx.Node,
    dim: int,
    axis: Axis,
    keep: Mapping[Axis, Tensor],
    tensors: dict[str, Tensor],
) -> fx.Node:
    """A value with the removed units of a dimension set to zero, whatever they are."""
    fake = value.meta["val"]
    gone = torch.ones(int(axis.size), dtype=torch.bool, device=fake.device)
    gone[algebra.expanded(axis, keep).to(fake.device)] = False
    name = f"{MASK}{len(tensors)}"
    tensors[name] = gone.reshape([-1] + [1] * (fake.dim() - dim - 1))
    return filled(graph, value, name, tensors[name])


def filled(graph: fx.Graph, value: fx.Node, name: str, where: Tensor) -> fx.Node:
    """Zero a value where the bool tensor of this name is true, infinity and NaN too.

    Shapes stay, so metadata is known without propagating the whole graph again.
    """
    fake = value.meta["val"]
    read = graph.create_node("get_attr", name)
    # Not a product with zeros: a unit may be infinite.
    masked = graph.create_node(
        "call_function", torch.ops.aten.masked_fill.Scalar, (value, read, 0), name=f"{name}_of"
    )
    read.meta["val"] = fake.fake_mode.from_tensor(where, static_shapes=True)
    masked.meta["val"] = fake
    return masked
