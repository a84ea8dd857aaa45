"""Rewriting: remove units of axes from tensors and graphs, or mask them at the old shapes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphprune.axes import algebra
from graphprune.axes.algebra import Axis, Size
from graphprune.axes.groups import AxisGroups, axis_groups, names_after
from graphprune.axes.rules import REWRITERS
from graphprune.axes.rules.registry import Contraction, Facts, RewriteContext, size_of
from graphprune.errors import VerificationError
from graphprune.ir.graph import bound_arguments, flat_outputs, op_name, output_node, set_bound
from graphprune.ir.program import JSON, Entry, Program

MASK = "graphprune_mask_"  # name prefix of the tensors and nodes that `mask` adds


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
        VerificationError: the rewritten graph does not fit its tensors; an error of ours.
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

    For what belongs to a weight and must lose the same units: an optimiser's moments, a mask.
    """
    groups = axis_groups(program)
    keep = groups.keep(kept)
    return {name: _indexed(groups, name, tensor, keep) for name, tensor in tensors.items()}


def mask(program: Program, kept: Mapping[str, Any], *, everywhere: bool = False) -> Program:
    """The reference of `shrink`: old shapes, removed units set to zero where they are summed.

    Zeroing parameters would not do: a unit may have a constant of its own (elu(x) + 1 has one).
    Keys and values that go out into a cache come without the removed units, as `shrink` gives them;
    those that come in have all of them.

    Args:
        program: left as it is.
        kept: group id -> indices of the units that stay.
        everywhere: mask every activation that carries a removed unit, not the operands of sums.
            That equals the other for the same reason that shrinking does, but does not rely on
            where sums are said to be: a sum over weights alone, or one without a record, shows.
            (Where no activation carries the units, as between constants, sums are masked.)
    """
    fork = program.fork()
    groups = axis_groups(program).on(fork)
    keep = groups.keep(kept)
    tensors = dict(fork.tensors)
    for name, facts in groups.axes.facts.items():
        graph = fork.entries[name].graph
        carried = _carried(facts) if everywhere else set()
        for contraction in facts.contractions:
            cut = {leaf for leaf in algebra.leaves(contraction.axis) if leaf in keep}
            # A statistic over a normalised axis stays that of all units: the drift is from there.
            statistic = contraction.kind == "reduction" and any(leaf.normalised for leaf in cut)
            if cut and not statistic and cut.isdisjoint(carried):
                _mask_operand(graph, contraction, keep, tensors)
        _cut_outputs(fork.entries[name], facts, keep, tensors)
        if everywhere:
            _mask_activations(graph, facts, keep, tensors)
    return replace(fork, tensors=tensors)


def _indexed(groups: AxisGroups, name: str, tensor: Tensor, keep: Mapping[Axis, Tensor]) -> Tensor:
    for dim, axis in enumerate(groups.axes.tensors[name]):
        if any(leaf in keep for leaf in algebra.leaves(axis)):
            indices = algebra.kept_indices(axis, keep)
            tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor


def _cut_cache(groups: AxisGroups, name: str, entry: Entry, keep: Mapping[Axis, Tensor]) -> Entry:
    """The entry whose example cache lacks the removed units."""
    example = list(entry.example)
    for i, node in enumerate(n for n in entry.graph.nodes if n.op == "placeholder"):
        if node.name in entry.cache:
            for dim, axis in enumerate(groups.axes.facts[name].dims[node]):
                if any(leaf in keep for leaf in algebra.leaves(axis)):
                    indices = algebra.kept_indices(axis, keep)
                    example[i] = example[i].index_select(dim, indices)
    return replace(entry, example=tuple(example))


def _cut_outputs(
    entry: Entry, facts: Facts, keep: Mapping[Axis, Tensor], tensors: dict[str, Tensor]
) -> None:
    """Drop the removed units from what an entry gives to be cached."""
    graph = entry.graph
    results = list(flat_outputs(graph))
    for number in entry.cache.values():
        for dim, axis in enumerate(facts.dims[results[number]]):
            if not any(leaf in keep for leaf in algebra.leaves(axis)):
                continue
            name = f"{MASK}{len(tensors)}"
            tensors[name] = algebra.kept_indices(axis, keep)
            with graph.inserting_before(output_node(graph)):
                results[number] = graph.call_function(
                    torch.ops.aten.index_select.default,
                    (results[number], dim, graph.create_node("get_attr", name)),
                )
    output_node(graph).args = (tuple(results),)


