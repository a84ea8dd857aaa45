"""Several flat graphs as one that takes the inputs of all and gives the outputs of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from graphprune.ir.graph import output_node


def part_name(number: int) -> str:
    """The submodule that holds the tensors of a part: "part3"."""
    return f"part{number}"


def side_by_side(modules: Sequence[fx.GraphModule]) -> fx.GraphModule:
    """One module over the tensors of all; parts have nothing in common but memory."""
    root, graph = nn.Module(), fx.Graph()
    memos: list[dict[fx.Node, Any]] = []
    for number, module in enumerate(modules):  # a graph begins with all of its inputs
        root.add_module(part_name(number), module)
        inputs = module.graph.find_nodes(op="placeholder")
        memos.append({n: graph.placeholder(f"{part_name(number)}_{n.name}") for n in inputs})
    results: list[Any] = []
    for number, (module, memo) in enumerate(zip(modules, memos, strict=True)):
        for node in module.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            memo[node] = graph.node_copy(node, memo.__getitem__)
            if node.op == "get_attr":
                memo[node].target = f"{part_name(number)}.{node.target}"
        ends: Any = output_node(module.graph).args[0]
        results += [memo[node] for node in ends]
    graph.output(tuple(results))
    return fx.GraphModule(root, graph)
