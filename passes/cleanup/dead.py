"""RemoveDeadNodes: drop what no output depends on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, final

from torch import fx

from graphprune.graph import tensor_nodes
from graphprune.passbase import Context, Invariant, Pass, PassResult
from graphprune.program import Program
from graphprune.registry import register


@register
@final
@dataclass(frozen=True, slots=True)
class RemoveDeadNodes(Pass):
    """Remove nodes without effect, and tensors that no entry reads.

    1. Inputs stay, used or not: they are the interface.
    2. Operators that write to their inputs, or return nothing, have an effect and stay.
    3. A tensor goes when no entry reads it any more, under any of its tied names.
    """

    name: ClassVar[str] = "remove-dead-nodes"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE | Invariant.NUMERICS | Invariant.NODES
    idempotent: ClassVar[bool] = True

    def run(self, program: Program, ctx: Context) -> PassResult:
        graphs = program.fork_graphs()
        nodes = {name: erase_dead(graph) for name, graph in graphs.items()}
        read = {node.target for graph in graphs.values() for node in tensor_nodes(graph)}
        unread = sorted(name for name in program.tensors if name not in read)
        report = {"nodes": nodes, "tensors": unread}
        if not unread and not any(nodes.values()):
            return PassResult(program, False, report)
        cleaned = program.with_graphs(graphs) if any(nodes.values()) else program
        return PassResult(without_tensors(cleaned, unread), True, report)


def erase_dead(graph: fx.Graph) -> list[str]:
    """Erase nodes without users and without effect, in place; return their names."""
    erased = []
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in {"call_function", "get_attr"} and not has_effect(node):
            erased.append(node.name)
            graph.erase_node(node)
    return erased[::-1]


def has_effect(node: fx.Node) -> bool:
    """Whether a node matters beyond its result."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and (schema.is_mutable or not schema.returns)


def without_tensors(program: Program, names: list[str]) -> Program:
    """The program without these tensors, which no entry reads."""
    gone = set(names)
    return dataclasses.replace(
        program,
        tensors={name: t for name, t in program.tensors.items() if name not in gone},
        parameters=program.parameters - gone,
        aliases={alias: name for alias, name in program.aliases.items() if name not in gone},
    )
