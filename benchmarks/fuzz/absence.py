"""The oracle: a captured graph run with units absent, by nothing but what its operators mean.

Beside every value goes a bool tensor of its shape, true where the element belongs to a removed
unit. It begins in the tensors (the slices that lose a unit) and follows from torch alone, not from
graphprune's axis rules:

    element by element   absent where an operand is
    sums                 absent terms are left out; the result is absent where every term is
    attention            as the two products and the softmax that it is
    recurrent layers     as anything else, once the absent terms of their first sum are left out
    anything else        absent where the result changes when absent elements are filled otherwise

What a sum is divided by stays the number of all its terms: a mean over fewer units is that of zeros
in their place. Values made of the model's tensors alone are computed whole, because a unit that is
taken out of an activation leaves the weights as they are; axes that no activation has (the rank of
a product of two weights) are the exception.

An output with an absent element that should not have one means that a removed unit reached
something that cannot do without it, such as a maximum.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

# Elementwise operators that torch does not tag as such; of `*_like` only the shape is read.
_POINTWISE = {
    "alias", "contiguous", "clone", "detach", "dropout", "alpha_dropout", "feature_dropout",
    "hardswish", "log_sigmoid", "to", "_to_copy", "zeros_like", "ones_like", "full_like", "fill",
    "lift_fresh", "lift_fresh_copy", "greater", "greater_equal", "less", "less_equal", "not_equal",
    "true_divide", "floor_divide", "rsub", "where", "masked_fill", "expand_as", "copy", "complex",
}  # fmt: skip
# Sums of products and reductions; name -> the argument, by position, that is only added.
_SUMS: dict[str, int | None] = {
    "linear": 2, "matmul": None, "mm": None, "bmm": None, "mv": None, "dot": None, "addmm": 0,
    "baddbmm": 0, "einsum": None, "grouped_mm": None, "conv1d": 2, "conv2d": 2, "conv3d": 2,
    "convolution": 2, "conv_transpose1d": 2, "conv_transpose2d": 2, "conv_transpose3d": 2,
    "cdist": None, "_cdist_forward": None, "cdist_forward": None,
    "sum": None, "mean": None, "linalg_vector_norm": None, "norm": None, "count_nonzero": None,
}  # fmt: skip

_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


@dataclass(slots=True)
class Run:
    """One evaluation with units absent.

    Attributes:
        outputs: flat.
        absent: a bool tensor an output, None where nothing of it is absent.
        weights_summed: whether values made of weights alone are summed over absent units.
        carried: whether an activation has absent elements beside present ones.
    """

    outputs: list[Any] = field(default_factory=list)
    absent: list[Tensor | None] = field(default_factory=list)
    weights_summed: bool = False
    carried: bool = False


class Evaluator:
    """Runs one entry graph with marked elements of its tensors absent."""

    def __init__(
        self, graph: fx.Graph, tensors: Mapping[str, Tensor], marks: Mapping[str, Tensor]
    ) -> None:
        self.graph, self.tensors, self.marks = graph, tensors, marks
        self.constant = _constants(graph)

    def run(
        self,
        inputs: Sequence[Tensor],
        input_marks: Sequence[Tensor | None],
        whole_weights: bool = True,
    ) -> Run:
        """Evaluate the graph.

        Args:
            inputs: flat.
            input_marks: a bool tensor for each input that has absent elements.
            whole_weights: compute values made of weights alone with all units.
        """
        values: dict[fx.Node, Any] = {}
        absent: dict[fx.Node, Any] = {}
        result = Run()
        given = iter(zip(inputs, input_marks, strict=True))
        with torch.no_grad():
            for node in self.graph.nodes:
                if node.op == "placeholder":
                    values[node], absent[node] = next(given)
                elif node.op == "get_attr":
                    values[node] = self.tensors[str(node.target)]
                    absent[node] = self.marks.get(str(node.target))
                elif node.op == "call_function":
                    whole = whole_weights and node in self.constant
                    values[node], absent[node] = _call(node, values, absent, whole)
                    self._note(node, absent, result)
                else:
                    flat = pytree.tree_leaves(node.args[0], is_leaf=lambda v: v is None)
                    result.outputs = [values.get(v, v) for v in flat]
                    result.absent = [absent.get(v) for v in flat]
        return result

    def _note(self, node: fx.Node, absent: Mapping[fx.Node, Any], result: Run) -> None:
        if node in self.constant:
            if op_name(node) in _SUMS or op_name(node) in ("rms_norm", "var", "std"):
                result.weights_summed |= any(_any(absent[n]) for n in node.all_input_nodes)
            return
        for mark in pytree.tree_leaves(absent[node]):
            result.carried |= isinstance(mark, Tensor) and bool(mark.any() and not mark.all())


def op_name(node: fx.Node) -> str:
    """The base name of what a node calls."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return getattr(node.target, "__name__", node.op)


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that are made of the model's tensors and sizes alone."""
    result: set[fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (
            node.op == "call_function"
            and all(n in result or op_name(n) == "sym_size" for n in sources)
            and any(n in result for n in sources)
        ):
            result.add(node)
    return result


def _call(
    node: fx.Node, values: Mapping[fx.Node, Any], absent: Mapping[fx.Node, Any], whole: bool
) -> tuple[Any, Any]:
    """The value of a call, and which of its elements are absent."""

    def value(*, replaced: Mapping[fx.Node, Any] | None = None) -> Any:
        found = values if replaced is None else replaced
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: found.get(n, values[n]))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    sources = node.all_input_nodes
    marked = {n: absent[n] for n in sources if _any(absent[n])}
    if not marked:
        return value(), None
    name = op_name(node)
    if name == "getitem":
        return value(), absent[node.args[0]][node.args[1]]  # type: ignore[index]
    if _is_pointwise(node, name):
        result = value()
        return result, _merged(marked.values(), result)
    clean = {n: torch.where(marked[n], 0, values[n]) for n in marked}
    if name == "rms_norm":
        result = value() if whole else value(replaced=clean)
        return result, _merged(marked.values(), result)
    if name == "scaled_dot_product_attention":
        result = value(replaced=clean)
        return result, _attention(node, absent, values, result)
    if name in _SUMS:
        result = value() if whole else value(replaced=clean)
        return result, _summed(node, name, values, marked, value)
    if name in _RECURRENT:
        parts = [
            _changed({**values, **clean}, part, value, clean)
            for part in _sides(node.args[0], marked)
        ]
        return value(replaced=clean), functools.reduce(partial(pytree.tree_map, _either), parts)
    indices = {n: mark for n, mark in marked.items() if _is_index(values[n])}
    others = {n: mark for n, mark in marked.items() if n not in indices}
    changed = _changed(values, others, value) if others else None
    if indices:
        apart = _told_apart(values, sources)
        changed = pytree.tree_map(_either, changed, _changed(values, indices, value, apart))
    return value(), changed


