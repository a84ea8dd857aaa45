"""Typed helpers over torch.fx graphs: the one place that knows fx's loose ends."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from graphprune.errors import VerificationError


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
    """What the graph returns: nodes, and plain values such as None."""
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


def symbol_inputs(
    example: Sequence[Tensor], names: Sequence[str], dynamic: Mapping[str, Mapping[int, str]]
) -> tuple[FakeTensorMode, list[Tensor]]:
    """Fake inputs whose dynamic dimensions are symbols; equal symbol names are one symbol."""
    env = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    symbols: dict[str, Any] = {}
    for name, tensor in zip(names, example, strict=True):
        for dim, symbol in dynamic.get(name, {}).items():
            if symbol not in symbols and len(terms(symbol)) == 1:
                source, size = ConstantSource(symbol), tensor.shape[dim]
                expression = env.create_symbol(
                    size, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
                )
                symbols[symbol] = env.create_symintnode(expression, hint=size, source=source)
    fakes: list[Tensor] = []
    for name, tensor in zip(names, example, strict=True):
        sizes: list[Any] = list(tensor.shape)
        for dim, symbol in dynamic.get(name, {}).items():
            sizes[dim] = sum(symbols[term] for term in terms(symbol))
        with mode:
            fakes.append(torch.empty(sizes, dtype=tensor.dtype, device=tensor.device))
    return mode, fakes


class _Propagator(fx.Interpreter):
    """Runs a graph on fake tensors and writes what each node computes to its metadata."""

    def __init__(
        self, graph: fx.Graph, tensors: Mapping[str, Tensor], mode: FakeTensorMode
    ) -> None:
        super().__init__(torch.nn.Module(), garbage_collect_values=False, graph=graph)
        self.tensors, self.mode = tensors, mode
        self.fakes: dict[str, Tensor] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target not in self.fakes:
            self.fakes[target] = self.mode.from_tensor(self.tensors[target], static_shapes=True)
        return self.fakes[target]

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as e:
            raise VerificationError(
                f"node {n.name!r} ({n.target}) does not fit its inputs "
                f"{[_shape(a) for a in n.all_input_nodes]}: {_fact(e)}"
            ) from e
        n.meta["val"] = value
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in _ARITHMETIC:
            _check_numbers(target, args)
        value = super().call_function(target, args, kwargs)
        if not _fits(value):
            raise OverflowError("it gives a number of more than 64 bits")
        return value


# Python's own, on sizes. A graph may come from a file, and Python's numbers have no end.
_ARITHMETIC = {operator.mul, operator.add, operator.pow, math.pow}


def _check_numbers(target: Any, args: Sequence[Any]) -> None:
    """Refuse what would not end, or fill the memory, before the result is there to look at."""
    if any(isinstance(a, str | bytes | list | tuple) for a in args):
        raise TypeError("it computes with sizes, which are numbers")
    if target is operator.pow and len(args) == 2:
        base, exponent = (_number(a) for a in args)
        if abs(base) > 1 and abs(exponent) > 63:
            raise OverflowError("it gives a number of more than 64 bits")


def _number(value: Any) -> Any:
    return value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat) else value


def _fits(value: Any) -> bool:
    number = _number(value) if isinstance(value, int | torch.SymInt) else 0
    return -(2**63) <= number < 2**63


def _fact(error: Exception) -> str:
    """The first line of an error: fx and the fake tensors append pages of their own."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"{node.name}{list(value.shape)}" if isinstance(value, Tensor) else node.name


def propagate(
    graph: fx.Graph,
    tensors: Mapping[str, Tensor],
    example: Sequence[Tensor],
    dynamic: Mapping[str, Mapping[int, str]],
) -> None:
    """Recompute `meta["val"]` of every node from the tensors, under symbolic input dimensions.

    Raises:
        VerificationError: the graph and the tensors do not fit; the first such node is named.
    """
    names = [n.name for n in graph.nodes if n.op == "placeholder"]
    mode, fakes = symbol_inputs(example, names, dynamic)
    # The Python dispatcher gives symbolic sizes to operators whose C++ form takes integers only.
    with mode, enable_python_dispatcher(), torch.no_grad():
        _Propagator(graph, tensors, mode).run(*fakes)
