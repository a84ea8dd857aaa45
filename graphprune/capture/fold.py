"""Constants: what depends on neither inputs nor parameters is computed once, and is a tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ir.graph import bound_arguments, has_effect, is_op

MAX_GROWTH = 65536

# A lone one of these takes the axis that it meets, and is as cheap as reading a tensor.
_FILLED = ("zeros", "ones", "full", "empty", "scalar_tensor", "empty_strided", "empty_permuted")


@dataclass(slots=True)
class Folding:
    """The result of `fold`.

    Attributes:
        tensors: the constants that the graph now reads, by name.
        skipped: names of nodes that stay computed -> bytes by which they would grow.
        resized: a size that was unknown until a constant was computed is a number now: metadata
            must be propagated again.
        made: the nodes that the constants take the place of, by name of the constant.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    resized: bool = False
    made: dict[str, fx.Node] = field(default_factory=dict)


def fold(
    graph: fx.Graph,
    sources: Mapping[str, Tensor],
    taken: Collection[str],
    max_growth: int = MAX_GROWTH,
    wanted: Callable[[fx.Node], bool] = lambda node: True,
) -> Folding:
    """Let a graph read constants where it computed them; in place, dead nodes stay.

    1. Dynamic sizes, random operators and operators with an effect are never constant.
    2. What needs more than `max_growth` bytes beyond the tensors that it makes needless stays
       computed, from the largest constants that do not: an expanded mask would fill the memory.
    3. A lone `zeros` or its like stays.

    Args:
        graph: with metadata.
        sources: tensors that count as constant, by name.
        taken: names that no new tensor may have.
        max_growth: bytes, of each constant.
        wanted: which constants are taken; what leads to others is looked at in their place.
    """
    constant = _constant(graph, sources)
    result = Folding()
    chosen: list[fx.Node] = []
    live = {node for node in graph.nodes if node not in constant}
    for node in reversed(graph.nodes):
        if node in live or live.isdisjoint(node.users):
            continue
        if _is_foldable(node) and wanted(node):
            growth = _nbytes(node, sources) - _nbytes_freed(node, sources)
            if growth <= max_growth:
                chosen.append(node)
                continue
            result.skipped[node.name] = growth
        live.add(node)
    for node, value in computed(graph, chosen, sources).items():
        name = _free_name(f"folded_{node.name}", [*taken, *result.tensors])
        result.tensors[name] = value.clone(memory_format=torch.contiguous_format)
        result.made[name] = node
        result.resized |= not _is_sized(node)
        with graph.inserting_before(node):
            read = graph.create_node("get_attr", name)
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read)
    return result


def number_masks(graph: fx.Graph, sources: Mapping[str, Tensor]) -> None:
    """Turn lookups by a constant mask [size] into lookups by the numbers of its ones, in place."""
    constant = _constant(graph, sources)
    for node in list(graph.nodes):
        found = _lookup(node)
        if found is None or found[1] not in constant:
            continue
        dim, mask = found
        fake = mask.meta["val"]
        if fake.dtype is not torch.bool or fake.dim() != 1 or 8 * fake.numel() > MAX_GROWTH:
            continue
        with graph.inserting_before(node):
            places = graph.call_function(torch.ops.aten.nonzero.default, (mask,))
            numbers = graph.call_function(torch.ops.aten.select.int, (places, 1, 0))
        count = node.meta["val"].shape[dim]
        with fake.fake_mode:
            places.meta["val"] = torch.empty((count, 1), dtype=torch.int64, device=fake.device)
            numbers.meta["val"] = torch.empty((count,), dtype=torch.int64, device=fake.device)
        node.replace_input_with(mask, numbers)


def spell_indices(graph: fx.Graph, sources: Mapping[str, Tensor]) -> None:
    """Turn lookups by constant numbers in even steps into slices, in place.

    x[:, [2, 3, 4]] is x[:, 2:5].
    """
    for node in list(graph.nodes):
        found = _lookup(node)
        if found is None or found[1].target not in sources:
            continue
        dim, index = found
        size = node.args[0].meta["val"].shape[dim]
        places = sources[str(index.target)]
        if not isinstance(size, int) or places.dtype not in (torch.int32, torch.int64):
            continue
        if not size or (places >= size).any() or (places < -size).any():
            continue  # the model fails there, and must go on to do so
        part_of = _range(places % size, size)
        if part_of is None:
            continue
        with graph.inserting_before(node):
            part = graph.call_function(torch.ops.aten.slice.Tensor, (node.args[0], dim, *part_of))
            # A lookup copies; operators after it may rely on its strides.
            layout: dict[str, Any] = {"memory_format": torch.contiguous_format}
            copy = graph.call_function(torch.ops.aten.clone.default, (part,), layout)
        part.meta, copy.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(copy)
        graph.erase_node(node)


