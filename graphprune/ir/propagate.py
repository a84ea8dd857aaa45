"""Shape propagation: one run of a graph on fake tensors with symbolic sizes."""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    free_unbacked_symbols,
)

from graphprune.errors import VerificationError, first_line
from graphprune.ir.graph import terms
from graphprune.ir.recurrent import any_length


def symbol_inputs(
    example: Sequence[Tensor], names: Sequence[str], dynamic: Mapping[str, Mapping[int, str]]
) -> tuple[FakeTensorMode, list[Any]]:
    """Fake inputs whose dynamic dimensions are symbols; equal symbol names are one symbol."""
    env = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    mode.cache_enabled = False  # its keys cost more than they save where sizes are symbols
    symbols: dict[str, Any] = {}
    for name, tensor in zip(names, example, strict=True):
        for dim, symbol in dynamic.get(name, {}).items():
            if symbol not in symbols and len(terms(symbol)) == 1:
                source, size = ConstantSource(symbol), tensor.shape[dim]
                expression = env.create_symbol(
                    size, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
                )
                symbols[symbol] = env.create_symintnode(expression, hint=size, source=source)
    fakes: list[Any] = []
    for name, tensor in zip(names, example, strict=True):
        sizes: list[Any] = list(tensor.shape)
        for dim, symbol in dynamic.get(name, {}).items():
            sizes[dim] = sum(symbols[term] for term in terms(symbol))
        with mode:
            fakes.append(torch.empty(sizes, dtype=tensor.dtype, device=tensor.device))
    return mode, fakes


@dataclass(slots=True)
class _Fakes:
    """Fake inputs, and what operators made of them: layers and later graphs repeat.

    Fake tensors of one shape are one object here, so that an operator and the objects that it is
    called with are a key.
    """

    mode: FakeTensorMode
    inputs: list[Any]
    alike: dict[Hashable, FakeTensor] = field(default_factory=dict)
    known: dict[Hashable, Any] = field(default_factory=dict)

    def share(self, fake: FakeTensor) -> FakeTensor:
        """The first fake tensor of this shape; one with a known value stays itself."""
        if not _is_shared(fake):
            return fake
        sizes = _key((*fake.shape, *fake.stride(), fake.storage_offset()))
        bits = fake.is_conj(), fake.is_neg()
        return self.alike.setdefault((sizes, fake.dtype, fake.device, type(fake), bits), fake)


class _DependsOnValues(Exception):
    """A size is one of the values of a tensor, so tensors of one shape differ."""


class _Propagator(fx.Interpreter):
    """Runs a graph on fake tensors and writes what each node computes to its metadata."""

    def __init__(
        self, graph: fx.Graph, tensors: Mapping[str, Tensor], fakes: _Fakes, *, lookup: bool
    ) -> None:
        super().__init__(torch.nn.Module(), garbage_collect_values=False, graph=graph)
        self.tensors, self.fakes, self.lookup = tensors, fakes, lookup
        self.read: dict[str, Tensor] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target not in self.read:
            fake = self.fakes.mode.from_tensor(self.tensors[target], static_shapes=True)
            self.read[target] = self.fakes.share(fake) if self.lookup else fake
        return self.read[target]

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except _DependsOnValues:
            raise
        except Exception as e:
            raise VerificationError(
                f"node {n.name!r} ({n.target}) does not fit its inputs "
                f"{[_shape(a) for a in n.all_input_nodes]}: {first_line(e)}"
            ) from e
        n.meta["val"] = value
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in _ARITHMETIC:
            _check_numbers(target, args)
        key = (target, _key(args), _key(kwargs))
        if self.lookup and key in self.fakes.known:
            return self.fakes.known[key]
        value = super().call_function(target, args, kwargs)
        if not _fits(value):
            raise OverflowError("it gives a number of more than 64 bits")
        if not self.lookup:
            return value
        if free_unbacked_symbols(value):
            raise _DependsOnValues
        value = pytree.tree_map_only(FakeTensor, self.fakes.share, value)
        if all(_lasts(x) for x in pytree.tree_leaves((args, kwargs))):
            self.fakes.known[key] = value
        return value


def _is_shared(fake: FakeTensor) -> bool:
    return fake.constant is None and fake.layout is torch.strided


def _lasts(argument: Any) -> bool:
    """Whether an argument's key stays its own: another object may get the `id` of one that went."""
    if isinstance(argument, FakeTensor):
        return _is_shared(argument)
    return isinstance(argument, _PLAIN)


# Arguments that `_key` knows by what they hold, or that are never freed.
_PLAIN = (
    int, float, complex, str, NoneType, torch.SymInt, torch.SymFloat, torch.SymBool,
    torch.dtype, torch.device, torch.layout, torch.memory_format, slice,
)  # fmt: skip


def _key(value: Any) -> Hashable:
    """Equal for arguments that an operator cannot tell apart; 1, 1.0 and True are not equal."""
    if isinstance(value, list | tuple):
        return tuple(_key(x) for x in value)
    if isinstance(value, Mapping):
        return tuple((name, _key(x)) for name, x in value.items())
    if isinstance(value, slice):
        return slice, _key(value.start), _key(value.stop), _key(value.step)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return type(value), value.node.expr
    if isinstance(value, int | float | complex | str | None | torch.dtype | torch.device):
        return type(value), value
    return type(value), id(value)


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
    try:
        _propagate(graph, tensors, example, dynamic, lookup=True)
    except _DependsOnValues:
        _propagate(graph, tensors, example, dynamic, lookup=False)


def _propagate(
    graph: fx.Graph,
    tensors: Mapping[str, Tensor],
    example: Sequence[Tensor],
    dynamic: Mapping[str, Mapping[int, str]],
    *,
    lookup: bool,
) -> None:
    names = [n.name for n in graph.nodes if n.op == "placeholder"]
    key = _key((names, [(t.shape, t.dtype, t.device) for t in example], dynamic))
    fakes = _recent.pop(key, None) if lookup else None
    if fakes is None:
        fakes = _Fakes(*symbol_inputs(example, names, dynamic))
    inputs = [fakes.share(x) for x in fakes.inputs] if lookup else fakes.inputs
    # The Python dispatcher gives symbolic sizes to operators whose C++ form takes integers only.
    with fakes.mode, enable_python_dispatcher(), any_length(), torch.no_grad():
        _Propagator(graph, tensors, fakes, lookup=lookup).run(*inputs)
    # A graph that ties sizes to each other, or to a number, must not do so for the next graph.
    env = fakes.mode.shape_env
    if lookup and env is not None and not env.replacements:
        _recent[key] = fakes
    while len(_recent) > _MOST_RECENT:
        del _recent[next(iter(_recent))]


_recent: dict[Hashable, _Fakes] = {}
_MOST_RECENT = 8