def _is_index(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()


def _told_apart(values: Mapping[fx.Node, Any], sources: Sequence[fx.Node]) -> dict[fx.Node, Tensor]:
    """For absent indices: other numbers to look up, since like ones would hide what is absent."""
    generator = torch.Generator().manual_seed(1)
    return {
        n: torch.rand(values[n].shape, generator=generator, dtype=values[n].dtype)
        for n in sources
        if isinstance(values[n], Tensor) and values[n].is_floating_point()
    }


def _is_pointwise(node: fx.Node, name: str) -> bool:
    return name in _POINTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _any(mark: Any) -> bool:
    return any(isinstance(m, Tensor) and bool(m.any()) for m in pytree.tree_leaves(mark))


def _merged(marks: Any, like: Tensor) -> Tensor:
    result = torch.zeros(like.shape, dtype=torch.bool)
    for mark in marks:
        result = result | mark
    return result


def _sides(given: Any, marked: Mapping[fx.Node, Tensor]) -> list[dict[fx.Node, Tensor]]:
    """The parts of a recurrent layer that must not be seen alone, each with the others zero.

    A term is absent on both sides: an input and its column, a unit (rows, biases, first state) and
    the columns that read it one step later or one layer above.
    """
    inputs = {n: mark for n, mark in marked.items() if n is given}
    units, columns = {}, {}
    for n, mark in marked.items():
        if n is given:
            continue
        units[n] = mark & mark.all(-1, keepdim=True) if mark.dim() == 2 else mark
        columns[n] = mark & ~units[n]
    return [inputs, units, columns]


def _summed(
    node: fx.Node,
    name: str,
    values: Mapping[fx.Node, Any],
    marked: Mapping[fx.Node, Tensor],
    value: Any,
) -> Tensor:
    """Where every term is absent, or what is added."""
    position = _SUMS[name]
    added = node.args[position] if position is not None and position < len(node.args) else None
    ones, present = {}, {}
    for source in node.all_input_nodes:
        if not isinstance(values[source], Tensor) or not values[source].is_floating_point():
            continue
        ones[source] = torch.ones_like(values[source])
        present[source] = ones[source]
        if source in marked:
            present[source] = (~marked[source]).to(values[source].dtype)
    if isinstance(added, fx.Node):
        ones[added] = present[added] = torch.zeros_like(values[added])
    count: Tensor = value(replaced=present)
    none = (count == 0) & (value(replaced=ones) != 0)
    if isinstance(added, fx.Node) and added in marked:
        other = marked[added]
        if "conv" in name:
            other = other.reshape(-1, *[1] * (count.dim() - 2))
        none = none | other
    return none


def _attention(
    node: fx.Node, absent: Mapping[fx.Node, Any], values: Mapping[fx.Node, Any], result: Tensor
) -> Tensor:
    """Absent where a whole query is, or that unit of every value, or its head's mask."""
    marks: list[Tensor | None] = []
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    for source in (*node.args[:3], mask):
        marks.append(absent.get(source) if isinstance(source, fx.Node) else None)
    query, key, value, bias = marks
    none = torch.zeros(result.shape, dtype=torch.bool)
    if query is not None:
        none = none | query.all(-1, keepdim=True)
    for mark in (key.all(-1, keepdim=True) if key is not None else None, value):
        if mark is not None:
            # A key position that is absent in part of the positions would not be a sum at all.
            along = mark.any(-2, keepdim=True)
            if along.dim() > 2 and along.shape[-3] not in (1, none.shape[-3]):
                along = along.repeat_interleave(none.shape[-3] // along.shape[-3], -3)
            none = none | along
    if bias is not None:
        none = none | bias.any(-1, keepdim=True)
    return none


def _changed(
    values: Mapping[fx.Node, Any],
    marked: Mapping[fx.Node, Any],
    value: Any,
    others: Mapping[fx.Node, Any] | None = None,
) -> Any:
    """Where the result changes with what stands in the absent elements; `others` stay."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for fill in (1.0, 1e30, -1e30):  # the large ones win every maximum, minimum and sort
        replaced = {
            n: pytree.tree_map(
                lambda v, m, fill=fill: _filled(v, m, fill, generator), values[n], marked[n]
            )
            for n in marked
        }
        results.append(value(replaced={**(others or {}), **replaced}))
    return pytree.tree_map(_differ, *results)


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a | b


def _filled(value: Tensor, mark: Tensor | None, fill: float, generator: torch.Generator) -> Tensor:
    if mark is None:
        return value
    if not value.is_floating_point():
        return torch.where(mark, torch.full_like(value, fill > 1), value)
    drawn = fill * (1 + torch.rand(value.shape, generator=generator, dtype=torch.float64))
    return torch.where(mark, drawn.to(value.dtype), value)


def _differ(first: Any, *others: Any) -> Tensor | None:
    if not isinstance(first, Tensor):
        return None
    different = torch.zeros(first.shape, dtype=torch.bool)
    for other in others:
        different = different | ~((first == other) | (first.isnan() & other.isnan()))
    return different if bool(different.any()) else None
