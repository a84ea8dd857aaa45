"""MergeLora: adapters are added to the weights that they adapt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from graphprune.axes.adapters import Adapter, adapters
from graphprune.capture.fold import computed
from graphprune.ir.graph import erase_dead, tensor_nodes, value_of
from graphprune.ir.program import Program
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.registry import register


@register
@final
@dataclass(frozen=True, slots=True)
class MergeLora(Pass):
    """Add the products of adapters to the weights that they adapt (LoRA, arXiv 2106.09685).

    W x + c + s · B (A x)   becomes   (W + s B A) x + c        rank of A below both sides

    1. Linear layers, embeddings and convolutions (one group); several adapters at one layer, their
       biases, and scales of outputs that are made of parameters (DoRA).
    2. A pair counts where its product is added to that of a weight with the same input, whatever
       it is called. One that stands alone stays: it is a layer made smaller.
    3. A weight that is read elsewhere too, or whose zeros passes keep, is left alone and reported,
       as is one in half precision: the sum would be rounded once more, visibly.
    4. Tensors that nothing reads, before or after, are dropped, and their values counted.
    5. The merged weight trains where one of those that it is made of did.

    Ranks that are not merged have the role "rank"; no pass cuts them unless it names that role.
    """

    name: ClassVar[str] = "merge-lora"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE | Invariant.NUMERICS
    idempotent: ClassVar[bool] = True

    def run(self, program: Program, ctx: Context) -> PassResult:
        graphs = program.fork_graphs()
        by_weight: dict[str, list[Adapter]] = defaultdict(list)
        for graph in graphs.values():
            for adapter in adapters(graph):
                by_weight[adapter.layer.factor.tensor].append(adapter)
        changed: dict[str, Tensor] = {}
        merged: list[str] = []
        skipped: list[dict[str, str]] = []
        for name, found in by_weight.items():
            new = _merged(program, graphs, name, found)
            if isinstance(new, str):
                skipped.append({"node": found[0].node.name, "reason": new})
                continue
            changed |= new
            merged.append(name)
            for adapter in found:
                adapter.node.replace_all_uses_with(adapter.layer.node)
        for graph in graphs.values():
            erase_dead(graph)
        read = {str(n.target) for graph in graphs.values() for n in tensor_nodes(graph)}
        unread = sorted(set(program.tensors) - read)
        report: dict[str, Any] = {"merged": sorted(merged), "skipped": skipped}
        if not merged and not unread:
            return PassResult(program, False, report)
        report |= {
            "tensors": unread,
            "values": sum(program.tensors[name].numel() for name in unread),
        }
        if merged:
            report["summary"] = (
                f"adapters of {len(merged)} weight{'s' * (len(merged) > 1)}, {len(unread)} tensors"
            )
        trained = {name for name in changed if _trains(program, by_weight, name)}
        after = program.with_graphs(graphs, {**program.tensors, **changed})
        after = replace(after, frozen=after.frozen - trained)
        return PassResult(after.without_tensors(unread), True, report)


def _merged(
    program: Program, graphs: Mapping[str, fx.Graph], weight: str, found: Sequence[Adapter]
) -> dict[str, Tensor] | str:
    """The new weight, and bias where it changes, of all the adapters of one; or why it stays."""
    if reason := _obstacle(program, weight, found):
        return reason
    results: list[dict[str, Tensor]] = []
    for adapter in found:
        result = _tensors(program, adapter)
        if isinstance(result, str):
            return result
        results.append(result)
    for result in results[1:]:
        same = result.keys() == results[0].keys() and all(
            torch.equal(tensor, results[0][name]) for name, tensor in result.items()
        )
        if not same:
            return f"{weight} is adapted in two ways"
    nodes = frozenset[fx.Node]().union(*(adapter.nodes for adapter in found))
    for name in results[0]:
        if elsewhere := _read_elsewhere(graphs, name, found, nodes):
            return elsewhere
    return results[0]


def _obstacle(program: Program, weight: str, found: Sequence[Adapter]) -> str:
    """Why adapters cannot be added to a weight, whatever their values; or an empty string."""
    if program.tensors[weight].dtype not in (torch.float32, torch.float64):
        return f"{weight} is {program.tensors[weight].dtype}, and merging would round it again"
    if program.zeroed & {weight, *(a for a, name in program.aliases.items() if name == weight)}:
        return f"{weight} has zeros that a pass has set: merge before"
    for adapter in found:
        layer, node = value_of(adapter.layer.node), value_of(adapter.node)
        if layer.dtype is not node.dtype:
            return f"the sum {adapter.node.name} is {node.dtype}, and the layer's {layer.dtype}"
    return ""


def _tensors(program: Program, adapter: Adapter) -> dict[str, Tensor] | str:
    """The new weight of an adapter's layer, and its bias where that changes; or why not."""
    layer = adapter.layer

    def value(node: fx.Node) -> Tensor:
        return computed(node.graph, [node], program.tensors)[node]

    matrix, vector = adapter.merged(program.tensors, value)
    name = layer.factor.tensor
    new = {name: layer.factor.stored(matrix, program.tensors[name])}
    vectors = [term for term in adapter.terms if term.vector is not None]
    if vector is None or (len(vectors) == 1 and vectors[0].vector is layer.bias):
        return new
    if layer.bias is None or layer.bias.op != "get_attr":
        return f"the adapters of {name} have biases, and {layer.node.name} has none to add them to"
    bias = str(layer.bias.target)
    return {**new, bias: vector.to(program.tensors[bias].dtype)}


def _read_elsewhere(
    graphs: Mapping[str, fx.Graph], name: str, found: Sequence[Adapter], nodes: frozenset[fx.Node]
) -> str:
    """Where a tensor, or what is computed of it, is read by others than the sums; or nothing."""
    sums = {adapter.node for adapter in found}
    for node in _reached(graphs, name, sums):
        if node not in nodes:
            return f"{name} is read elsewhere too: by {node.name}"
    return ""


def _reached(graphs: Mapping[str, fx.Graph], name: str, last: set[fx.Node]) -> Iterator[fx.Node]:
    """The nodes that a tensor's values reach, none after `last`."""
    reads = [n for g in graphs.values() for n in g.nodes if (n.op, n.target) == ("get_attr", name)]
    stack, seen = [user for read in reads for user in read.users], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if node not in last:
            stack += node.users


def _trains(program: Program, by_weight: Mapping[str, Sequence[Adapter]], name: str) -> bool:
    """Whether training moved something that a merged tensor is made of."""
    trained = program.parameters - program.frozen
    return any(
        factor.tensor in trained
        for adapter in (a for found in by_weight.values() for a in found)
        if name == adapter.layer.factor.tensor
        or (adapter.layer.bias is not None and name == adapter.layer.bias.target)
        for term in adapter.terms
        for factor in term.factors
    )
