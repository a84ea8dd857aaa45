"""A connected part of an entry's graph as a Program of its own, to be timed or compared alone."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from graphprune.errors import GraphPruneError
from graphprune.ir.graph import erase_dead, flat_outputs, has_effect, output_node, value_of
from graphprune.ir.module import graph_module
from graphprune.ir.program import Argument, Entry, Program


def extract(
    program: Program, nodes: Collection[str], flat: Iterable[Tensor], entry: str = "forward"
) -> Program:
    """A part of an entry's graph as a Program whose one entry is called "forward".

    1. What the part reads from outside is an input, with the value that the program computes there
       as its example. Parameters and constants are tensors of the part.
    2. Sizes are numbers: those of `flat`, wherever they are computed. Nothing is dynamic.
    3. What is read outside of the part is an output, in the order of the graph.
    4. A cache that the part reads and continues is one still, so that its heads can be removed.

    Args:
        program: left as it is.
        nodes: names of nodes of the entry's graph; inputs, the output node, sizes and reads of
            tensors among them are ignored.
        flat: the entry's flat inputs, at the sizes that the part is for.
        entry: whose graph.

    Raises:
        GraphPruneError: there is no node of such a name, nothing outside reads what the part
            computes, or `flat` has sizes that the graph was not captured for.
    """
    source, flat = program.entries[entry], list(flat)
    source.check_sizes(flat)
    part = _part(source.graph, nodes, entry)
    results = [node for node in source.graph.nodes if node in part and _is_result(node, part)]
    if not results:
        raise GraphPruneError(
            f"nothing outside reads what these {len(part)} nodes of {entry!r} compute: add nodes "
            "up to one whose result is read"
        )
    outside = [n for n in source.graph.nodes if n not in part and not part.isdisjoint(n.users)]
    values = _values(program, entry, flat, [n.name for n in outside if n.op != "get_attr"])
    graph = _copied(source.graph, part, results, values)
    return _program_of(program, source, graph, results, values)


def _part(graph: fx.Graph, names: Collection[str], entry: str) -> set[fx.Node]:
    """The nodes of these names that compute tensors, and what picks one of several tensors."""
    by_name = {node.name: node for node in graph.nodes}
    if unknown := sorted(set(names) - by_name.keys()):
        raise GraphPruneError(f"the graph of {entry!r} has no node {unknown[0]!r}")
    part = {by_name[name] for name in names}
    part = {n for n in part if n.op == "call_function" and not _is_number(n) and not has_effect(n)}
    picks = {node for node in graph.nodes if node.target is operator.getitem}
    return (part - picks) | {node for node in picks if node.args[0] in part}


def _is_number(node: fx.Node) -> bool:
    """Whether a node computes a size, or something of sizes alone."""
    number = int | float | torch.SymInt | torch.SymFloat | torch.SymBool
    return "val" in node.meta and isinstance(value_of(node), number)


def _is_result(node: fx.Node, part: set[fx.Node]) -> bool:
    """Whether a tensor of the part is read outside, not only for its size."""
    readers = (user for user in node.users if user not in part and not _is_number(user))
    return isinstance(value_of(node), Tensor) and any(True for _ in readers)


def _values(
    program: Program, entry: str, flat: Sequence[Tensor], names: Sequence[str]
) -> dict[str, Any]:
    """Compute these nodes of an entry from flat inputs, and nothing else; values by name."""
    module = graph_module(program, entry)
    by_name = {node.name: node for node in module.graph.nodes}
    output_node(module.graph).args = (tuple(by_name[name] for name in names),)
    module.graph.eliminate_dead_code()
    module.recompile()
    with torch.no_grad():
        values = module(*flat)
    return {
        name: value.contiguous() if isinstance(value, Tensor) else value
        for name, value in zip(names, values, strict=True)
    }


def _copied(
    graph: fx.Graph, part: set[fx.Node], results: Sequence[fx.Node], values: Mapping[str, Any]
) -> fx.Graph:
    """The part over placeholders for the tensors among the values, numbers written in."""
    copied = fx.Graph()
    memo: dict[fx.Node, Any] = {n: values[n.name] for n in graph.nodes if n.name in values}
    for node, value in memo.items():
        if isinstance(value, Tensor):
            memo[node] = copied.placeholder(node.name)
            memo[node].name = node.name  # fx has its own for one called `input`
    for node in graph.nodes:
        if node in part or (node.op == "get_attr" and not part.isdisjoint(node.users)):
            memo[node] = copied.node_copy(node, memo.__getitem__)
            memo[node].name = node.name
    copied.output(tuple(memo[node] for node in results))
    erase_dead(copied)  # what was there for its size
    for node in copied.find_nodes(op="placeholder"):
        if not node.users:
            copied.erase_node(node)
    return copied


def _program_of(
    program: Program,
    source: Entry,
    graph: fx.Graph,
    results: Sequence[fx.Node],
    values: Mapping[str, Any],
) -> Program:
    """The program over the tensors that the copied graph reads."""
    names = [node.name for node in graph.nodes if node.op == "placeholder"]
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    ends = flat_outputs(source.graph)
    leaf = pytree.tree_flatten(0)[1]
    made = Entry(
        graph=graph,
        arguments=tuple(Argument(name, leaf, (name,)) for name in names),
        out_spec=pytree.tree_flatten((0,) * len(results))[1],
        example=tuple(values[name] for name in names),
        dynamic={},
        second={},
        cache={
            past: results.index(ends[number])
            for past, number in source.cache.items()
            if past in names and ends[number] in results
        },
    )
    return Program(
        tensors={name: tensor for name, tensor in program.tensors.items() if name in read},
        parameters=program.parameters & read,
        aliases={alias: name for alias, name in program.aliases.items() if name in read},
        entries={"forward": made},
        model=program.model,
        frozen=program.frozen & read,
        overlapping=program.overlapping & read,
        zeroed=frozenset(n for n in program.zeroed if program.aliases.get(n, n) in read),
        axis_names=program.axis_names,
        quantization=program.quantization,
    ).with_graphs({})
