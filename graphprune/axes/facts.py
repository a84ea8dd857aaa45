"""Records of the analysis of axes about a graph."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.axes import algebra
from graphprune.axes.algebra import Axis, Size

Dims = tuple[Axis, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Contraction:
    """An axis that disappears in a sum at a node: where the mask of a removed unit belongs.

    Attributes:
        node: the operator that sums.
        operand: the node that is summed over, given as argument `slot`.
        slot: schema name of that argument; "name:i" for the i-th of a list.
        dim: its dimension that vanishes, and the axis of it.
        kind: "weights" (with a parameter), "activations" (of two activations), or "reduction".
    """

    node: fx.Node
    operand: fx.Node
    slot: str
    dim: int
    axis: Axis
    kind: str


@dataclass(slots=True)
class Facts:
    """Results of the walk over one entry graph.

    Attributes:
        dims: the axes of every value.
        extra: axes that a call's rewriter needs.
        contractions: where axes are summed over.
        attention: the part that axes play in attention.
        gathered: (index, axis of the table) of every lookup.
        experts: axes of experts.
        picked: (call, axis, number) of every unit that is read by its number.
        weights: values made of tensors of the program and of sizes alone.
        activations: values that depend on the inputs' values.
        learned: activations that depend on a weight matrix too.
    """

    dims: dict[fx.Node, Any] = field(default_factory=dict)
    extra: dict[fx.Node, dict[str, Axis]] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    attention: list[tuple[fx.Node, str, Axis]] = field(default_factory=list)
    gathered: list[tuple[fx.Node, Axis]] = field(default_factory=list)
    experts: list[Axis] = field(default_factory=list)
    picked: list[tuple[fx.Node, Axis, int]] = field(default_factory=list)
    weights: set[fx.Node] = field(default_factory=set)
    activations: set[fx.Node] = field(default_factory=set)
    learned: set[fx.Node] = field(default_factory=set)

    def on(self, graph: fx.Graph) -> Facts:
        """The same facts about a copy of the graph: about its nodes of the same names."""
        of = {node.name: node for node in graph.nodes}
        return Facts(
            dims={of[n.name]: dims for n, dims in self.dims.items()},
            extra={of[n.name]: dict(axes) for n, axes in self.extra.items()},
            contractions=[
                replace(c, node=of[c.node.name], operand=of[c.operand.name])
                for c in self.contractions
            ],
            attention=[(of[n.name], role, axis) for n, role, axis in self.attention],
            gathered=[(of[n.name], axis) for n, axis in self.gathered],
            experts=list(self.experts),
            picked=[(of[n.name], axis, number) for n, axis, number in self.picked],
            weights={of[n.name] for n in self.weights},
            activations={of[n.name] for n in self.activations},
            learned={of[n.name] for n in self.learned},
        )


def size_of(size: Any) -> Size:
    """A torch size as an int or a sympy expression."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_Integer else expression
    return int(size)


def frozen_like(value: Any, reason: str) -> Any:
    """Frozen leaves for a value: a tensor, or a tuple or list of them."""
    if isinstance(value, Tensor):
        dims = tuple(algebra.leaf(size_of(s)) for s in value.shape)
        for axis in dims:
            algebra.freeze(axis, reason)
        return dims
    if isinstance(value, (tuple, list)):
        return [frozen_like(v, reason) for v in value]
    return ()