def _mask_operand(
    graph: fx.Graph,
    contraction: Contraction,
    keep: Mapping[Axis, Tensor],
    tensors: dict[str, Tensor],
) -> None:
    argument, _, index = contraction.slot.partition(":")
    current = bound_arguments(contraction.node)[argument]
    operand = current[int(index)] if index else current
    with graph.inserting_before(contraction.node):
        masked = _masked(graph, operand, contraction.dim, contraction.axis, keep, tensors)
    several = [*current[: int(index)], masked, *current[int(index) + 1 :]] if index else masked
    set_bound(contraction.node, {argument: several})


def _carried(facts: Facts) -> set[Axis]:
    """Leaves of all activations."""
    dims = (facts.dims.get(node) for node in facts.activations)
    return {
        part for d in dims if isinstance(d, tuple) for axis in d for part in algebra.leaves(axis)
    }


def _mask_activations(
    graph: fx.Graph, facts: Facts, keep: Mapping[Axis, Tensor], tensors: dict[str, Tensor]
) -> None:
    for node in list(graph.nodes):
        dims = facts.dims.get(node)
        if node not in facts.activations or not isinstance(dims, tuple):
            continue
        value = node
        for dim, axis in enumerate(dims):
            parts = list(algebra.leaves(axis))
            # Folded into a batch of unknown size it has no places; before and behind it has.
            whole = all(isinstance(part.size, int) for part in parts)
            if whole and any(part in keep for part in parts):
                with graph.inserting_before(value.next):
                    value = _masked(graph, value, dim, axis, keep, tensors)
        if value is not node:
            node.replace_all_uses_with(
                value, delete_user_cb=lambda user: not user.name.startswith(MASK)
            )


def _masked(
    graph: fx.Graph,
    value: fx.Node,
    dim: int,
    axis: Axis,
    keep: Mapping[Axis, Tensor],
    tensors: dict[str, Tensor],
) -> fx.Node:
    """A value with the removed units of a dimension set to zero, whatever they are."""
    fake = value.meta["val"]
    gone = torch.ones(int(axis.size), dtype=torch.bool, device=fake.device)
    gone[algebra.kept_indices(axis, keep).to(fake.device)] = False
    name = f"{MASK}{len(tensors)}"
    tensors[name] = gone.reshape([-1] + [1] * (fake.dim() - dim - 1))
    read = graph.create_node("get_attr", name)
    # Not a product with zeros: a unit may be infinite.
    masked = graph.create_node(
        "call_function", torch.ops.aten.masked_fill.Scalar, (value, read, 0), name=f"{name}_of"
    )
    # Shapes stay, so metadata is known without propagating the whole graph again.
    read.meta["val"] = fake.fake_mode.from_tensor(tensors[name], static_shapes=True)
    masked.meta["val"] = fake
    return masked


def kept_indices(history: Sequence[JSON]) -> dict[str, list[int]]:
    """For each axis that was cut: which of its original indices are left.

    An axis whose units were put in another order is not among them: each head may have kept others.
    """
    kept: dict[str, list[int]] = {}
    lost: set[str] = set()
    for cut, rearranged in removals(history):
        lost |= rearranged
        for name, indices in cut.items():
            before = kept.get(name)
            kept[name] = indices if before is None else [before[i] for i in indices]
    return {name: indices for name, indices in kept.items() if name not in lost}


def removals(history: Sequence[JSON]) -> Iterator[tuple[dict[str, list[int]], set[str]]]:
    """What was removed, oldest first: axis group -> units that stay, and groups put in order.

    The units of those were in another order by then, the removed ones last: a line "rearranged" of
    the history, before the line "removed", says which they are.
    """
    rearranged: set[str] = set()
    for record in history:
        rearranged |= set(record.get("rearranged", ()))
        if "removed" in record:
            yield {name: list(cut["kept"]) for name, cut in record["removed"].items()}, rearranged
            rearranged = set()
        yield from removals(record.get("steps", ()))


def removed_since(before: Program, after: Program) -> dict[str, JSON]:
    """What a pass that removed units, in one go or in several, says of it in its report.

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
