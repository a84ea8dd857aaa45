"""Whole residual branches: with gates that close them, or removed for good.

    x + f(x)   with a gate     x + masked_fill(f(x), gate, 0)
    x + f(x)   dropped         x

A closed gate gives x + 0, which is x: both compute the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from graphprune.axes.branches import Branch, Place, dead_nodes
from graphprune.axes.groups import axis_groups, names_after
from graphprune.errors import UnsupportedError
from graphprune.ir.graph import erase_dead, flat_outputs, op_name, output_node
from graphprune.ir.program import Entry, Program
from graphprune.ir.sizes import Relation
from graphprune.rewrite.mask import MASK, filled


def gated(program: Program, branches: Iterable[Branch]) -> tuple[Program, dict[str, str]]:
    """The same program with a gate at every branch, all of them open.

    Args:
        program: left as it is.
        branches: of this program.

    Returns:
        The program, whose shapes and metadata are the old ones; and id of a branch -> name of its
        gate, a tensor of one bool that all entries share: True closes it.
    """
    fork = program.fork()
    tensors = dict(fork.tensors)
    gates = {}
    for branch in branches:
        gate = gates[branch.id] = f"{MASK}gate_{len(tensors)}"
        for name, place in branch.places.items():
            graph = fork.entries[name].graph
            add, value = _nodes(graph, place.add, place.value)
            tensors[gate] = torch.zeros((), dtype=torch.bool, device=value.meta["val"].device)
            with graph.inserting_before(add):
                masked = filled(graph, value, gate, tensors[gate])
            add.replace_input_with(value, masked)
    return replace(fork, tensors=tensors), gates


def closed(program: Program, gates: Iterable[str]) -> Program:
    """A gated program with these gates closed."""
    return program.with_tensors({g: torch.ones_like(program.tensors[g]) for g in gates})


def drop(program: Program, branches: Iterable[Branch]) -> Program:
    """Remove residual branches for good: every sum x + f(x) becomes x.

    1. What nothing reads any more is removed: nodes, tensors and their tied names.
    2. A layer whose attention is gone has no cache: its keys and values are neither inputs nor
       outputs, and the layers after it move up. Placeholders keep their names.
    3. Axis groups keep their names.

    Args:
        program: left as it is.
        branches: of this program.

    Raises:
        UnsupportedError: no layer with a cache would be left of an entry that has one, or something
            else reads a cache that would go.
    """
    gone = list(branches)
    entries = {
        name: _without(name, entry, [branch.places[name] for branch in gone])
        for name, entry in program.fork().entries.items()
    }
    changed = replace(program, entries=entries)
    result = changed.without_tensors(program.read() - changed.read()).with_graphs({})
    result = replace(result, axis_names=names_after(axis_groups(program), {}, result))
    return result.record({"dropped": [branch.id for branch in gone]})


def _nodes(graph: fx.Graph, *names: str) -> list[fx.Node]:
    found = {node.name: node for node in graph.nodes}
    return [found[name] for name in names]


def _without(name: str, entry: Entry, places: Collection[Place]) -> Entry:
    """An entry of a fork without these branches, metadata stale."""
    graph = entry.graph
    dead = set(dead_nodes(entry, places))
    for place in places:
        add, value = _nodes(graph, place.add, place.value)
        (stream,) = (node for node in add.all_input_nodes if node is not value)
        add.replace_all_uses_with(stream)
    results = flat_outputs(graph)
    pairs = {past: number for past, number in entry.cache.items() if results[number] in dead}
    if pairs and len(pairs) == len(entry.cache):
        raise UnsupportedError(
            f"no layer with a key/value cache would be left in entry {name!r}: keep the attention "
            "of one"
        )
    output_node(graph).args = (
        tuple(r for number, r in enumerate(results) if number not in pairs.values()),
    )
    erase_dead(graph)
    return _without_cache(entry, pairs) if pairs else entry


def _without_cache(entry: Entry, pairs: Mapping[str, int]) -> Entry:
    """An entry without some placeholders of its cache, whose outputs its graph has lost."""
    at = _SameSizes(entry, pairs)
    for node in _nodes(entry.graph, *pairs):
        for user in list(node.users):
            if op_name(user) != "sym_size":
                raise UnsupportedError(
                    f"input {node.name!r} is read by {user.name!r} too, outside of the attention "
                    "that would go"
                )
            other, dim = at.place(node.name, int(user.args[1]))  # type: ignore[arg-type]
            user.args = (*_nodes(entry.graph, other), dim)
        entry.graph.erase_node(node)
    left = [n for n in range(entry.out_spec.num_leaves) if n not in pairs.values()]
    return replace(
        entry,
        arguments=tuple(
            replace(
                argument,
                spec=_pruned(argument.spec, [leaf not in pairs for leaf in argument.leaves]),
                leaves=tuple(leaf for leaf in argument.leaves if leaf not in pairs),
            )
            for argument in entry.arguments
        ),
        out_spec=_pruned(entry.out_spec, [n in left for n in range(entry.out_spec.num_leaves)]),
        example=tuple(t for n, t in zip(at.names, entry.example, strict=True) if n not in pairs),
        dynamic={name: dims for name, dims in entry.dynamic.items() if name not in pairs},
        fixed={name: dims for name, dims in entry.fixed.items() if name not in pairs},
        cache={p: left.index(number) for p, number in entry.cache.items() if p not in pairs},
        relations=tuple(at.moved(relation) for relation in entry.relations),
    )


class _SameSizes:
    """Where else the sizes of inputs that go are: dimensions of one name have one size."""

    def __init__(self, entry: Entry, gone: Collection[str]) -> None:
        self.names, self.dynamic, self.gone = entry.input_names, entry.dynamic, gone
        self.found = {
            symbol: (name, dim)
            for name in reversed(self.names)
            for dim, symbol in entry.dynamic.get(name, {}).items()
            if name not in gone
        }

    def place(self, name: str, dim: int) -> tuple[str, int]:
        """An input that stays and its dimension of this size."""
        symbol = self.dynamic.get(name, {}).get(dim, "")
        if symbol not in self.found:
            raise UnsupportedError(
                f"the size of input {name!r} in dimension {dim} is read, and no input that stays "
                "has it"
            )
        return self.found[symbol]

    def moved(self, relation: Relation) -> Relation:
        """The relation over inputs that stay."""
        sizes = {
            variable: self.place(name, dim) if name in self.gone else (name, dim)
            for variable, (name, dim) in relation.sizes.items()
        }
        return Relation(relation.text, sizes)


def _pruned(spec: pytree.TreeSpec, left: Sequence[bool]) -> pytree.TreeSpec:
    """The nesting without some leaves, and without lists and dicts that held nothing else."""
    tree = _filtered(pytree.tree_unflatten([None if kept else _GONE for kept in left], spec))
    return pytree.tree_flatten(tree, is_leaf=lambda x: x is None)[1]


_GONE = object()


def _filtered(tree: Any) -> Any:
    if isinstance(tree, dict):
        kept = {key: part for key, value in tree.items() if (part := _filtered(value)) is not _GONE}
        return kept if kept or not tree else _GONE
    if isinstance(tree, list):
        parts = [part for value in tree if (part := _filtered(value)) is not _GONE]
        return parts if parts or not tree else _GONE
    return tree
