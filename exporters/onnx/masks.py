"""Attention masks as finite biases, made once for all the attentions that share them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphprune.exporters.onnx.patterns import expression, same, unchanged
from graphprune.ir.graph import bound_arguments, is_op, value_of

_aten = torch.ops.aten
# Just above the lowest float32: ORT 1.31 takes rows of exactly that for rows that see nothing, but
# in torch a model that writes it there means an even distribution.
LOWEST = -3.4e38


@dataclass
class Biases:
    """One bias and one row mask for each mask of the graph, made where it is first used."""

    graph: fx.Graph
    made: dict[Any, tuple[fx.Node, fx.Node]] = field(default_factory=dict)

    def of(
        self, mask: fx.Node | None, query: fx.Node, key: fx.Node
    ) -> tuple[fx.Node | None, fx.Node | None]:
        """Finite bias [batch or 1, heads or 1, length, positions], and which rows see something."""
        if mask is None:
            return None, None
        mask = unchanged(mask)
        sizes = value_of(query).shape[2], value_of(key).shape[2]
        known = (mask, *map(expression, sizes))
        if known not in self.made:
            self.made[known] = self._make(mask, query, key)
        return self.made[known]

    def _make(self, mask: fx.Node, query: fx.Node, key: fx.Node) -> tuple[fx.Node, fx.Node]:
        call = self.graph.call_function
        mask = narrowed(mask)
        shape = list(value_of(mask).shape)
        boolean = value_of(mask).dtype is torch.bool
        for _ in range(4 - len(shape)):
            mask = call(_aten.unsqueeze.default, (mask, 0))
            shape.insert(0, 1)
        if boolean:
            bias = call(_aten.where.Scalar, (mask, 0.0, LOWEST))
            alive = call(_aten.amax.default, (as_float(mask), [-1], True))
        else:
            mask = as_float(mask)
            bias = call(_aten.clamp_min.default, (mask, LOWEST))
            top = call(_aten.amax.default, (mask, [-1], True))
            alive = as_float(call(_aten.gt.Scalar, (top, -math.inf)))
        wanted = value_of(query).shape[2], value_of(key).shape[2]
        if not same(shape[2:], wanted):
            sizes = [call(_aten.sym_size.int, (x, 2)) for x in (query, key)]
            bias = call(_aten.expand.default, (bias, [-1, -1, *sizes]))
        alive.meta["val"] = torch.empty(1, shape[1], 1, 1, device="meta")
        return bias, alive


def as_float(node: fx.Node) -> fx.Node:
    return node.graph.call_function(_aten.to.dtype, (node, torch.float32))


def narrowed(mask: fx.Node) -> fx.Node:
    """A mask of fewer elements that broadcasts to this one, with whatever is always true left out.

    1. expand(m)                                     ->  m
    2. m & (arange(n) >= 0), m & ones                ->  m
    3. m[arange(batch)[:, None], arange(n)]          ->  m, its dimensions moved apart
    """
    mask = unchanged(mask)
    if is_op(mask, "expand"):
        return narrowed(_first(mask))
    if is_op(mask, "__and__", "bitwise_and", "logical_and"):
        sides = [a for a in mask.args if isinstance(a, fx.Node)]
        left = [side for side in sides if not _always_true(side)]
        if len(sides) == 2 and value_of(mask).dtype is torch.bool:
            if len(left) < 2:
                return narrowed((left or sides)[0])
            return _computed(mask, _aten.bitwise_and.Tensor, *map(narrowed, left))
    if is_op(mask, "index"):
        return _whole(mask) or mask
    return mask


def _whole(node: fx.Node) -> fx.Node | None:
    """The tensor whose every element an index takes in order, with dimensions of one between."""
    source, indices = node.args[:2]
    assert isinstance(source, fx.Node)
    assert isinstance(indices, Sequence)
    shape, rank = value_of(source).shape, value_of(node).dim()
    if len(indices) != len(shape) or not all(isinstance(i, fx.Node) for i in indices):
        return None
    counted = [_counted(index) for index in indices if isinstance(index, fx.Node)]
    places = [rank + place for place, _ in filter(None, counted)]
    sizes = [size for _, size in filter(None, counted)]
    if places != sorted(set(places)) or not same(sizes, shape):
        return None
    for place in (d for d in range(rank) if d not in places):
        source = _computed(node, _aten.unsqueeze.default, source, place)
    return source


def _counted(node: fx.Node) -> tuple[int, Any] | None:
    """Which dimension (-1: the last) of a tensor counts 0, 1 ..., and its size; others are one."""
    node = unchanged(node)
    if is_op(node, "arange"):
        a = bound_arguments(node)
        if (
            a.get("start", 0) == 0
            and a.get("step", 1) == 1
            and not value_of(node).is_floating_point()
        ):
            return -1, value_of(node).shape[0]
        return None
    if is_op(node, "add") and node.args[1] == 0 and isinstance(node.args[0], fx.Node):
        return _counted(node.args[0])
    if is_op(node, "unsqueeze") and (found := _counted(_first(node))):
        new = bound_arguments(node)["dim"] % value_of(node).dim() - value_of(node).dim()
        return found[0] - (new > found[0] - 1), found[1]  # a dimension after it moves it forward
    return None


def _always_true(node: fx.Node) -> bool:
    node = unchanged(node)
    if value_of(node).dtype is not torch.bool:
        return False
    if is_op(node, "ones", "new_ones", "ones_like"):
        return True
    if is_op(node, "ge"):
        a = bound_arguments(node)
        return a["other"] == 0 and _counted(a["self"]) is not None
    if is_op(node, "expand", "unsqueeze"):
        return _always_true(_first(node))
    if is_op(node, "__and__", "bitwise_and", "logical_and"):
        return all(isinstance(a, fx.Node) and _always_true(a) for a in node.args)
    return False


def _computed(before: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A call with the value that it computes."""
    node: fx.Node = before.graph.call_function(target, args)
    node.meta["val"] = target(*(value_of(a) if isinstance(a, fx.Node) else a for a in args))
    return node


def _first(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source
