"""The walk: every entry graph once, unifying axes by the rules, then freezing what must stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphprune.axes import algebra
from graphprune.axes.algebra import Axis
from graphprune.axes.facts import Dims, Facts, frozen_like, size_of
from graphprune.axes.rules import RULES
from graphprune.axes.rules.context import RuleContext
from graphprune.ir.graph import flat_outputs, op_name, place
from graphprune.ir.program import Entry, Program


@dataclass(frozen=True)
class Axes:
    """The axes of a program: one tuple a tensor, and the facts of each entry graph."""

    program: Program
    tensors: Mapping[str, Dims]
    facts: Mapping[str, Facts]


def infer_axes(program: Program) -> Axes:
    """Find out which dimensions of which tensors are the same axis.

    All entries are read together: a tensor has the same axes in each of them.
    """
    tensors = {
        name: tuple(algebra.leaf(int(s)) for s in tensor.shape)
        for name, tensor in program.tensors.items()
    }
    facts = {}
    for name, entry in program.entries.items():
        facts[name] = _walk(entry, tensors)
    for name in sorted(set(tensors) - program.read()):
        for axis in tensors[name]:
            algebra.freeze(axis, f"{name} is never read")
    for name in sorted(program.overlapping):
        for axis in tensors.get(name, ()):
            algebra.freeze(axis, f"{name} shares a part of its memory with another tensor")
    _cut_picked(facts.values())
    for name, found in facts.items():
        _freeze_mixed(found)
        _normalize_weight_sums(found)
        _normalize_subtracted_means(found)
        _freeze_returned_averages(found, flat_outputs(program.entries[name].graph))
    return Axes(program, tensors, facts)


CACHE_DIMS = (1, 3)  # heads and width: of all inputs and outputs only these can shrink


def _walk(entry: Entry, tensors: Mapping[str, Dims]) -> Facts:
    graph = entry.graph
    weights, activations = _sources(graph)
    facts = Facts(
        weights=weights, activations=activations, learned=activations & _of_matrices(graph)
    )
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "get_attr":
            facts.dims[node] = tensors[str(node.target)]
        elif node.op == "placeholder":
            fixed = frozen_like(value, f"input {node.name!r} of the model")
            facts.dims[node] = fixed
            if node.name in entry.cache:
                facts.dims[node] = tuple(
                    algebra.leaf(axis.size) if dim in CACHE_DIMS else axis
                    for dim, axis in enumerate(fixed)
                )
        elif node.op == "call_function" and isinstance(value, (torch.Tensor, tuple, list)):
            facts.dims[node] = _apply(node, facts)
    cached = set(entry.cache.values())
    for number, result in enumerate(flat_outputs(graph)):
        for dim, axis in enumerate(facts.dims.get(result, ())):
            if number not in cached or dim not in CACHE_DIMS:
                algebra.freeze(axis, "output of the model")
    return facts


def _apply(node: fx.Node, facts: Facts) -> object:
    context = RuleContext(node, facts)
    function = RULES.get(op_name(node))
    if function is None:
        return context.unknown()
    dims = function(context)
    if isinstance(dims, tuple):
        _check_sizes(node, dims)
    return dims


def _check_sizes(node: fx.Node, dims: Dims) -> None:
    """Raise where a rule gives other sizes than the operator: the rule is wrong."""
    wanted = [size_of(s) for s in node.meta["val"].shape]
    if len(dims) != len(wanted) or not all(
        algebra.equal(a.size, s) for a, s in zip(dims, wanted, strict=True)
    ):
        raise AssertionError(
            f"the axis rule of {place(node)} gives {[a.size for a in dims]} for {wanted}"
        )


def _sources(graph: fx.Graph) -> tuple[set[fx.Node], set[fx.Node]]:
    """Values made of tensors of the program and of sizes alone; and values that inputs reach."""
    inputs: set[fx.Node] = set()
    weights: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (
            op_name(node) != "sym_size" and any(n in inputs for n in node.all_input_nodes)
        ):
            inputs.add(node)
        elif node.op == "get_attr" or any(n in weights for n in node.all_input_nodes):
            weights.add(node)
    return weights, inputs


def _of_matrices(graph: fx.Graph) -> set[fx.Node]:
    """Values that depend on a weight of two dimensions or more."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        matrix = node.op == "get_attr" and node.meta["val"].dim() > 1
        if matrix or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _cut_picked(entries: Iterable[Facts]) -> None:
    """Units that are read by their numbers stay, and the others become axes of their own.

    An axis most of whose units are read so, or that has a structure, stays whole.
    """
    reads: dict[Axis, list[tuple[Facts, fx.Node, int]]] = {}
    for facts in entries:
        for node, axis, number in facts.picked:
            reads.setdefault(algebra.find(axis), []).append((facts, node, number))
    for axis, some in reads.items():
        numbers = sorted({number for _, _, number in some})
        if axis.kind != "leaf" or axis.frozen or 2 * len(numbers) > axis.size:
            for _, node, _ in some:
                algebra.freeze(axis, f"one unit is picked from it by {place(node)}")
            continue
        parts: list[Axis] = []
        before: dict[int, Axis] = {}
        for last, number in zip([-1, *numbers], numbers, strict=False):
            unit = algebra.leaf(1)
            parts.append(algebra.leaf(number - last - 1))
            before[number] = algebra.concat(parts)
            parts.append(unit)
        parts.append(algebra.leaf(axis.size - numbers[-1] - 1))
        algebra.unify(axis, algebra.concat(parts), "a unit read by its number")
        for facts, node, number in some:
            facts.extra.setdefault(node, {})["before"] = before[number]


