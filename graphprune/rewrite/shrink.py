"""Rewriting: remove units of axes from tensors and graphs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphprune.axes import algebra
from graphprune.axes.algebra import Axis, Size
from graphprune.axes.facts import size_of
from graphprune.axes.groups import AxisGroups, axis_groups, names_after
from graphprune.axes.rules import REWRITERS
from graphprune.axes.rules.context import RewriteContext
from graphprune.errors import VerificationError
from graphprune.ir.graph import op_name
from graphprune.ir.history import kept_indices
from graphprune.ir.program import JSON, Entry, Program


def shrink(program: Program, kept: Mapping[str, Any]) -> Program:
    """Remove from each axis group all units but the kept ones: new tensors, new sizes.

    1. Tensors are indexed along every occurrence of the axes.
    2. Size arguments are rebuilt from the axes of the operator's output.
    3. What an operator derived from an old size is pinned (attention scale, a mean's denominator).
    4. All shapes are propagated again, and must be what the axes say.

    Args:
        program: left as it is.
        kept: group id -> indices of the units that stay (a list or int64 tensor, any order).

    Raises:
        UnsupportedError: a group is unknown or frozen, or the indices are not units of it.
        VerificationError: the rewritten graph does not fit its tensors; an internal error.
    """
    fork = program.fork()
    groups = axis_groups(program).on(fork)
    keep = groups.keep(kept)
    tensors = {name: _indexed(groups, name, t, keep) for name, t in fork.tensors.items()}
    for name, facts in groups.axes.facts.items():
        graph = fork.entries[name].graph
        symbols = _Symbols(graph)
        for node in list(graph.nodes):
            rewrite = REWRITERS.get(op_name(node)) if node.op == "call_function" else None
            if rewrite is not None:
                with graph.inserting_before(node):
                    rewrite(RewriteContext(node, facts, keep, symbols))
    cut = replace(
        fork, entries={n: _cut_cache(groups, n, e, keep) for n, e in fork.entries.items()}
    )
    result = cut.with_graphs({}, tensors)
    _check_shapes(groups, result, keep)
    if any(len(indices) == 1 for indices in keep.values()):
        result = replace(result, axis_names=names_after(groups, keep, result))
    return result.record(
        {
            "removed": {
                name: {"of": groups[name].size, "kept": sorted({int(i) for i in indices})}
                for name, indices in kept.items()
            }
        }
    )


def take(
    program: Program, kept: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors shaped like the program's own of these names, cut as `shrink` cuts those.

    For what belongs to a weight and must lose the same units: an optimizer's moments, a mask.
    """
    groups = axis_groups(program)
    keep = groups.keep(kept)
    return {name: _indexed(groups, name, tensor, keep) for name, tensor in tensors.items()}


def _indexed(groups: AxisGroups, name: str, tensor: Tensor, keep: Mapping[Axis, Tensor]) -> Tensor:
    for dim, axis in enumerate(groups.axes.tensors[name]):
        if any(leaf in keep for leaf in algebra.leaves(axis)):
            indices = algebra.expanded(axis, keep)
            tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor


def _cut_cache(groups: AxisGroups, name: str, entry: Entry, keep: Mapping[Axis, Tensor]) -> Entry:
    """The entry whose example cache lacks the removed units."""
    example = list(entry.example)
    for i, node in enumerate(n for n in entry.graph.nodes if n.op == "placeholder"):
        if node.name in entry.cache:
            for dim, axis in enumerate(groups.axes.facts[name].dims[node]):
                if any(leaf in keep for leaf in algebra.leaves(axis)):
                    indices = algebra.expanded(axis, keep)
                    example[i] = example[i].index_select(dim, indices)
    return replace(entry, example=tuple(example))


def removed_since(before: Program, after: Program) -> dict[str, JSON]:
    """The report of the units that a pass removed, by one cut or several.

    Returns:
        "groups": id, role and size before and after of each; "kept": the original indices left.
    """
    kept = kept_indices(after.history[len(before.history) :])
    groups = axis_groups(before)
    return {
        "groups": [
            {
                "id": name,
                "role": groups[name].role,
                "before": groups[name].size,
                "after": len(indices),
            }
            for name, indices in kept.items()
        ],
        "kept": kept,
    }


class _Symbols:
    """Turns a size into an int, or into graph nodes that compute it from the inputs' sizes."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.sources: dict[Any, tuple[fx.Node, int]] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                for dim, size in enumerate(node.meta["val"].shape):
                    if isinstance(size, torch.SymInt):
                        self.sources.setdefault(size_of(size), (node, dim))

    def __call__(self, size: Size) -> Any:
        if isinstance(size, int):
            return size
        expression = sympy.sympify(size)
        if expression.is_Integer:
            return int(expression)
        if expression in self.sources:
            return self.graph.call_function(torch.ops.aten.sym_size.int, self.sources[expression])
        combine: Callable[[Any, Any], Any]
        if expression.is_Mul or expression.is_Add:
            combine = operator.mul if expression.is_Mul else operator.add
            first, *rest = (self(part) for part in expression.args)
            for part in rest:
                first = self.graph.call_function(combine, (first, part))
            return first
        if expression.is_Pow and expression.exp.is_Integer and expression.exp > 0:
            base = self(expression.base)
            result = base
            for _ in range(int(expression.exp) - 1):
                result = self.graph.call_function(operator.mul, (result, base))
            return result
        raise VerificationError(f"cannot compute the size {expression} from the inputs' sizes")


def _check_shapes(groups: AxisGroups, result: Program, keep: Mapping[Axis, Tensor]) -> None:
    """After propagation every value has the sizes that its axes say."""
    for name, facts in groups.axes.facts.items():
        for node in result.entries[name].graph.nodes:
            dims = facts.dims.get(node)
            if not isinstance(dims, tuple) or not isinstance(node.meta.get("val"), Tensor):
                continue
            actual = [size_of(s) for s in node.meta["val"].shape]
            expected = [algebra.new_size(a, keep) for a in dims]
            if len(actual) != len(expected) or not all(
                algebra.equal(a, e) for a, e in zip(actual, expected, strict=True)
            ):
                raise VerificationError(
                    f"node {node.name!r} ({node.target}) has shape {actual} after the rewrite, "
                    f"but its axes say {expected}"
                )
