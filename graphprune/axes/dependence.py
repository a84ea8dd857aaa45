"""Which elements of a graph's values depend on its inputs, as far as zeros in tensors tell.

Every value is walked beside a bool tensor of its shape, true where another input might change the
element. A weight of zero passes nothing on, whatever it is multiplied by; everything else that is
not known to keep elements apart spreads: unknown means dependent. So a unit that is found constant
is constant for all inputs, not merely on those that happened to be looked at, as a neuron would be
that ReLU silenced on them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from graphprune.axes.rules.elementwise import ELEMENTWISE
from graphprune.ir.graph import bound_arguments, op_name
from graphprune.ir.program import Program

# What moves elements and changes none. Sizes are all that their other arguments say.
_MOVES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "transpose", "permute", "t",
    "numpy_T", "mT", "swapaxes", "movedim", "unsqueeze", "squeeze", "expand", "repeat",
    "split", "split_with_sizes", "chunk", "slice", "select", "unbind", "narrow", "cat", "stack",
    "contiguous", "clone", "detach", "alias", "getitem", "flip",
}  # fmt: skip
# Those that take a part; which one may hang on the sizes of the inputs.
_CUTS = {"slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind"}
# Linear in each of two tensors; name -> those two, and what is added.
PRODUCTS = {
    "linear": ("input", "weight", "bias"),
    "matmul": ("self", "other", None),
    "mm": ("self", "mat2", None),
    "bmm": ("self", "mat2", None),
    "addmm": ("mat1", "mat2", "self"),
    "baddbmm": ("batch1", "batch2", "self"),
    "conv1d": ("input", "weight", "bias"),
    "conv2d": ("input", "weight", "bias"),
    "conv3d": ("input", "weight", "bias"),
}
# Each output from a window of one channel: an average or the largest.
_POOLS = {f"{kind}_pool{rank}d" for kind in ("max", "avg", "adaptive_avg") for rank in (1, 2, 3)}
# One value everywhere, whatever the sizes that they are given.
_FILLS = {"zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros",
          "new_ones", "new_full"}  # fmt: skip


@final
@dataclass(frozen=True, slots=True)
class Known:
    """A value on the example inputs, and which of its elements may be others on other inputs.

    Attributes:
        value: the tensor.
        varies: bool, of its shape.
    """

    value: Tensor
    varies: Tensor


def dependence(program: Program, entry: str, wanted: Collection[str]) -> dict[str, Known]:
    """Walk an entry graph on its example inputs, and say of some nodes what depends on inputs.

    Args:
        program: whose tensors are constants.
        entry: name of the entry graph.
        wanted: names of nodes of it that compute one tensor each.
    """
    graph = program.entries[entry].graph
    nodes = list(graph.nodes)
    last = {source: i for i, node in enumerate(nodes) for source in node.all_input_nodes}
    examples = iter(program.entries[entry].example)
    values: dict[fx.Node, Any] = {}
    varying: dict[fx.Node, Any] = {}
    found = {}
    for i, node in enumerate(nodes):
        if node.op == "placeholder":
            values[node] = next(examples)
            varying[node] = torch.ones_like(values[node], dtype=torch.bool)
        elif node.op == "get_attr":
            values[node] = program.tensors[str(node.target)].detach()
            varying[node] = torch.zeros_like(values[node], dtype=torch.bool)
        elif node.op == "call_function":
            with torch.no_grad():
                args, kwargs = _resolved((node.args, node.kwargs), values)
                values[node] = node.target(*args, **kwargs)
                varying[node] = _shaped(_varies(node, values, varying), values[node])
        if node.name in wanted:
            found[node.name] = Known(values[node].clone(), varying[node].clone())
        for source in node.all_input_nodes:
            if last[source] <= i:
                values.pop(source, None)
                varying.pop(source, None)
    return found


def _varies(node: fx.Node, values: dict[fx.Node, Any], varying: dict[fx.Node, Any]) -> Any:
    """Tensors of bool like the outputs, one that broadcasts to them, or one bool for all."""
    name = op_name(node)
    bound = bound_arguments(node)
    if name in _FILLS:
        return isinstance(bound.get("fill_value"), fx.Node)
    if name == "sym_size":
        return True  # a size is another one on other inputs
    if name in _CUTS and _is_movable(node, bound):
        whole = _unlike(values[bound["self"]], varying[bound["self"]], bound["dim"])
        rest, kwargs = _resolved((node.args[1:], node.kwargs), values)
        return node.target(whole, *rest, **kwargs)  # type: ignore[operator]
    if name in _MOVES:
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs),
            lambda n: varying[n] if isinstance(values[n], (Tensor, tuple, list)) else values[n],
        )
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if name in ("to", "_to_copy", "type_as", "expand_as", "dropout"):
        return varying[node.all_input_nodes[0]]
    if name == "batch_norm" and not bound["training"]:
        return varying[bound["input"]]
    if any(varying[n] is True for n in node.all_input_nodes):
        return True
    if name in PRODUCTS:
        return _product(node, bound, *PRODUCTS[name], values, varying)
    if name in _POOLS or (name == "mean" and bound.get("dim")):
        return _pool(node, bound, values, varying)
    if name == "scaled_dot_product_attention":
        return _attention(bound, values, varying)
    if name in ELEMENTWISE and not _draws(node):
        return _elementwise(name, bound, values, varying)
    sources = node.all_input_nodes
    tensors = pytree.tree_leaves([varying[n] for n in sources])
    if _draws(node) or any(bool(torch.as_tensor(t).any()) for t in tensors):
        return True
    # A sum over ones tells how long the inputs are.
    fakes = pytree.tree_leaves([n.meta["val"] for n in sources])
    return any(_is_symbolic(f.shape) for f in fakes if isinstance(f, Tensor))


def _is_movable(node: fx.Node, bound: dict[str, Any]) -> bool:
    """Whether another part would be taken of inputs of another length."""
    size = bound["self"].meta["val"].shape[bound["dim"]]
    return _is_symbolic([size]) or len(node.all_input_nodes) > 1


def _unlike(value: Tensor, varies: Tensor, dim: int) -> Tensor:
    """Where a value varies, or is not one and the same all along a dimension."""
    first = value.narrow(dim, 0, 1)
    unlike = varies.any(dim, keepdim=True) | (value != first).any(dim, keepdim=True)
    return unlike.expand_as(value)


def _resolved(arguments: Any, values: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg(arguments, values.__getitem__)


def _product(
    node: fx.Node,
    bound: dict[str, Any],
    left: str,
    right: str,
    added: str | None,
    values: dict[fx.Node, Any],
    varying: dict[fx.Node, Any],
) -> Tensor | bool:
    """A sum of products varies where one of them does: a factor varies, the other is not zero."""

    extra = bound.get(added) if added is not None else None

    def call(a: Tensor, b: Tensor) -> Tensor:
        replaced = {bound[left]: a, bound[right]: b}
        if extra is not None:
            replaced[extra] = torch.zeros_like(values[extra], dtype=a.dtype)
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda n: replaced.get(n, values[n])
        )
        result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        return result > 0.5

    def counted(name: str) -> tuple[Tensor, Tensor]:
        value, varies = values[bound[name]], varying[bound[name]]
        dtype = value.dtype if value.is_floating_point() else torch.float32
        return varies.to(dtype), (varies | (value != 0)).to(dtype)

    (a, alive_a), (b, alive_b) = counted(left), counted(right)
    is_convolution = op_name(node).startswith("conv")
    if not is_convolution and _is_symbolic(bound[left].meta["val"].shape[-1:]):
        # Summed over more when the inputs are longer.
        result = call(alive_a, alive_b)
    else:
        result = call(a, alive_b) | call(alive_a, b)
    if extra is not None and bool(varying[extra].any()):
        return True if is_convolution else result | varying[extra]
    return result


def _pool(
    node: fx.Node,
    bound: dict[str, Any],
    values: dict[fx.Node, Any],
    varying: dict[fx.Node, Any],
) -> Tensor:
    """An output of a pooling varies where something in its window does."""
    source = bound["self"]
    value, varies = values[source], varying[source]
    for dim in bound.get("dim", ()):  # of a mean: all there is, which may be more
        if _is_symbolic([source.meta["val"].shape[dim]]):
            varies = _unlike(value, varies, dim)
    rest, kwargs = _resolved((node.args[1:], node.kwargs), values)
    result: Tensor = node.target(varies.to(value.dtype), *rest, **kwargs)  # type: ignore[operator]
    return result > 0


def _attention(
    bound: dict[str, Any], values: dict[fx.Node, Any], varying: dict[fx.Node, Any]
) -> Tensor | bool:
    """Weights of attention sum to one, so a value that all keys share comes out as it is.

    With a mask only zero does: a query that may look at nothing gets something else.
    """
    if bound.get("dropout_p"):
        return True
    value, varies = values[bound["value"]], varying[bound["value"]]
    unlike = varies.any(-2, keepdim=True) | (value != value[..., :1, :]).any(-2, keepdim=True)
    if bound.get("attn_mask") is not None:
        unlike = unlike | (value != 0).any(-2, keepdim=True)
    query = values[bound["query"]]
    if unlike.dim() > 3 and unlike.shape[-3] not in (1, query.shape[-3]):
        unlike = unlike.repeat_interleave(query.shape[-3] // unlike.shape[-3], -3)
    return unlike.expand(*query.shape[:-1], value.shape[-1])


def _elementwise(
    name: str, bound: dict[str, Any], values: dict[fx.Node, Any], varying: dict[fx.Node, Any]
) -> Tensor:
    sources = [a for a in bound.values() if isinstance(a, fx.Node)]
    result = torch.zeros((), dtype=torch.bool)
    for source in sources:
        result = result | varying[source]
    if name == "mul":
        for source in sources:
            if isinstance(values[source], Tensor):
                result = result & (varying[source] | (values[source] != 0))
    return result


def _is_symbolic(sizes: Iterable[Any]) -> bool:
    return any(isinstance(size, torch.SymInt) for size in sizes)


def _draws(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _shaped(varies: Any, value: Any) -> Any:
    """One bool, or a tensor that broadcasts, for every tensor of a result."""
    if isinstance(value, (tuple, list)):
        several = varies if isinstance(varies, (tuple, list)) else [varies] * len(value)
        return [_shaped(a, b) for a, b in zip(several, value, strict=True)]
    if not isinstance(value, Tensor):
        return bool(torch.as_tensor(varies).any()) if not isinstance(varies, bool) else varies
    mask = torch.as_tensor(varies, device=value.device)
    return mask if mask.shape == value.shape else mask.expand(value.shape).clone()