def _freeze_mixed(facts: Facts) -> None:
    """A sum over a product with an input size cannot be masked by a constant: freeze it."""
    for contraction in facts.contractions:
        parts = list(algebra.leaves(contraction.axis))
        if any(not isinstance(p.size, int) for p in parts):
            for part in parts:
                algebra.freeze(
                    part, f"summed together with an input size by {place(contraction.node)}"
                )


def _normalize_weight_sums(facts: Facts) -> None:
    """A sum over weights alone changes when units of an activation's axis go: a statistic of them.

    W - W.mean(1), W / |W| and the like: masking activations says nothing about those sums.
    """
    carried = {part for node in facts.activations for part in _leaves(facts, node)}
    for contraction in facts.contractions:
        if contraction.node not in facts.activations and not _is_zero(contraction.operand):
            for part in carried.intersection(algebra.leaves(contraction.axis)):
                algebra.normalize(part)


def _is_zero(node: fx.Node) -> bool:
    """Whether a value is zeros, as the first state of a recurrent layer: sums over it stay zero."""
    return op_name(node) in {"zeros", "new_zeros", "zeros_like"}


def _normalize_subtracted_means(facts: Facts) -> None:
    """A mean taken off the values that it is the mean of: the axis is normalized, as by layer_norm.

    x - mean(x). As a factor, as in x / |x| or a gate by mean(x), a sum leaves a zero unit zero.
    """
    summing = {contraction.node for contraction in facts.contractions}
    for contraction in facts.contractions:
        if contraction.kind == "weights" or contraction.node not in facts.activations:
            continue
        # What still carries the axis, as rms_norm does, is no sum.
        summed = set(algebra.leaves(contraction.axis)) - _leaves(facts, contraction.node)
        stack, seen = [contraction.node], {contraction.node}
        while stack:
            source = stack.pop()
            for user in source.users.keys() - seen - summing:
                seen.add(user)
                back = summed & _leaves(facts, user)
                met = back and any(
                    summed & _leaves(facts, other)
                    for other in user.all_input_nodes
                    if other is not source and other in facts.activations
                )
                if not met or op_name(user) == "expand_as":
                    stack.append(user)
                elif op_name(user) in _SHIFTS:
                    for part in back:
                        algebra.normalize(part)


_SHIFTS = {"add", "sub", "rsub", "lerp", "addcmul", "addcdiv"}


def _freeze_returned_averages(facts: Facts, outputs: Sequence[object]) -> None:
    """Attention maps that the model returns averaged over heads would be another average."""
    heads = {p for _, role, axis in facts.attention if role == "head" for p in algebra.leaves(axis)}
    for contraction in facts.contractions:
        averaged = heads.intersection(algebra.leaves(contraction.axis))
        if contraction.kind != "reduction" or not averaged or not _is_map(contraction.operand):
            continue
        reached, stack = {contraction.node}, [contraction.node]
        while stack:
            new = stack.pop().users.keys() - reached
            reached |= new
            stack += new
        if not reached.isdisjoint(outputs):
            for part in averaged:
                algebra.freeze(
                    part, f"the model returns an average over it, {place(contraction.node)}"
                )


def _is_map(node: fx.Node) -> bool:
    """Whether a value is what a softmax gives, moved or scaled at most."""
    while node.op == "call_function":
        if "softmax" in op_name(node):
            return True
        sources = [n for n in node.all_input_nodes if op_name(n) != "sym_size"]
        if len(sources) != 1:
            return False
        node = sources[0]
    return False


def _leaves(facts: Facts, node: fx.Node) -> set[Axis]:
    """Leaves of a value, or of all values of several."""
    found = facts.dims.get(node, ())
    several = [found] if isinstance(found, tuple) else found
    return {part for dims in several for part in axis_leaves(dims)}


def dims_of(axes: Axes, entry: str, node: fx.Node) -> Dims:
    """The axes of a node's value; empty for values that are no tensors."""
    found = axes.facts[entry].dims.get(node, ())
    return found if isinstance(found, tuple) else ()


def leaves_of(axes: Axes, entry: str, node: fx.Node) -> set[Axis]:
    """Leaves of a node's value, or of all its values."""
    return _leaves(axes.facts[entry], node)


def axis_leaves(dims: Dims) -> set[Axis]:
    """All leaves of some axes."""
    return {part for axis in dims for part in algebra.leaves(axis)}
