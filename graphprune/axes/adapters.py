"""Adapters: narrow pairs of products that are added to a product of the same input.

    y = W x + c + s · B (A x)        A [rank, in], B [out, rank]; rank below in and out

They are found by what is computed, whatever it is called (LoRA, arXiv 2106.09685). A value that is
an affine function of some input is written as a sum of terms, each scales · factors · (the input or
a constant vector):

    W x + c             (W)  +  (c)
    u + v, k · u        the terms of both; every term's scales times k
    B (A x)             (B, A), where the product in the middle is narrow

so that several adapters at one layer, their biases, and a scale for each output (DoRA, arXiv
2402.09353) are read too: all of it is one matrix and one vector. Linear layers, lookups in tables
and convolutions (A has the layer's window, B has one tap) look the same, as [out, in · taps].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.axes.windows import Window
from graphprune.ir.graph import bound_arguments, has_effect, is_op, value_of, weight_of

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")
_SAME = ("contiguous", "clone", "detach", "alias")
# Operator -> names of its operand and weight, and whether the weight is stored [in, out].
_PRODUCTS: Mapping[str, tuple[str, str, bool]] = {
    "linear": ("input", "weight", False),
    "addmm": ("mat1", "mat2", True),
    "mm": ("self", "mat2", True),
    "matmul": ("self", "other", True),
    "embedding": ("indices", "weight", True),
    **dict.fromkeys(_CONVOLUTIONS, ("input", "weight", False)),
}


@dataclass(frozen=True, slots=True)
class Factor:
    """A weight as a matrix [out, in · taps]; stored [in, out] where it is transposed."""

    tensor: str
    transposed: bool

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The matrix, float64."""
        weight = tensors[self.tensor].double()
        return weight.T if self.transposed else weight.flatten(1)

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        """A matrix in the shape and type of the weight `like`."""
        shaped = matrix.T if self.transposed else matrix.reshape(like.shape)
        return shaped.to(like.dtype).contiguous()


@dataclass(frozen=True, slots=True)
class Term:
    """One summand: scales · factors, the outer first, of the input or of a constant vector."""

    scales: tuple[float | fx.Node, ...] = ()
    factors: tuple[Factor, ...] = ()
    vector: fx.Node | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """A product of an input with a weight: the node of its outputs, and what it reads.

    Attributes:
        node: its outputs, their channels at dimension `dim`, counted from the last.
        factor: the weight, of `columns` columns.
        bias: what it adds, or None.
    """

    node: fx.Node
    dim: int
    factor: Factor
    columns: int
    bias: fx.Node | None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A layer with all that is added to it, which is one product.

    Attributes:
        node: the sum.
        layer: the product that is adapted.
        terms: what the sum is of the layer's input.
        inner: the narrow products A x.
        nodes: what computes the sum from the layer's input, reads of tensors left out.
    """

    node: fx.Node
    layer: Layer
    terms: tuple[Term, ...]
    inner: tuple[Layer, ...]
    nodes: frozenset[fx.Node]

    def merged(
        self, tensors: Mapping[str, Tensor], value: Callable[[fx.Node], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The sum's matrix [out, in · taps] and vector [out], float64; None where nothing is added.

        Args:
            tensors: of the program.
            value: computes a node that depends on no input.
        """
        matrix, vector = None, None
        for term in self.terms:
            part = None if term.vector is None else _column(value(term.vector))
            for factor in reversed(term.factors):
                own = factor.matrix(tensors)
                part = own if part is None else own @ part
            assert part is not None
            for scale in term.scales:
                part = part * (scale if isinstance(scale, float) else _column(value(scale)))
            if term.vector is None:
                matrix = part if matrix is None else matrix + part
            else:
                vector = part if vector is None else vector + part
        assert matrix is not None
        return matrix, None if vector is None else vector.expand(len(matrix), 1).flatten()


def adapters(graph: fx.Graph) -> list[Adapter]:
    """The adapters of a graph, all that is added to one layer in one, in the graph's order."""
    views = _Views(graph)
    found: list[Adapter] = []
    within: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in within or not is_op(node, "add", "sub"):
            continue
        for view in views.of(node).values():
            if view.layer is not None and view.inner:
                found.append(Adapter(node, view.layer, view.terms, view.inner, view.nodes))
                within |= view.nodes
                break
    return found[::-1]


