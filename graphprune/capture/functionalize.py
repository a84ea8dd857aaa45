"""Make a captured graph functional: no regions, no writes into tensors that others see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from graphprune.capture.memory import Memory, writes
from graphprune.errors import CaptureError
from graphprune.ir.graph import bound_arguments, is_op, op_name, set_bound

# Regions that only change a mode around the calls inside them.
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
# In-place operators that write no value.
_SHAPES_ONLY = {"unsqueeze_", "squeeze_", "transpose_", "t_", "swapaxes_", "swapdims_"}


def inline_regions(module: fx.GraphModule, graph: fx.Graph) -> None:
    """Replace calls of grad-mode and autocast regions by what is inside them."""
    for node in list(graph.nodes):
        skipped = _REGIONS.get(getattr(node.target, "__name__", ""))
        if node.op != "call_function" or skipped is None:
            continue
        if "autocast" in node.target.__name__ and node.args[2]:
            raise CaptureError(
                "forward opens an autocast region, whose casts a captured graph does not keep; "
                "cast the model, or the inputs of that region, explicitly"
            )
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


def functionalize(graph: fx.Graph) -> set[str]:
    """Turn in-place operators into functional ones, and recompute what sees the same memory.

    x.add_(y)              becomes   x2 = x + y,  later uses of x read x2
    x[a:b].copy_(y)        becomes   x2 = slice_scatter(x, y, a, b)

    Returns:
        Names of the tensors of the model that forward writes to: such state is not kept.

    Raises:
        CaptureError: an operator has no functional form; or memory that was written to through a
            view is read later, and the view has no scatter form.
    """
    memory = Memory(graph)
    written: set[str] = set()
    done: list[fx.Node] = []
    for node in list(graph.nodes):
        target = node.args[0] if node.args else None
        memory.enter(node)
        if node.op != "call_function" or not writes(node):
            continue
        if not isinstance(target, fx.Node):
            raise CaptureError(_no_form(node))
        if op_name(node) in _SHAPES_ONLY and memory.is_shared(target):
            raise CaptureError(
                f"{node.name!r} ({op_name(node)}) changes the shape of a tensor that shares memory "
                "with another; rewrite that line of the model without the in-place operator"
            )
        root = memory.root(target)
        if root.op == "get_attr":
            written.add(str(root.target))
        memory.write(node, target, _functional(graph, node))
        done.append(node)
    for node in reversed(done):
        graph.erase_node(node)
    return written


def spell_out(graph: fx.Graph) -> None:
    """Write shapes explicitly where an operator would read them off a size of one, or a stride.

    1. `squeeze` names the dimensions that it drops: an axis may shrink to one unit later.
    2. `view` becomes `reshape`: the strides of a tensor change when dimensions shrink to one.
    3. `view_as`, `reshape_as` become `reshape` with sizes that can be rewritten.
    4. What makes a tensor without saying of which type says it: a cast changes stated types only.
    """
    for node in list(graph.nodes):
        _state_dtype(node)
        if is_op(node, "squeeze"):
            sizes = node.args[0].meta["val"].shape
            given = bound_arguments(node).get("dim", range(len(sizes)))
            dims = {d % len(sizes) for d in ([given] if isinstance(given, int) else given)}
            node.target = torch.ops.aten.squeeze.dims
            node.args = (node.args[0], sorted(d for d in dims if sizes[d] == 1))
            node.kwargs = {}
        elif is_op(node, "view", "_unsafe_view") and "dtype" not in bound_arguments(node):
            node.target = torch.ops.aten.reshape.default
        elif is_op(node, "view_as", "reshape_as"):
            other = node.args[1]
            with graph.inserting_before(node):
                shape = [
                    graph.call_function(torch.ops.aten.sym_size.int, (other, d))
                    if isinstance(s, torch.SymInt)
                    else s
                    for d, s in enumerate(other.meta["val"].shape)
                ]
            node.target, node.args = torch.ops.aten.reshape.default, (node.args[0], shape)
        elif is_op(node, "rms_norm") and bound_arguments(node).get("eps") is None:
            # The default is the input type's epsilon, which a cast would change.
            set_bound(node, {"eps": torch.finfo(node.meta["val"].dtype).eps})


def _state_dtype(node: fx.Node) -> None:
    bound = bound_arguments(node) if node.op == "call_function" else {}
    made = isinstance(node.meta.get("val"), torch.Tensor) and not any(
        isinstance(n.meta.get("val"), torch.Tensor) for n in node.all_input_nodes
    )
    if made and "dtype" in bound and bound["dtype"] is None:
        set_bound(node, {"dtype": node.meta["val"].dtype})


def _no_form(node: fx.Node) -> str:
    return (
        f"operator {node.target} at {node.name!r} writes to its inputs and has no functional form; "
        "rewrite that line of the model without it"
    )


def _functional(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The same computation as a new value, of the type of what was written to."""
    overload = _functional_overload(node)
    if overload is None:
        raise CaptureError(_no_form(node))
    value = node.meta["val"]
    with graph.inserting_before(node):
        new = graph.call_function(overload, node.args, dict(node.kwargs))
    new.meta = dict(node.meta)
    fakes = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with value.fake_mode, enable_python_dispatcher():
        dtype = overload(*fakes[0], **fakes[1]).dtype
    if dtype is value.dtype:
        return new
    with graph.inserting_before(node):
        cast = graph.call_function(torch.ops.aten.to.dtype, (new, value.dtype))
    cast.meta = dict(node.meta)
    return cast


def _functional_overload(node: fx.Node) -> Any:
    """The operator that computes what an in-place one writes, or None: add for add_, or for ior."""
    name = op_name(node)
    if name.startswith("__i") and name.endswith("__"):
        name = f"__{name[3:]}"  # a |= b
    elif name.endswith("_"):
        name = name[:-1]
    else:
        return None
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return None
    wanted = _argument_types(node.target)
    # Overloads of one meaning have different names: floor_divide_.Tensor, floor_divide.default.
    found = [getattr(packet, overload) for overload in packet.overloads()]
    return next((o for o in found if _argument_types(o) == wanted), None)


def _argument_types(overload: Any) -> list[str]:
    return [str(argument.type) for argument in overload._schema.arguments]
