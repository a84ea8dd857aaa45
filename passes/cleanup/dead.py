"""RemoveDeadNodes: drop what no output depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from graphprune.ir.graph import erase_dead, tensor_nodes
from graphprune.ir.program import Program
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.registry import register


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
        return PassResult(cleaned.without_tensors(unread), True, report)
