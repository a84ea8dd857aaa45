"""Roles of axes, read off their consumers, never off names."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Set
from typing import Any

from torch import fx

from graphprune.axes import algebra
from graphprune.axes.adapters import adapters
from graphprune.axes.algebra import Axis
from graphprune.axes.analysis import Axes, axis_leaves, dims_of, leaves_of
from graphprune.axes.facts import Contraction, Facts
from graphprune.ir.graph import op_name

ROLES = (
    "head",
    "kv_group",
    "queries_per_group",
    "qk_dim",
    "v_dim",
    "neuron",
    "rank",
    "pooled",
    "residual",
    "vocab",
    "expert",
    "other",
)
_POOLING = {
    "select", "index", "gather", "mean", "sum", "amax", "max", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "flatten", "slice",
}  # fmt: skip


def roles(axes: Axes) -> dict[Axis, str]:
    """The role of every leaf that has one; all others are "other"."""
    found: dict[Axis, str] = {}
    for name, facts in axes.facts.items():
        graph = axes.program.entries[name].graph
        walk = Walk(axes, name, facts, graph)
        for axis, role in walk.roles():
            found.setdefault(axis, role)
    return found


def between_weights(axes: Axes) -> set[Axis]:
    """Leaves that a product with a weight makes, or sums over."""
    found: set[Axis] = set()
    for name, facts in axes.facts.items():
        walk = Walk(axes, name, facts, axes.program.entries[name].graph)
        found |= walk.consumed.keys() | walk.produced.keys()
    return found


def operands(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The two operands of a sum, in both orders; nothing for other nodes."""
    if op_name(node) not in {"add", "add_"} or len(node.all_input_nodes) != 2:
        return []
    a, b = node.all_input_nodes
    return [(a, b), (b, a)]


