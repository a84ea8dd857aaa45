"""Feed-forward blocks among linear sites: weights that read one input, an elementwise function of
their products, and the weight that reads its result. Found by the graph alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, fx

from graphprune.axes.rules.elementwise import ELEMENTWISE
from graphprune.axes.sites import LinearSite
from graphprune.ir.graph import bound_arguments, is_op, op_name
from graphprune.ir.program import Program

_RESHAPES = ("view", "reshape", "_unsafe_view")
_CASTS = ("to", "_to_copy")


@final
@dataclass(frozen=True, slots=True)
class Segment:
    """Columns [start, stop) of a site's product, as the node that holds them."""

    site: LinearSite
    start: int
    stop: int
    node: fx.Node = field(repr=False)


@final
@dataclass(frozen=True, slots=True)
class FeedForward:
    """y = W_down φ(z_1, …, z_k) + b, each z_i a segment of a product with the same input.

    Attributes:
        ups: the sites that read the block's input, in execution order.
        down: the site that reads the hidden values.
        segments: what φ takes: together all columns of all ups.
        nodes: the operators of φ, in execution order; the last one gives down's operand.
    """

    ups: tuple[LinearSite, ...]
    down: LinearSite
    segments: tuple[Segment, ...]
    nodes: tuple[fx.Node, ...] = field(repr=False)

    def hidden(self, values: Sequence[Tensor], program: Program) -> Tensor:
        """φ, row by row: a float32 tensor [n, segment] each -> [n, hidden]; differentiable.

        Casts inside φ are taken out: half a model's precision is not what a solver needs.
        """
        held: dict[fx.Node, Any] = {
            s.node: value for s, value in zip(self.segments, values, strict=True)
        }

        def value(node: fx.Node) -> Any:
            return program.tensors[str(node.target)] if node.op == "get_attr" else held[node]

        for node in self.nodes:
            if is_op(node, *_RESHAPES, *_CASTS):  # rows are flat here already
                held[node] = held[node.all_input_nodes[0]]
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
                held[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        result: Tensor = held[self.down.operand]
        return result

    @property
    def is_relu(self) -> bool:
        """Whether φ is ReLU of a single product."""
        steps = [n for n in self.nodes if not is_op(n, *_RESHAPES, *_CASTS, "dropout", "clone")]
        return len(self.segments) == 1 and len(steps) == 1 and is_op(steps[0], "relu")


def find_feedforwards(sites: Sequence[LinearSite]) -> list[FeedForward]:
    """The feed-forward blocks that lie wholly among these sites; no site is in two of them."""
    products = {s.node: s for s in sites if s.expert is None and s.window is None}
    found: list[FeedForward] = []
    taken: set[str] = set()
    for site in products.values():
        block = _feedforward_of(site, products)
        if block is None:
            continue
        names = {block.down.name, *(up.name for up in block.ups)}
        if len(names) == len(block.ups) + 1 and not names & taken:
            found.append(block)
            taken |= names
    return found


def _feedforward_of(down: LinearSite, products: dict[fx.Node, LinearSite]) -> FeedForward | None:
    """Walk back from a site's operand through elementwise operators to products."""
    segments: dict[fx.Node, Segment] = {}
    nodes: set[fx.Node] = set()
    stack = [down.operand]
    while stack:
        node = stack.pop()
        if node in segments or node in nodes:
            continue
        if node.op == "get_attr":
            if node.meta["val"].dim() > 1:  # a value a place: rows are flat in the alternation
                return None
            continue
        segment = _segment(node, products)
        if segment is not None:
            segments[node] = segment
        elif op_name(node) in ELEMENTWISE or _keeps_rows(node):
            nodes.add(node)
            # A reshape reads sizes too, which are no values of the block.
            sources = node.all_input_nodes[:1] if _keeps_rows(node) else node.all_input_nodes
            stack += sources
        else:
            return None
    ups = {s.site.node: s.site for s in segments.values()}
    if not nodes or not ups or len({up.operand for up in ups.values()}) != 1 or down.node in ups:
        return None
    cuts = {node for s in segments.values() for node in _between(s)}
    inside = nodes | set(segments) | cuts | {down.node}
    if any(user not in inside for node in (*nodes, *segments, *cuts) for user in node.users):
        return None
    hidden = int(down.operand.meta["val"].shape[-1])
    if any(s.stop - s.start != hidden for s in segments.values()):  # one value for many
        return None
    for up in ups.values():
        mine = sorted((s.start, s.stop) for s in segments.values() if s.site is up)
        width = int(up.node.meta["val"].shape[-1])
        ends = [0, *(stop for _, stop in mine)]
        if [start for start, _ in mine] != ends[:-1] or ends[-1] != width:
            return None
    number = {n: i for i, n in enumerate(down.node.graph.nodes)}
    return FeedForward(
        tuple(sorted(ups.values(), key=lambda s: number[s.node])),
        down,
        tuple(sorted(segments.values(), key=lambda s: (number[s.site.node], s.start))),
        tuple(sorted(nodes, key=number.__getitem__)),
    )


def _keeps_rows(node: fx.Node) -> bool:
    """Whether a reshape leaves the last dimension alone."""
    if not is_op(node, *_RESHAPES):
        return False
    before, after = node.all_input_nodes[0].meta["val"].shape, node.meta["val"].shape
    return isinstance(before[-1], int) and before[-1:] == after[-1:]


def _segment(node: fx.Node, products: dict[fx.Node, LinearSite]) -> Segment | None:
    """A product, or consecutive columns cut from it."""
    if node in products:
        return Segment(products[node], 0, int(node.meta["val"].shape[-1]), node)
    if is_op(node, "getitem"):
        cut, index = node.args[0], node.args[1]
        if not isinstance(cut, fx.Node) or not is_op(cut, "split", "split_with_sizes", "chunk"):
            return None
        source = _product_before(cut, products)
        if source is None or bound_arguments(cut).get("dim", 0) not in (-1, _last(cut)):
            return None
        widths = [int(part.shape[-1]) for part in cut.meta["val"]]
        assert isinstance(index, int)
        start = sum(widths[: index % len(widths)])
        return Segment(source, start, start + widths[index], node)
    if is_op(node, "slice"):
        source, bound = _product_before(node, products), bound_arguments(node)
        if source is None or bound.get("dim", 0) not in (-1, _last(node)):
            return None
        width = int(source.node.meta["val"].shape[-1])
        start, stop = bound.get("start") or 0, bound.get("end")
        if bound.get("step", 1) != 1 or not isinstance(start, int):
            return None
        start, stop, _ = slice(start, stop if isinstance(stop, int) else None).indices(width)
        return Segment(source, start, stop, node)
    return None


def _product_before(node: fx.Node, products: dict[fx.Node, LinearSite]) -> LinearSite | None:
    source = node.args[0]
    while isinstance(source, fx.Node) and _keeps_rows(source):
        source = source.args[0]
    return products.get(source) if isinstance(source, fx.Node) else None


def _between(segment: Segment) -> list[fx.Node]:
    """From a product to the columns cut from it, the product included, the segment not."""
    found: list[fx.Node] = []
    node = segment.node
    while node is not segment.site.node:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        found.append(source)
        node = source
    return found


def _last(node: fx.Node) -> int:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank: int = source.meta["val"].dim()
    return rank - 1


def assembled(block: FeedForward, up: LinearSite, values: Sequence[Tensor]) -> Tensor:
    """The columns of a site's product from the segments' values, [n, out]."""
    pairs = zip(block.segments, values, strict=True)
    return torch.cat([value for segment, value in pairs if segment.site is up], 1)