@dataclass(frozen=True, slots=True)
class _View:
    """A value as an affine function of one input."""

    terms: tuple[Term, ...]
    nodes: frozenset[fx.Node]
    layer: Layer | None = None
    inner: tuple[Layer, ...] = ()

    def scaled(self, by: float | fx.Node) -> _View:
        if by == 1.0:
            return self
        return replace(self, terms=tuple(replace(t, scales=(*t.scales, by)) for t in self.terms))

    def through(self, nodes: Iterable[fx.Node]) -> _View:
        return replace(self, nodes=self.nodes | {*nodes})


# What is read, and how: "rows", "table" or a window. Views of one key are of the same input.
_Key = tuple[fx.Node, str | Window]


@dataclass(slots=True)
class _Views:
    """What the values of a graph are of others; a key for each input that this holds of."""

    graph: fx.Graph
    found: dict[fx.Node, dict[_Key, _View]] = field(default_factory=dict)
    # Nodes that no input reaches, with those that compute them.
    constant: dict[object, frozenset[fx.Node]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.graph.nodes:
            if node.op == "get_attr":
                self.constant[node] = frozenset()
            elif node.op == "call_function" and not has_effect(node):
                parts = [self.constant.get(source) for source in node.all_input_nodes]
                if parts and None not in parts:
                    self.constant[node] = frozenset({node}).union(*filter(None, parts))
                elif views := self._views(node):
                    self.found[node] = views

    def of(self, node: object) -> dict[_Key, _View]:
        return self.found.get(node, {}) if isinstance(node, fx.Node) else {}

    def _views(self, node: fx.Node) -> dict[_Key, _View]:
        if not isinstance(value_of(node), Tensor):
            return {}
        if is_op(node, *_PRODUCTS):
            return self._product(node)
        if (same := _unchanged(node)) is not None:
            return {key: view.through({node}) for key, view in self.of(same).items()}
        if is_op(node, "reshape", "view", "_unsafe_view"):
            return self._unflattened(node)
        if is_op(node, "add", "sub"):
            return self._sum(node)
        return self._scaled(node) if is_op(node, "mul", "div") else {}

    def _product(self, node: fx.Node) -> dict[_Key, _View]:
        read = _read(node)
        if read is None or not {read.weight, read.layer.bias} <= {*self.constant, None}:
            return {}
        layer = read.layer
        own = {node} | self.constant[read.weight] | self.constant.get(layer.bias, frozenset())
        bias = () if layer.bias is None else (Term(vector=layer.bias),)
        terms = (Term(factors=(layer.factor,)), *bias)
        views = {(_source(read.operand), read.how): _View(terms, frozenset(own), layer)}
        if read.how == "rows" or (isinstance(read.how, Window) and _is_pointwise(read.how)):
            for key, view in self.of(read.operand).items():
                if _is_narrow(view, layer):
                    inner = tuple(
                        replace(t, factors=(layer.factor, *t.factors)) for t in view.terms
                    )
                    assert view.layer is not None
                    nodes = view.nodes | own
                    views[key] = _View(inner + bias, nodes, inner=(view.layer,))
        return views

    def _unflattened(self, node: fx.Node) -> dict[_Key, _View]:
        """Rows that were flattened for a product, and have their dimensions again."""
        found: dict[_Key, _View] = {}
        for (operand, how), view in self.of(node.args[0]).items():
            if how == "rows" and is_op(operand, "reshape", "view", "_unsafe_view"):
                source = operand.args[0]
                assert isinstance(source, fx.Node)
                layer = None if view.layer is None else replace(view.layer, node=node)
                outer, inner = _sizes(source), _sizes(node)
                columns = _sizes(operand)[-1] == outer[-1]
                features = inner[-1] == _sizes(node.args[0])[-1]
                if outer[:-1] == inner[:-1] and columns and features:
                    whole = replace(view, layer=layer).through({node, operand})
                    found[_source(source), how] = whole
        return found

    def _sum(self, node: fx.Node) -> dict[_Key, _View]:
        bound = bound_arguments(node)
        a, b = bound["self"], bound["other"]
        by = float(bound.get("alpha", 1)) * (-1.0 if is_op(node, "sub") else 1.0)
        if self.of(a) and self.of(b):
            if not _sizes(a) == _sizes(b) == _sizes(node):
                return {}
            return {
                key: _joined(view, other.scaled(by)).through({node})
                for key, view in self.of(a).items()
                if (other := self.of(b).get(key)) is not None
            }
        value, added = (a, b) if self.of(a) else (b, a)
        found = {}
        for key, view in self.of(value).items():
            if added in self.constant and _per_channel(added, value, node, _dim(key[1])):
                constant = _View((Term(vector=added),), self.constant[added])
                first, second = (view, constant) if value is a else (constant, view)
                found[key] = _joined(first, second.scaled(by)).through({node})
        return found

    def _scaled(self, node: fx.Node) -> dict[_Key, _View]:
        bound = bound_arguments(node)
        a, b = bound["self"], bound["other"]
        value, by = (a, b) if self.of(a) else (b, a)
        if isinstance(by, int | float):
            number = float(by) if is_op(node, "mul") else 1.0 / by
            return {k: v.scaled(number).through({node}) for k, v in self.of(value).items()}
        if by not in self.constant or is_op(node, "div"):
            return {}
        nodes = {node} | self.constant[by]
        return {
            key: view.scaled(by).through(nodes)
            for key, view in self.of(value).items()
            if _per_channel(by, value, node, _dim(key[1]))
        }


@dataclass(frozen=True, slots=True)
class _Read:
    """What a product reads, and how."""

    operand: fx.Node
    how: str | Window
    weight: fx.Node
    layer: Layer


def _read(node: fx.Node) -> _Read | None:
    """The product of an input with a weight of the program; None for other ones."""
    bound = bound_arguments(node)
    names = next(names for op, names in _PRODUCTS.items() if is_op(node, op))
    operand, weight, swapped = bound[names[0]], bound[names[1]], names[2]
    tensor, flipped = weight_of(weight)
    sizes = value_of(weight).shape
    if tensor is None or bound.get("alpha", 1) != 1 or bound.get("beta", 1) != 1:
        return None
    bias = bound.get("self") if is_op(node, "addmm") else bound.get("bias")
    how: str | Window = "table" if is_op(node, "embedding") else "rows"
    if is_op(node, *_CONVOLUTIONS):
        if flipped or bound.get("transposed") or bound.get("groups", 1) != 1:
            return None
        how = Window.of(bound, sizes[2:], False)
    elif len(sizes) != 2:
        return None
    columns = sizes[0] if swapped else sizes[1:].numel()
    factor = Factor(tensor, swapped != flipped)
    return _Read(operand, how, weight, Layer(node, _dim(how), factor, columns, bias))


def _is_narrow(view: _View, outer: Layer) -> bool:
    """Whether a view is one product, times numbers, with fewer outputs than both ends have."""
    if view.layer is None or view.inner or view.layer.dim != outer.dim:
        return False
    numbers = all(isinstance(s, float) for term in view.terms for s in term.scales)
    rows = int(value_of(outer.node).shape[outer.dim])
    return numbers and outer.columns < min(view.layer.columns, rows)


def _joined(a: _View, b: _View) -> _View:
    return _View(
        a.terms + b.terms,
        a.nodes | b.nodes,
        a.layer or b.layer,
        tuple(dict.fromkeys(a.inner + b.inner)),
    )


def _unchanged(node: fx.Node) -> fx.Node | None:
    """What a node hands on as it is; None where it computes."""
    if is_op(node, "to", "_to_copy"):
        given = node.args[0]
        same = isinstance(given, fx.Node) and value_of(given).dtype is value_of(node).dtype
    else:
        evaluated = is_op(node, "dropout") and not bound_arguments(node)["train"]
        same = evaluated or is_op(node, *_SAME)
    return node.args[0] if same else None  # type: ignore[return-value]


def _source(node: fx.Node) -> fx.Node:
    while (given := _unchanged(node)) is not None:
        node = given
    return node


def _dim(how: str | Window) -> int:
    return -1 - len(how.kernel) if isinstance(how, Window) else -1


def _is_pointwise(window: Window) -> bool:
    ones = set(window.kernel) == {1} and set(window.stride) == {1}
    return ones and set(window.padding) == {(0, 0)}


def _per_channel(constant: fx.Node, value: fx.Node, result: fx.Node, dim: int) -> bool:
    """Whether a constant differs along the channels of a value at most, and broadcasts to it."""
    if _sizes(value) != _sizes(result):
        return False
    sizes = list(value_of(constant).shape)
    return all(size == 1 for i, size in enumerate(sizes) if i - len(sizes) != dim)


def _sizes(node: Any) -> list[str]:
    # As text: comparing symbolic sizes would put a guard on them.
    return [str(size) for size in value_of(node).shape]


def _column(value: Tensor) -> Tensor:
    return value.to("cpu", torch.float64).reshape(-1, 1)
