"""Residual branches: the f of every sum x + f(x), found in the graph, never by names."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from graphprune.axes import algebra
from graphprune.axes.analysis import Axes, axis_leaves, dims_of
from graphprune.axes.facts import size_of
from graphprune.axes.groups import axis_groups
from graphprune.axes.roles import Walk, operands
from graphprune.ir.graph import bound_arguments, flat_outputs, has_effect, op_name
from graphprune.ir.program import Entry, Program

KINDS = ("attention", "ffn", "other")


@dataclass(frozen=True, slots=True)
class Place:
    """Names of the nodes of one sum x + f(x) in an entry's graph.

    Attributes:
        add: the sum.
        stream: x.
        value: f(x).
        dim: dimension of the sum that f sums over: its features.
    """

    add: str
    stream: str
    value: str
    dim: int = -1


@dataclass(frozen=True, slots=True)
class Branch:
    """A residual branch: the f of x + f(x), which leaves x where it is removed.

    Attributes:
        id: dotted name of the module that the branch's matrices share; "#2" and so on after it
            where several branches share one.
        kind: "attention" has a product of two activations, "ffn" products with matrices and no
            attention, "other" neither (convolutions).
        places: entry name -> where it is in that graph.
        tensors: parameters that only this branch reads.
    """

    id: str
    kind: str
    places: Mapping[str, Place] = field(hash=False)
    tensors: frozenset[str]

    def nodes(self, program: Program, entry: str) -> list[fx.Node]:
        """Nodes that are dead once the sum is replaced by x, in order: the sum, and what it needs.

        What goes into a cache keeps nothing alive, and is dead with the branch.

        Args:
            program: with nodes of these names: the one that was searched, a fork of it, or one that
                lost units of axes since.
            entry: name of one of its entries.
        """
        return dead_nodes(program.entries[entry], [self.places[entry]])


def branches(program: Program) -> list[Branch]:
    """The residual branches of a program, in execution order.

    A branch is a summand f(x), of the sum's shape, that reads x and sums by weights over the very
    axis that it is added to. Those that hold another branch are left out, and so are those whose
    products all serve others too, and those that are not in every entry.
    """
    axes = axis_groups(program).axes
    found = {name: _found(axes, name) for name in program.entries}
    readers = _readers(program)
    names: Counter[str] = Counter()
    result = []
    for key, (_, kind) in next(iter(found.values())).items():
        if not all(key in other for other in found.values()):
            continue
        places = {name: other[key][0] for name, other in found.items()}
        dead = {
            (name, node.name)
            for name, place in places.items()
            for node in dead_nodes(program.entries[name], [place])
        }
        name = _name(program, key[0]) or places[program.deployed].add
        names[name] += 1
        result.append(
            Branch(
                f"{name}#{names[name]}" if names[name] > 1 else name,
                kind,
                places,
                frozenset(tensor for tensor in key[0] if readers[tensor] <= dead),
            )
        )
    return result


def dead_nodes(entry: Entry, places: Iterable[Place]) -> list[fx.Node]:
    """The nodes that are dead once each of these sums is replaced by its x; see `Branch.nodes`."""
    of = {node.name: node for node in entry.graph.nodes}
    before = _alive(entry, {})
    dead = before - _alive(entry, {of[place.add]: of[place.value] for place in places})
    for node in entry.graph.nodes:
        cached_alone = node.op == "call_function" and node not in before
        if cached_alone and not dead.isdisjoint(node.all_input_nodes):
            dead.add(node)
    return [n for n in entry.graph.nodes if n in dead and n.op in {"call_function", "get_attr"}]


def _alive(entry: Entry, removed: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """Nodes that results or effects need, caches left out, without some sums' one summand."""
    cached = set(entry.cache.values())
    stack = [n for n in entry.graph.nodes if n.op == "call_function" and has_effect(n)]
    for number, result in enumerate(flat_outputs(entry.graph)):
        if isinstance(result, fx.Node) and number not in cached:
            stack.append(result)
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += (n for n in node.all_input_nodes if n is not removed.get(node))
    return seen - removed.keys()


_Key = tuple[frozenset[str], int]  # parameters that a branch reads; its number among equal ones


def _found(axes: Axes, name: str) -> dict[_Key, tuple[Place, str]]:
    """Place and kind of the branches of an entry, in execution order."""
    entry, facts = axes.program.entries[name], axes.facts[name]
    walk = Walk(axes, name, facts, entry.graph)
    products = {c.node for c in walk.weighted}
    attention = {node for node, _, _ in facts.attention}
    candidates = [(place, set(dead_nodes(entry, [place]))) for place in _places(walk)]
    candidates = [(place, nodes) for place, nodes in candidates if nodes & products]
    sums = {place.add for place, _ in candidates}
    result: dict[_Key, tuple[Place, str]] = {}
    numbers: dict[frozenset[str], Iterator[int]] = {}
    for place, nodes in candidates:
        if len(sums.intersection(n.name for n in nodes)) > 1:
            continue
        read = frozenset(
            str(source.target)
            for node in nodes
            for source in node.all_input_nodes
            if source.op == "get_attr" and source.target in axes.program.parameters
        )
        matrices = any(not op_name(node).startswith("conv") for node in nodes & products)
        kind = "attention" if nodes & attention else "ffn" if matrices else "other"
        result[read, next(numbers.setdefault(read, itertools.count()))] = (place, kind)
    return result


def _places(walk: Walk) -> Iterator[Place]:
    """Sums x + f(x); in (x + f(x)) + g(x) both f and g are branches."""
    streams: dict[fx.Node, fx.Node] = {}
    for node in walk.nodes:
        for x, f in operands(node):
            if not _fits(node, x, f) or walk.after(x, f):
                continue
            source = x
            while not walk.returned(f, source) and source in streams:
                source = streams[source]
            if features := walk.returned(f, source):
                streams[node] = x
                dims = dims_of(walk.axes, walk.name, node)
                dim = next(i for i, d in enumerate(dims) if features & axis_leaves((d,)))
                yield Place(node.name, x.name, f.name, dim)
                break


def _fits(node: fx.Node, x: fx.Node, f: fx.Node) -> bool:
    """Whether the sum without f is x: sizes and type are the sum's, and nothing is scaled."""
    whole, *parts = (n.meta["val"] for n in (node, x, f))
    return bound_arguments(node).get("alpha", 1) == 1 and all(
        isinstance(part, Tensor)
        and part.dtype is whole.dtype
        and part.dim() == whole.dim()
        and all(map(algebra.equal, map(size_of, part.shape), map(size_of, whole.shape)))
        for part in parts
    )


def _readers(program: Program) -> dict[str, set[tuple[str, str]]]:
    """Where each tensor is read: (entry, node)."""
    readers: dict[str, set[tuple[str, str]]] = {name: set() for name in program.tensors}
    for name, entry in program.entries.items():
        for node in entry.graph.nodes:
            if node.op == "get_attr":
                readers[str(node.target)].add((name, node.name))
    return readers


def _name(program: Program, tensors: Iterable[str]) -> str:
    """The innermost module that holds the matrices among these tensors; empty for none."""
    names = sorted(tensors)
    matrices = [name for name in names if program.tensors[name].dim() > 1] or names
    paths = [name.split(".")[:-1] for name in matrices]
    levels = zip(*paths, strict=False)
    shared = [parts[0] for parts in itertools.takewhile(lambda p: len(set(p)) == 1, levels)]
    return ".".join(shared) or next((".".join(path) for path in paths if path), "")
