"""Operators that only spell others differently, written as those.

    multiply(x, y)              becomes   mul(x, y)
    hstack([x, y])              becomes   cat([x, y], 1)
    tensordot(x, w, [2], [1])   becomes   permute, reshape and mm

Axis rules, exporters, costs and saved programs then see one operator where torch has many names.
What it becomes is torch's own decomposition, so that types, gradients and symbolic sizes are
torch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._decomp import get_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx

from graphprune.axes.ruleless import SPELLINGS
from graphprune.axes.rules import RULES
from graphprune.capture.functionalize import functionalize
from graphprune.ir.graph import is_op, op_name
from graphprune.storage.allowlist import is_arithmetic, on_tensors

# What these become first, which no model calls by itself.
_INSIDE = ("_weight_norm_interface",)


def respell(graph: fx.Graph) -> None:
    """Write calls of `SPELLINGS` as operators that have a rule, in place.

    A call stays where its decomposition needs an operator without one: a nuclear norm by `svd`.
    """
    for node in list(graph.nodes):
        if not is_op(node, *SPELLINGS):
            continue
        body = _decomposed(node)
        if all(_known(inner) for inner in body.nodes):
            _replace(graph, node, body)


def _decomposed(node: fx.Node) -> fx.Graph:
    """A call as a graph: a placeholder for each node among its arguments, in their order."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    table = _table()

    def call(*values: Any) -> Any:
        inputs = iter(values)
        given = [next(inputs) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(given, spec)
        result = table[node.target](*args, **kwargs)
        return list(result) if isinstance(result, tuple | list) else result

    values = [given.meta["val"] for given in _nodes(node)]
    mode = detect_fake_mode(values)
    assert mode is not None
    # Before dispatch composite operators are still whole: those with a rule stay so.
    with mode, enable_python_dispatcher():
        body = make_fx(call, decomposition_table=table, pre_dispatch=True)(*values).graph
    functionalize(body)
    body.eliminate_dead_code()
    return body


@functools.cache
def _table() -> Mapping[Any, Callable[..., Any]]:
    """Decompositions of each overload of `SPELLINGS`, and of the operators that these become."""
    import torch._refs  # registers decompositions

    packets = [getattr(torch.ops.aten, name) for name in (*sorted(SPELLINGS), *_INSIDE)]
    overloads = [getattr(packet, name) for packet in packets for name in packet.overloads()]
    overloads = [overload for overload in overloads if on_tensors(overload)]
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    composite = [overload for overload in overloads if overload.has_kernel_for_dispatch_key(key)]
    return get_decompositions(overloads) | {overload: overload.decompose for overload in composite}


def _known(node: fx.Node) -> bool:
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if not isinstance(node.target, torch._ops.OpOverload):
        return is_arithmetic(node.target)
    return op_name(node) in RULES and not node.target._schema.is_mutable


def _replace(graph: fx.Graph, node: fx.Node, body: fx.Graph) -> None:
    """Put a body in the place of a call; its result takes over the name."""
    inputs = iter(_nodes(node))
    memo: dict[fx.Node, Any] = {}
    made: set[fx.Node] = set()
    result: Any = None
    with graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op == "placeholder":
                memo[inner] = next(inputs)
            elif inner.op == "output":
                result = fx.node.map_arg(inner.args[0], memo.__getitem__)
            else:
                memo[inner] = graph.node_copy(inner, memo.__getitem__)
                memo[inner].meta = {**node.meta, "val": inner.meta["val"]}
                made.add(memo[inner])
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:  # torch.export reads the parts of a list by getitem alone
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)
    if isinstance(result, fx.Node) and result in made:
        result.name = node.name


def _nodes(node: fx.Node) -> list[fx.Node]:
    """The nodes among a call's arguments, once for each place."""
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
