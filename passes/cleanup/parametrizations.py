"""FoldParametrizations: weights that the model computes of others become weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

from torch import Tensor, fx

from graphprune.capture.fold import MAX_GROWTH, fold
from graphprune.ir.graph import erase_dead, op_name, tensor_nodes
from graphprune.ir.program import Program
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.registry import register

# They change no value: a weight that is only turned or cast is a weight already.
_MOVES = {
    "t", "numpy_T", "mT", "transpose", "permute", "view", "reshape", "_unsafe_view", "flatten",
    "unflatten", "squeeze", "unsqueeze", "expand", "contiguous", "clone", "detach", "alias", "to",
    "_to_copy", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "getitem",
    "cat", "stack", "narrow", "repeat", "repeat_interleave", "embedding", "index",
}  # fmt: skip


@register
@final
@dataclass(frozen=True, slots=True)
class FoldParametrizations(Pass):
    """Compute weights that are made of parameters alone, and keep the result as the weight.

    g * v / |v|   becomes   w        weight norm
    w / sigma(w)  becomes   w        spectral norm
    (w - mean(w)) / std(w)           weight standardization; orthogonal, and any other

    An axis that such a norm sums over cannot lose units, because the others would be scaled again;
    that of the plain weight can.

    1. The new weight trains, and has the name of what it replaces: "conv.weight" of
       "conv.weight_v" or "conv.parametrizations.weight.original1".
    2. What only turns, cuts or casts a weight stays as it is.
    3. A weight that needs more than 64 KiB beyond the tensors that go stays computed, and is
       reported: its parameters are read elsewhere too.
    4. Tensors that nothing reads, before or after, are dropped, and their values counted.
    """

    name: ClassVar[str] = "fold-parametrizations"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE | Invariant.NUMERICS
    idempotent: ClassVar[bool] = True

    def run(self, program: Program, ctx: Context) -> PassResult:
        graphs = program.fork_graphs()
        made: dict[str, Tensor] = {}
        skipped: list[dict[str, Any]] = []
        origins: dict[str, set[str]] = {}
        for graph in graphs.values():
            parents = _parameters_read(graph, program)
            taken = {*program.tensors, *program.aliases, *made}
            weights = _weights(graph, parents)
            found = fold(graph, program.tensors, taken, wanted=weights.__contains__)
            made |= found.tensors
            origins |= _origins(found.made, parents)
            skipped += [_skipped(name, growth) for name, growth in found.skipped.items()]
            erase_dead(graph)
        read = {str(n.target) for graph in graphs.values() for n in tensor_nodes(graph)}
        unread = sorted(set(program.tensors) - read)
        report: dict[str, Any] = {"folded": [], "skipped": skipped}
        if not made and not unread:
            return PassResult(program, False, report)
        names = _named(origins, {*program.tensors, *program.aliases} - {*unread})
        for graph in graphs.values():
            for node in tensor_nodes(graph):
                node.target = names.get(str(node.target), node.target)
        report |= {
            "folded": sorted(names.values()),
            "tensors": unread,
            "values": sum(program.tensors[name].numel() for name in unread),
        }
        new = {names[name]: tensor for name, tensor in made.items()}
        return PassResult(_with_weights(program, graphs, new, unread), True, report)


def _with_weights(
    program: Program, graphs: dict[str, fx.Graph], new: Mapping[str, Tensor], unread: Iterable[str]
) -> Program:
    """The program with new parameters and without what nothing reads."""
    gone = set(unread)
    cleaned = replace(
        program,
        tensors={n: t for n, t in program.tensors.items() if n not in gone} | dict(new),
        parameters=(program.parameters - gone) | new.keys(),
        aliases={alias: name for alias, name in program.aliases.items() if name not in gone},
        frozen=program.frozen - gone,
    )
    return cleaned.with_graphs(graphs)


def _parameters_read(graph: fx.Graph, program: Program) -> dict[fx.Node, set[str]]:
    """The parameters that each value is made of."""
    found: dict[fx.Node, set[str]] = {}
    for node in graph.nodes:
        found[node] = {name for source in node.all_input_nodes for name in found[source]}
        if node.op == "get_attr" and node.target in program.parameters:
            found[node] = {str(node.target)}
    return found


def _weights(graph: fx.Graph, parents: Mapping[fx.Node, set[str]]) -> set[fx.Node]:
    """Values that are computed of parameters, and of which no other weight is computed."""
    inputs: set[fx.Node] = set()  # what depends on inputs
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in inputs for n in node.all_input_nodes):
            inputs.add(node)
    inner: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op != "call_function" or node in inputs or not parents[node]:
            continue
        computed = op_name(node) not in _MOVES
        value = node.meta["val"]
        real = isinstance(value, Tensor) and value.is_floating_point()
        if node not in inner and computed and real:
            found.add(node)
        if computed or node in inner:
            inner.update(node.all_input_nodes)
    return found


def _origins(
    made: Mapping[str, fx.Node], parents: Mapping[fx.Node, set[str]]
) -> dict[str, set[str]]:
    return {name: parents[node] for name, node in made.items()}


def _skipped(name: str, growth: int) -> dict[str, Any]:
    return {
        "node": name,
        "reason": f"grows by {growth} bytes: its parameters are read elsewhere too "
        f"(at most {MAX_GROWTH})",
    }


_PARAMETRIZED = re.compile(r"(?:(.+)\.)?parametrizations\.(\w+)\.original\d*$")
_HOOKED = re.compile(r"(.+)_(?:v|g|orig)$")


def _named(origins: Mapping[str, set[str]], taken: Collection[str]) -> dict[str, str]:
    """Names for new weights: of what they replace, where that is free; else the given ones."""
    names: dict[str, str] = {}
    used = set(taken)
    for given, parameters in origins.items():
        wanted = {_plain(name) for name in parameters}
        name = wanted.pop() if len(wanted) == 1 else given
        # A tensor's name is a path of attributes, and must not be the beginning of another.
        if any(u == name or u.startswith(f"{name}.") or name.startswith(f"{u}.") for u in used):
            name = given
        names[given] = name
        used.add(name)
    return names


def _plain(parameter: str) -> str:
    """The weight's name without what a parametrization adds to it."""
    if found := _PARAMETRIZED.match(parameter):
        return f"{found[1]}.{found[2]}" if found[1] else found[2]
    found = _HOOKED.match(parameter)
    return found[1] if found else parameter
