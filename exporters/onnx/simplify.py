"""Computations of a graph written as ONNX Runtime computes them faster: sums and broadcasts."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphprune.exporters.onnx.patterns import same
from graphprune.ir.graph import bound_arguments, is_op, value_of

_aten = torch.ops.aten


def simplify(graph: fx.Graph) -> None:
    """Rewrite a graph with fresh metadata in place.

    1. sum(x * w, 1), x of [batch, length, width] and w of [batch, length, 1], as a pooling with a
       mask has it: one product w' x, instead of two walks through x.
    2. x / expand(y), of the shape that x has anyway: x / y.
    3. 1.0 - x of whole numbers x: 1.0 - float(x); torch.onnx promotes types, but not there.
    """
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            if is_op(node, "sum"):
                _sum(node)
            elif is_op(node, "add", "sub", "mul", "div"):
                _broadcast(node)
            elif is_op(node, "rsub"):
                _promote(node)


def _promote(node: fx.Node) -> None:
    """Give the first operand the type of the result."""
    x, wanted = node.args[0], value_of(node).dtype
    if isinstance(x, fx.Node) and value_of(x).dtype is not wanted:
        cast = node.graph.call_function(_aten.to.dtype, (x, wanted))
        cast.meta = {**x.meta, "val": value_of(x).to(wanted)}
        node.replace_input_with(x, cast)


def _sum(node: fx.Node) -> None:
    a = bound_arguments(node)
    product = a["self"]
    if a.get("dim") not in ([1], [-2]) or a.get("dtype") is not None or len(product.users) > 1:
        return
    if not is_op(product, "mul") or not all(isinstance(x, fx.Node) for x in product.args):
        return
    x, weights = product.args
    if not _weighted(x, weights):
        x, weights = weights, x
        if not _weighted(x, weights):
            return
    call = node.graph.call_function
    result = call(_aten.matmul.default, (call(_aten.transpose.int, (weights, 1, 2)), x))
    if not a["keepdim"]:
        result = call(_aten.squeeze.dim, (result, 1))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)


def _weighted(x: fx.Node, weights: fx.Node) -> bool:
    """Whether these are [batch, length, width] and [batch, length, 1] in float32."""
    values = value_of(x), value_of(weights)
    if any(v.dtype is not torch.float32 or v.dim() != 3 for v in values):
        return False
    many, one = (v.shape for v in values)
    return same(one, (*many[:2], 1)) and not same(many[2:], (1,))


def _broadcast(node: fx.Node) -> None:
    for place, wide in enumerate(node.args[:2]):
        other = node.args[1 - place]
        if not isinstance(wide, fx.Node) or not isinstance(other, fx.Node):
            return
        if not is_op(wide, "expand", "expand_as") or not isinstance(value_of(other), Tensor):
            continue
        if same(value_of(other).shape, value_of(node).shape):
            node.update_arg(place, wide.args[0])