def _lookup(node: fx.Node) -> tuple[int, fx.Node] | None:
    """Dimension and index of a lookup by one tensor."""
    given = bound_arguments(node)
    if is_op(node, "index_select") and (rank := given["self"].meta["val"].dim()):
        return given["dim"] % rank, given["index"]
    if is_op(node, "index"):
        found = [(dim, index) for dim, index in enumerate(given["indices"]) if index is not None]
        return found[0] if len(found) == 1 else None
    return None


def _range(places: Tensor, size: int) -> tuple[int, int, int] | None:
    """Start, end and step of what goes through these places alone; None when nothing does."""
    if places.dim() != 1 or not places.numel():
        return None
    first, last = int(places[0]), int(places[-1])
    step, *others = sorted(set(places.diff().tolist())) or [1]
    if others or step <= 0:
        return None
    return first, size if last + step >= size else last + 1, step


def _constant(graph: fx.Graph, sources: Mapping[str, Tensor]) -> set[fx.Node]:
    """Nodes that depend on nothing but `sources`."""
    written = {node.args[0] for node in graph.nodes if node.args and has_effect(node)}
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            if node.target in sources and node not in written:
                found.add(node)
        elif _is_pure(node) and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function" or has_effect(node) or is_op(node, "dropout", "feature_dropout"):
        return False
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags


def _is_foldable(node: fx.Node) -> bool:
    """Whether a constant node took computing, and gives a tensor that a file can hold."""
    value = node.meta["val"]
    return (
        node.op == "call_function"
        and isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_complex()
        and not is_op(node, *_FILLED)
    )


def computed(
    graph: fx.Graph, wanted: Collection[fx.Node], sources: Mapping[str, Tensor]
) -> dict[fx.Node, Tensor]:
    """Values of constant nodes, in the graph's order; what leads to them goes as soon as it can.

    Args:
        graph: with metadata.
        wanted: nodes that depend on no input.
        sources: the tensors that the graph reads, by name.
    """
    needed = _with_ancestors(wanted)
    readers = Counter(source for node in needed for source in node.all_input_nodes)
    kept = set(wanted)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in graph.nodes:
            if node not in needed:
                continue
            if node.op == "get_attr":
                values[node] = sources[str(node.target)].detach()
                continue
            args = fx.node.map_arg(node.args, values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*args, **kwargs)
            for source in node.all_input_nodes:
                readers[source] -= 1
                if not readers[source] and source not in kept:
                    del values[source]
    return values


def _with_ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found, stack = set(nodes), list(nodes)
    while stack:
        new = set(stack.pop().all_input_nodes) - found
        found |= new
        stack += new
    return found


def _is_sized(node: fx.Node) -> bool:
    """Whether the shape is known without the values, as it is not after `nonzero`."""
    return all(isinstance(size, int) for size in node.meta["val"].shape)


def _nbytes(node: fx.Node, sources: Mapping[str, Tensor]) -> int:
    value = node.meta["val"]
    if not _is_sized(node):
        value = computed(node.graph, [node], sources)[node]
    return int(value.numel()) * int(value.element_size())


def _nbytes_freed(node: fx.Node, sources: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors that only this node's computation reads."""
    region, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in region and region.issuperset(source.users):
                region.add(source)
                stack.append(source)
    return sum(sources[str(n.target)].nbytes for n in region if n.op == "get_attr")


def _free_name(wanted: str, taken: Iterable[str]) -> str:
    # A tensor's name becomes an attribute path, so it must not be the beginning of another either.
    heads = {name.split(".")[0] for name in taken}
    name, n = wanted, 0
    while name in heads:
        n += 1
        name = f"{wanted}_{n}"
    return name
