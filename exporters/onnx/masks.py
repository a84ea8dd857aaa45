"""Attention masks as finite biases, made once for all the attentions that share them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphprune.exporters.onnx.patterns import expression, same, unchanged
from graphprune.ir.graph import value_of

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
        shape = list(value_of(mask).shape)
        boolean = value_of(mask).dtype is torch.bool
        for _ in range(4 - len(shape)):
            mask = call(_aten.unsqueeze.default, (mask, 0))
            shape.insert(0, 1)
        wanted = value_of(query).shape[2], value_of(key).shape[2]
        if not same(shape[2:], wanted):
            sizes = [call(_aten.sym_size.int, (x, 2)) for x in (query, key)]
            mask = call(_aten.expand.default, (mask, [-1, -1, *sizes]))
        if boolean:
            bias = call(_aten.where.Scalar, (mask, 0.0, LOWEST))
            seen = call(_aten.any.dim, (mask, -1, True))
        else:
            mask = call(_aten.to.dtype, (mask, torch.float32))
            bias = call(_aten.clamp_min.default, (mask, LOWEST))
            seen = call(_aten.gt.Scalar, (call(_aten.amax.default, (mask, [-1], True)), -math.inf))
        alive = call(_aten.to.dtype, (seen, torch.float32))
        alive.meta["val"] = torch.empty(1, shape[1], 1, 1, device="meta")
        return bias, alive
