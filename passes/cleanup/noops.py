"""RemoveNoOps: drop operators that return what they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, fx
from torch._prims_common import is_contiguous_or_false

from graphprune.ir.graph import bound_arguments, erase_dead, op_name, value_of
from graphprune.ir.program import Program
from graphprune.pipeline.base import Context, Pass, PassResult
from graphprune.pipeline.registry import register


@register
@final
@dataclass(frozen=True, slots=True)
class RemoveNoOps(Pass):
    """Replace an operator that changes nothing by its input.

    1. Casts to the type and device that a value already has.
    2. Reshapes, expands and permutes to the same shape and order; slices of everything.
    3. `contiguous` of what is contiguous; `clone` and `alias`, as captured graphs never write.
    4. Dropout stays although it does nothing in evaluation: training the result needs it.
    """

    name: ClassVar[str] = "remove-no-ops"
    idempotent: ClassVar[bool] = True

    def run(self, program: Program, ctx: Context) -> PassResult:
        graphs = program.fork_graphs()
        removed: dict[str, list[str]] = {}
        for name, graph in graphs.items():
            removed[name] = []
            for node in list(graph.nodes):
                if _does_nothing(node):
                    removed[name].append(node.name)
                    node.replace_all_uses_with(node.args[0])
                    graph.erase_node(node)
            if removed[name]:
                erase_dead(graph)
        report = {"nodes": removed}
        if not any(removed.values()):
            return PassResult(program, False, report)
        return PassResult(program.with_graphs(graphs), True, report)


def _does_nothing(node: fx.Node) -> bool:
    check = _CHECKS.get(op_name(node)) if node.op == "call_function" else None
    if check is None or not isinstance(node.target, torch._ops.OpOverload) or not node.args:
        return False
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return False
    before, after = value_of(source), value_of(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    same_kind = before.dtype == after.dtype and before.device == after.device
    return same_kind and _same_shape(before, after) and check(node, before)


def _same_shape(a: Tensor, b: Tensor) -> bool:
    # Sizes are compared as expressions: `==` on symbolic ones would record a guard.
    return len(a.shape) == len(b.shape) and all(
        str(x) == str(y) for x, y in zip(a.shape, b.shape, strict=True)
    )


def _always(node: fx.Node, before: Tensor) -> bool:
    return True


def _keeps_layout(node: fx.Node, before: Tensor) -> bool:
    """`contiguous` and `to(memory_format=...)` of a plain contiguous tensor."""
    wanted = bound_arguments(node).get("memory_format")
    plain = wanted in (None, torch.contiguous_format, torch.preserve_format)
    return plain and bool(is_contiguous_or_false(before))


def _keeps_order(node: fx.Node, before: Tensor) -> bool:
    dims = bound_arguments(node).get("dims")
    return dims is not None and [d % before.dim() for d in dims] == list(range(before.dim()))


def _swaps_nothing(node: fx.Node, before: Tensor) -> bool:
    bound = bound_arguments(node)
    first, second = bound.get("dim0"), bound.get("dim1")
    return (
        isinstance(first, int)
        and isinstance(second, int)
        and first % before.dim() == second % before.dim()
    )


def _takes_all(node: fx.Node, before: Tensor) -> bool:
    """A slice from the start, step one; the equal shape has shown that it ends at the end."""
    bound = bound_arguments(node)
    return bound.get("start") in (None, 0) and bound.get("step", 1) == 1


def _keeps_type(node: fx.Node, before: Tensor) -> bool:
    return bound_arguments(node).get("memory_format") in (None, torch.preserve_format)


_CHECKS: dict[str, Callable[[fx.Node, Tensor], bool]] = {
    "alias": _always,
    "clone": _keeps_type,
    "lift_fresh_copy": _always,
    "contiguous": _keeps_layout,
    "to": _keeps_type,
    "_to_copy": _keeps_type,
    "type_as": _always,
    "view": _always,
    "_unsafe_view": _always,
    "reshape": _always,
    "flatten": _always,
    "unflatten": _always,
    "expand": _always,
    "expand_as": _always,
    "squeeze": _always,
    "permute": _keeps_order,
    "transpose": _swaps_nothing,
    "slice": _takes_all,
}
