"""FoldConstants: compute once what does not depend on inputs or parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from graphprune.errors import RecipeError
from graphprune.graph import is_op, tensor_nodes
from graphprune.passbase import Context, Invariant, Pass, PassResult
from graphprune.passes.cleanup.dead import erase_dead, has_effect, without_tensors
from graphprune.program import Program
from graphprune.registry import register


@register
@final
@dataclass(frozen=True, slots=True)
class FoldConstants(Pass):
    """Replace computations on buffers and constants by their result, as a buffer.

    buffer -> op -> op -> (dynamic)    becomes    folded buffer -> (dynamic)

    1. Parameters are not folded unless `parameters` is set: they would no longer train.
    2. A result that needs more than `max_growth` bytes beyond the tensors that it makes needless
       stays a computation; an expanded mask would fill the file.
    3. Dynamic sizes, random operators and operators with an effect are never constant.
    4. A lone `zeros` or `arange` is left alone: it is as cheap as reading a buffer.
    """

    name: ClassVar[str] = "fold-constants"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE | Invariant.NUMERICS | Invariant.NODES
    idempotent: ClassVar[bool] = True

    max_growth: int = 65536
    parameters: bool = False

    def __post_init__(self) -> None:
        if self.max_growth < 0:
            raise RecipeError(f"max_growth is a number of bytes, got {self.max_growth!r}")

    def run(self, program: Program, ctx: Context) -> PassResult:
        graphs = program.fork_graphs()
        folded: dict[str, Tensor] = {}
        skipped: list[dict[str, Any]] = []
        for graph in graphs.values():
            values = _constants(graph, self._sources(program))
            for node in _frontier(graph, values):
                value = values[node]
                growth = _nbytes(value) - _nbytes_freed(node, program)
                if growth > self.max_growth:
                    skipped.append({"node": node.name, "reason": f"grows by {growth} bytes"})
                    continue
                name = _free_name(f"folded_{node.name}", {**program.tensors, **folded})
                folded[name] = value
                with graph.inserting_before(node):
                    constant = graph.get_attr(name)
                constant.meta = dict(node.meta)
                node.replace_all_uses_with(constant)
            erase_dead(graph)
        report: dict[str, Any] = {"folded": sorted(folded), "skipped": skipped}
        if not folded:
            return PassResult(program, False, report)
        changed = program.with_graphs(graphs, {**program.tensors, **folded})
        unread = _newly_unread(program, changed)
        return PassResult(without_tensors(changed, unread), True, {**report, "tensors": unread})

    def _sources(self, program: Program) -> dict[str, Tensor]:
        return {
            name: t
            for name, t in program.tensors.items()
            if self.parameters or name not in program.parameters
        }


def _constants(graph: fx.Graph, sources: Mapping[str, Tensor]) -> dict[fx.Node, Any]:
    """Values of all nodes that depend on nothing but `sources`."""
    values: dict[fx.Node, Any] = {}
    written = {node.args[0] for node in graph.nodes if node.args and has_effect(node)}
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "get_attr" and node.target in sources and node not in written:
                values[node] = sources[node.target].detach()
            elif _is_pure(node) and all(i in values for i in node.all_input_nodes):
                args = fx.node.map_arg(node.args, values.__getitem__)
                kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    return values


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function" or has_effect(node) or is_op(node, "dropout", "feature_dropout"):
        return False
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags


def _frontier(graph: fx.Graph, values: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """Constant tensors that something not constant reads, and that took computing to get."""
    return [
        node
        for node in graph.nodes
        if node in values
        and node.op == "call_function"
        and isinstance(values[node], Tensor)
        and node.all_input_nodes
        and any(user not in values for user in node.users)
    ]


def _nbytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _nbytes_freed(node: fx.Node, program: Program) -> int:
    """Bytes of the tensors that only this node's computation reads."""
    region, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in region and all(user in region for user in source.users):
                region.add(source)
                stack.append(source)
    return sum(_nbytes(program.tensors[str(n.target)]) for n in region if n.op == "get_attr")


def _free_name(wanted: str, taken: Mapping[str, Tensor]) -> str:
    # A tensor's name becomes an attribute path, so it must not be the beginning of another either.
    heads = {name.split(".")[0] for name in taken}
    name, n = wanted, 0
    while name in heads:
        n += 1
        name = f"{wanted}_{n}"
    return name


def _newly_unread(before: Program, after: Program) -> list[str]:
    return sorted(_read(before) - _read(after))


def _read(program: Program) -> set[str]:
    return {str(n.target) for e in program.entries.values() for n in tensor_nodes(e.graph)}
