"""Typed helpers over torch.fx graphs: the one place that knows fx's quirks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx


def op_name(node: fx.Node) -> str:
    """The base name of what a node calls: "linear" for aten.linear.default."""
    if node.op != "call_function":
        return node.op
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return getattr(node.target, "__name__", str(node.target))


def is_op(node: fx.Node, *names: str) -> bool:
    """Whether the node calls one of these operators, whatever the overload."""
    return node.op == "call_function" and op_name(node) in names


def has_effect(node: fx.Node) -> bool:
    """Whether a node matters beyond its result."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and (schema.is_mutable or not schema.returns)


def erase_dead(graph: fx.Graph) -> list[str]:
    """Erase nodes without users and without effect, in place; return their names."""
    erased = []
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in {"call_function", "get_attr"} and not has_effect(node):
            erased.append(node.name)
            graph.erase_node(node)
    return erased[::-1]


def value_of(node: fx.Node) -> Any:
    """The fake tensor, symbolic integer, or tuple of them that the node computes."""
    return node.meta["val"]


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Copy a graph, keeping node names: fx renames a placeholder called `input` when it copies."""
    copied = fx.Graph()
    memo: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        new = copied.node_copy(node, lambda n: memo[n])
        if new.name != node.name:
            new.name = node.name
        new.meta = dict(node.meta)
        memo[node] = new
    return copied


def tensor_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """The get_attr nodes: reads of the program's tensors."""
    return (n for n in graph.nodes if n.op == "get_attr")


def output_node(graph: fx.Graph) -> fx.Node:
    """The single output node, always the last."""
    return next(iter(reversed(graph.nodes)))


def flat_outputs(graph: fx.Graph) -> tuple[Any, ...]:
    """The flat outputs of a graph: nodes, and plain values such as None."""
    values: Any = output_node(graph).args[0]
    return tuple(values)


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an ATen call by their schema names, defaults filled in."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return dict(node.kwargs)
    bound: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        if not argument.kwarg_only and i < len(node.args):
            bound[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def set_bound(node: fx.Node, changed: Mapping[str, Any]) -> None:
    """Replace arguments of an ATen call by their schema names."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    bound = bound_arguments(node) | dict(changed)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in target._schema.arguments:
        if argument.name not in bound:
            continue
        if argument.kwarg_only:
            if argument.name in node.kwargs or argument.name in changed:
                kwargs[argument.name] = bound[argument.name]
        else:
            args.append(bound[argument.name])
    node.args, node.kwargs = tuple(args), kwargs


def terms(symbol: str) -> list[str]:
    """The sizes that a dynamic size is the sum of: "past+sequence" has two, others only their own.

    Every term is some dynamic dimension's size alone.
    """
    return symbol.split("+")


def location(node: fx.Node) -> str:
    """Where in the user's model a node comes from: its module path, else its name."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed([p for p, _ in stack.values()]), "") if stack else ""
    return path.removeprefix("L['self'].").removeprefix("L__self___") or node.name


def place(node: fx.Node) -> str:
    """An operator and its location, as reasons show it: `softmax` at encoder.layer.0."""
    return f"`{op_name(node)}` at {location(node)}"


_TRANSPOSES = {"t", "numpy_T", "transpose", "permute", "mT", "swapaxes"}
_COPIES = {"to", "contiguous", "clone", "detach", "alias"}


def weight_of(node: object) -> tuple[str | None, bool]:
    """The tensor that a node reads, and whether its last two dimensions are swapped on the way."""
    flipped = False
    while isinstance(node, fx.Node) and node.op != "get_attr":
        name = op_name(node)
        if name in _TRANSPOSES:
            before, after = node.all_input_nodes[0].meta["val"], node.meta["val"]
            if list(after.shape) != [*before.shape[:-2], before.shape[-1], before.shape[-2]]:
                return None, False
            marked = torch.empty([2 + i for i in range(before.dim())], device="meta")
            moved = node.target(marked, *node.args[1:], **node.kwargs)  # type: ignore[operator]
            if [s - 2 for s in moved.shape[-2:]] != [before.dim() - 1, before.dim() - 2]:
                return None, False
            flipped = not flipped
        elif name not in _COPIES:
            return None, False
        node = node.args[0]
    return (str(node.target), flipped) if isinstance(node, fx.Node) else (None, False)