class Walk:
    """One entry graph, with who descends from whom."""

    def __init__(self, axes: Axes, name: str, facts: Facts, graph: fx.Graph) -> None:
        self.axes, self.name, self.facts = axes, name, facts
        self.nodes = list(graph.nodes)
        self.number = {node: i for i, node in enumerate(self.nodes)}
        self.ancestors: dict[fx.Node, int] = {}
        for node in self.nodes:
            bits = 0
            if op_name(node) != "sym_size":  # of values, not of sizes alone
                for source in node.all_input_nodes:
                    bits |= self.ancestors[source] | (1 << self.number[source])
            self.ancestors[node] = bits
        self.weighted = [c for c in facts.contractions if c.kind == "weights"]
        self.consumed: dict[Axis, list[Contraction]] = {}
        for contraction in self.weighted:
            for leaf in algebra.leaves(contraction.axis):
                self.consumed.setdefault(leaf, []).append(contraction)
        self.produced = self._produced()

    def roles(self) -> Iterable[tuple[Axis, str]]:
        """(leaf, role), the strongest claim first."""
        for axis in self.facts.experts:
            yield from ((leaf, "expert") for leaf in algebra.leaves(axis))
        for node, axis in self.facts.gathered:
            role = "vocab" if self._from_input(node) else "other"
            yield from ((leaf, role) for leaf in algebra.leaves(axis))
        yield from self._attention()
        residual = self._residual()
        for leaf in residual:
            yield leaf, "residual"
        for leaf in self._ranks():
            yield leaf, "rank"
        for leaf in self.consumed:
            if leaf in self.produced:
                yield leaf, "pooled" if self._pooled(leaf) else "neuron"

    def after(self, node: fx.Node, ancestor: fx.Node) -> bool:
        return node is ancestor or bool(self.ancestors[node] >> self.number[ancestor] & 1)

    def _from_input(self, node: fx.Node) -> bool:
        return any(n.op == "placeholder" and self.after(node, n) for n in self.nodes)

    def _produced(self) -> dict[Axis, list[fx.Node]]:
        """Leaves that come out of a product with a weight, and where."""
        produced: dict[Axis, list[fx.Node]] = {}
        for contraction in self.weighted:
            inputs = leaves_of(self.axes, self.name, contraction.operand)
            for other in contraction.node.all_input_nodes:
                if other is contraction.operand:
                    continue
                fresh = leaves_of(self.axes, self.name, other) - inputs
                output = leaves_of(self.axes, self.name, contraction.node)
                for leaf in fresh & output:
                    produced.setdefault(leaf, []).append(contraction.node)
        # A square weight has one axis on both sides: it is produced all the same.
        for contraction in self.weighted:
            output = leaves_of(self.axes, self.name, contraction.node)
            for leaf in axis_leaves((contraction.axis,)) & output:
                produced.setdefault(leaf, []).append(contraction.node)
        return produced

    def _attention(self) -> Iterable[tuple[Axis, str]]:
        for _, role, axis in self.facts.attention:
            if role != "head":
                continue
            # Other factors are the batch, or windows that were folded into it.
            static = [
                f for f in algebra.factors(axis) if set(algebra.leaves(f)) & set(self.produced)
            ]
            for i, factor in enumerate(static):
                name = "head" if len(static) == 1 else "kv_group" if i == 0 else "queries_per_group"
                yield from ((leaf, name) for leaf in algebra.leaves(factor))
        for _, role, axis in self.facts.attention:
            if role != "head":
                for leaf in algebra.leaves(axis):
                    if leaf in self.produced:
                        yield leaf, role

    def _ranks(self) -> Iterable[Axis]:
        """Leaves between the two products of an adapter."""
        for adapter in adapters(self.axes.program.entries[self.name].graph):
            for layer in adapter.inner:
                yield from axis_leaves((dims_of(self.axes, self.name, layer.node)[layer.dim],))

    def _residual(self) -> set[Axis]:
        """Leaves of sums x + f(x) where f contracts the very axis that it is added to."""
        return {
            leaf for node in self.nodes for x, f in operands(node) for leaf in self.returned(f, x)
        }

    def returned(self, f: fx.Node, x: fx.Node) -> set[Axis]:
        """Leaves of x that f has too, and sums over by weights on the way from x."""
        shared = axis_leaves(dims_of(self.axes, self.name, x)) & axis_leaves(
            dims_of(self.axes, self.name, f)
        )
        return {
            leaf
            for leaf in shared
            if any(
                self.after(f, c.node) and self.after(c.node, x) for c in self.consumed.get(leaf, ())
            )
        }

    def _pooled(self, leaf: Axis) -> bool:
        """Whether the leaf lives where the positions are gone, after what removed them.

        What goes back to positions, as the gate of squeeze and excitation does, is a neuron.
        """
        for contraction in self.consumed[leaf]:
            # Positions here, though they may be flattened into the features of a later weight.
            summed = set(algebra.leaves(contraction.axis))
            places = self._positions(contraction.operand, self.produced.keys() | summed)
            if places or self._goes_back(contraction.node):
                return False
        return any(
            op_name(node) in _POOLING
            and any(self.after(source, node) for source in self.produced[leaf])
            and self._positions(node.all_input_nodes[0])
            and not self._positions(node)
            for node in self.nodes
            if node.op == "call_function" and node.all_input_nodes
        )

    def _goes_back(self, node: fx.Node) -> bool:
        """Whether something after a value has positions again."""
        return any(self.after(n, node) for n in self._placed)

    @functools.cached_property
    def _placed(self) -> list[fx.Node]:
        return [n for n in self.nodes if n.op == "call_function" and self._positions(n)]

    @functools.cached_property
    def _batch(self) -> set[Any]:
        entry = self.axes.program.entries[self.name]
        return {
            n.meta["val"].shape[0].node.expr
            for n in self.nodes
            if n.op == "placeholder" and 0 in entry.dynamic.get(n.name, {})
        }

    def _positions(self, node: fx.Node, features: Set[Axis] | None = None) -> set[Axis]:
        """Leaves of a value that are neither the batch nor features: of any weight, or those given.

        Args:
            node: the value.
            features: leaves that are features there.
        """
        if features is None:
            features = self.consumed.keys() | self.produced.keys()
        return {
            leaf
            for leaf in axis_leaves(dims_of(self.axes, self.name, node))
            if leaf.size != 1 and leaf.size not in self._batch and leaf not in features
        }
