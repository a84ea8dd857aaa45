"""Make a captured graph functional: no regions, no writes into tensors that others see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphprune.errors import CaptureError
from graphprune.graph import bound_arguments, op_name

# Regions that only change a mode around the calls inside them.
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
# Views whose write-back is an operator of its own.
_SCATTER = {"slice": "slice_scatter", "select": "select_scatter"}
# Results that share memory with their first input.
_VIEWS = {
    "view", "reshape", "unsqueeze", "squeeze", "transpose", "permute", "t", "expand", "slice",
    "select", "split", "split_with_sizes", "chunk", "unbind", "narrow", "flatten", "unflatten",
    "numpy_T", "detach", "alias", "contiguous", "to", "diagonal", "view_as", "expand_as",
    "movedim", "swapaxes", "getitem", "real", "imag", "_unsafe_view", "mT", "mH", "adjoint",
}  # fmt: skip


def inline_regions(module: fx.GraphModule, graph: fx.Graph) -> None:
    """Replace calls of grad-mode and autocast regions by what is inside them."""
    for node in list(graph.nodes):
        skipped = _REGIONS.get(getattr(node.target, "__name__", ""))
        if node.op != "call_function" or skipped is None:
            continue
        region = node.args[skipped]
        results = _inlined(graph, node, getattr(module, region.target).graph, skipped + 1)
        for user in list(node.users):
            if op_name(user) == "getitem":
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
        if node.users:
            node.replace_all_uses_with(results[0])
        graph.erase_node(node)
        if not region.users:
            graph.erase_node(region)


def _inlined(graph: fx.Graph, call: fx.Node, body: fx.Graph, first: int) -> Sequence[Any]:
    """Copy a region's nodes before its call, whose inputs begin at argument `first`."""
    inputs = iter(call.args[first:])
    memo: dict[fx.Node, Any] = {}
    results: Any = ()
    with graph.inserting_before(call):
        for inner in body.nodes:
            if inner.op == "placeholder":
                memo[inner] = next(inputs)
            elif inner.op == "output":
                results = fx.node.map_arg(inner.args[0], memo.__getitem__)
            else:
                memo[inner] = graph.node_copy(inner, memo.__getitem__)
    return (results,) if isinstance(results, fx.Node) else results


def functionalize(graph: fx.Graph) -> None:
    """Turn in-place operators into functional ones, and writes through views into scatters.

    x.add_(y)              becomes   x2 = x + y,  later uses of x read x2
    x[a:b].copy_(y)        becomes   x2 = slice_scatter(x, y, a, b)

    Raises:
        CaptureError: a write through a view that has no scatter form.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op != "call_function" or not _mutates(node):
            continue
        target = node.args[0]
        with graph.inserting_after(node):
            new = graph.call_function(_functional(node), node.args, dict(node.kwargs))
        new.meta = dict(node.meta)
        order[new] = order[node]
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        _replace_after(graph, target, new, order)


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _functional(node: fx.Node) -> Any:
    name = op_name(node)
    if name == "copy_":
        return torch.ops.aten.copy.default
    if not name.endswith("_"):
        raise CaptureError(
            f"operator {node.target} at {node.name!r} writes to its inputs and has no functional "
            "form; rewrite that line of the model without it"
        )
    packet = getattr(torch.ops.aten, name[:-1], None)
    overload = getattr(packet, getattr(node.target, "_overloadname", ""), None) if packet else None
    if overload is None:
        raise CaptureError(f"operator {node.target} at {node.name!r} has no functional form")
    return overload


def _replace_after(
    graph: fx.Graph, target: fx.Node, new: fx.Node, order: dict[fx.Node, int]
) -> None:
    """Let everything after `new` that reads `target`, or memory it shares, read the new value."""
    now = order[new]
    for user in [u for u in target.users if u is not new and order.get(u, now + 1) > now]:
        user.replace_input_with(target, new)
    for view in [u for u in target.users if op_name(u) in _VIEWS and order.get(u, 0) < now]:
        if _read_after(view, now, order):
            raise CaptureError(
                f"{new.name!r} writes to memory that the view {view.name!r} reads later; "
                "rewrite that line of the model without the in-place operator"
            )
    if op_name(target) not in _VIEWS:
        return
    base = target.args[0]
    if not isinstance(base, fx.Node) or not _memory_read_after(base, now, order):
        return
    scatter = _SCATTER.get(op_name(target))
    if scatter is None:
        raise CaptureError(
            f"{new.name!r} writes through {target.name!r} ({op_name(target)}), which has no "
            "functional form; rewrite that line of the model without the in-place operator"
        )
    bound = bound_arguments(target)
    overload = getattr(getattr(torch.ops.aten, scatter), "default")  # noqa: B009
    rest = [v for k, v in bound.items() if k != "self"]
    with graph.inserting_after(new):
        written = graph.call_function(overload, (base, new, *rest))
    written.meta = dict(base.meta)
    order[written] = now
    _replace_after(graph, base, written, order)


def _memory_read_after(node: fx.Node, now: int, order: dict[fx.Node, int]) -> bool:
    """Whether the value, or one that it is a view of, is read later."""
    if _read_after(node, now, order):
        return True
    base = node.args[0] if op_name(node) in _VIEWS else None
    return isinstance(base, fx.Node) and _memory_read_after(base, now, order)


def _read_after(node: fx.Node, now: int, order: dict[fx.Node, int]) -> bool:
    return any(order.get(u, now + 1) > now for u in node.users)
