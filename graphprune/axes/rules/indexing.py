"""Lookups and scatters: what is addressed by number is frozen, the rest passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graphprune.axes import algebra
from graphprune.axes.facts import Dims
from graphprune.axes.rules.context import RuleContext
from graphprune.axes.rules.registry import rule


@rule("embedding")
def embedding(c: RuleContext) -> Dims:
    """Rows of a table, by number."""
    table = c.dims(c.get("weight"))
    c.freeze(table[0], "rows are looked up by")
    index = c.get("indices")
    if isinstance(index, fx.Node):
        c.facts.gathered.append((index, table[0]))
    return (*c.dims(index), *table[1:])


@rule("index")
def index(c: RuleContext) -> Dims:
    """Advanced indexing: indexed dimensions are replaced by the broadcast of the indices.

    A mask stands for as many dimensions as it has; of its ones there are as many as there are.
    """
    dims, given = c.dims(c.get("self")), c.get("indices")
    at, first, rank = _addressed(c, dims, given)
    kept = [a for i, a in enumerate(dims) if i not in at]
    places = c.sizes()[first : first + rank]
    if any(_is_mask(g) for g in given if g is not None):
        looked_up: Dims = tuple(algebra.leaf(size) for size in places)
        c.freeze(looked_up, "chosen by")
        c.freeze([axis for g in given for axis in c.dims(g)], "chosen by")
    else:
        looked_up = c.broadcast(*(c.dims(g) for g in given), sizes=places)
    return (*kept[:first], *looked_up, *kept[first:])


@rule("index_put")
def index_put(c: RuleContext) -> Dims:
    """Places are written by number; the axes that no index stands for pass."""
    dims, values = c.dims(c.get("self")), c.dims(c.get("values"))
    at, first, rank = _addressed(c, dims, c.get("indices"))
    c.freeze([axis for g in c.get("indices") for axis in c.dims(g)], "addressed by")
    kept = [a for i, a in enumerate(dims) if i not in at]
    # What a lookup of these places would give, which the values are broadcast to.
    wanted = (*kept[:first], *[None] * rank, *kept[first:])
    for axis, value in zip(reversed(wanted), reversed(values), strict=False):
        if axis is None:
            c.freeze(value, "addressed by")
        elif value.size != 1:
            c.unify(axis, value)
    return dims


def _addressed(
    c: RuleContext, dims: Dims, given: Sequence[fx.Node | None]
) -> tuple[list[int], int, int]:
    """Freeze the dimensions that indices stand for.

    Returns:
        These dimensions; where the places come among those that are left; how many dimensions
        the places have.
    """
    at: list[int] = []
    dim = rank = 0
    for g in given:
        several = 1
        if g is not None:
            fake = g.meta["val"]
            several = fake.dim() if _is_mask(g) else 1
            rank = max(rank, 1 if _is_mask(g) else fake.dim())
            at += range(dim, dim + several)
        dim += several
    c.freeze([dims[i] for i in at], "looked up by")
    first = at[0] if at and at == list(range(at[0], at[-1] + 1)) else 0
    return at, first, rank


def _is_mask(index: fx.Node) -> bool:
    return index.meta["val"].dtype in (torch.bool, torch.uint8)


@rule("index_select")
def index_select(c: RuleContext) -> Dims:
    """Units of one axis, by number."""
    dims = c.dims(c.get("self"))
    d = c.dim(len(dims))
    c.freeze(dims[d], "looked up by")
    return (*dims[:d], *c.dims(c.get("index")), *dims[d + 1 :])


@rule("take_along_dim")
def take_along(c: RuleContext) -> Dims:
    """As `gather`, with the other dimensions broadcast."""
    dims, index_dims = c.dims(c.get("self")), c.dims(c.get("indices"))
    if c.get("dim") is None or len(dims) != len(index_dims):
        result: Dims = c.unknown()
        return result
    d, sizes = c.dim(len(dims)), c.sizes()
    c.freeze((dims[d], index_dims[d]), "looked up by")
    return tuple(
        index_dims[d] if i == d else c.broadcast((dims[i],), (index_dims[i],), sizes=[size])[0]
        for i, size in enumerate(sizes)
    )


@rule("gather")
def gather(c: RuleContext) -> Dims:
    """Places along one dimension, by number; along the others both sides walk together."""
    dims, index_dims = c.dims(c.get("self")), c.dims(c.get("index"))
    if len(dims) != len(index_dims):
        result: Dims = c.unknown()
        return result
    d = c.dim(len(dims))
    c.freeze((dims[d], index_dims[d]), "looked up by")
    for i, (axis, other) in enumerate(zip(dims, index_dims, strict=True)):
        if i != d and algebra.equal(axis.size, other.size):
            c.unify(axis, other)
        elif i != d:
            c.freeze((axis, other), "looked up in part by")
    return index_dims


@rule("index_add", "index_copy", "index_fill", "index_reduce")
def index_add(c: RuleContext) -> Dims:
    """Rows are written by number; the other axes pass."""
    dims, source = c.dims(c.get("self")), c.dims(c.get("source"))
    d = c.dim(len(dims))
    c.freeze((dims[d], *c.dims(c.get("index"))), "written by number in")
    if len(source) == len(dims):
        c.freeze(source[d], "written by number in")
    for i, axis in enumerate(source):
        if i != d and len(source) == len(dims):
            c.unify(dims[i], axis)
    return dims


@rule("slice_scatter", "select_scatter")
def scatter_part(c: RuleContext) -> Dims:
    """A part of one axis is written; the other axes pass."""
    dims, source = c.dims(c.get("self")), c.dims(c.get("src"))
    d = c.dim(len(dims), default=0)
    c.freeze(dims[d], "written in part by")
    if len(source) < len(dims):
        source = (*source[:d], algebra.leaf(1), *source[d:])
    else:
        c.freeze(source[d], "written in part by")
    for i, axis in enumerate(source):
        if i != d:
            c.unify(dims[i], axis)
    return dims


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(c: RuleContext) -> Dims:
    """Places along one dimension are written by number; along the others all walk together."""
    dims, written = c.dims(c.get("self")), [c.dims(c.get(name)) for name in ("index", "src")]
    d = c.dim(len(dims))
    for others in written:
        if len(others) != len(dims):  # a number instead of a source
            c.freeze(others, "addressed by")
            continue
        for i, axis in enumerate(others):
            if i != d and algebra.equal(axis.size, dims[i].size):
                c.unify(dims[i], axis)
            else:
                c.freeze((dims[i], axis), "addressed by")
    return dims


@rule("embedding_bag")
def embedding_bag(c: RuleContext) -> list[Dims]:
    """Sums, means or maxima of rows of a table, each feature for itself."""
    table = c.dims(c.get("weight"))
    c.freeze(table[0], "rows are looked up by")
    index = c.get("indices")
    c.facts.gathered.append((index, table[0]))
    for name in ("indices", "offsets", "per_sample_weights"):
        c.freeze(c.dims(c.get(name)), "addressed by")
    outputs = [c.fresh(i) for i in range(len(c.value))]
    for dims in outputs:
        c.freeze(dims, "addressed by")
    return [(outputs[0][0], table[1]), *outputs[1:]]


@rule("bucketize", "searchsorted")
def bucketize(c: RuleContext) -> Dims:
    """The number of the bucket that each value falls in; one list of boundaries for all."""
    values = c.get("input", c.get("self"))
    boundaries = c.dims(c.get("boundaries", c.get("sorted_sequence")))
    c.freeze(boundaries, "boundaries of")
    if len(boundaries) > 1:  # a list of its own for every row
        c.freeze(c.dims(values), "sorted in rows by")
    return c.dims(values)


@rule("masked_scatter", "histc", "bincount", "one_hot")
def addressed(c: RuleContext) -> Dims:
    """Everything is addressed by number: all axes are frozen."""
    tensors = [n for n in c.node.all_input_nodes if c.dims(n)]
    for node in tensors:
        c.freeze(c.dims(node), "addressed by")
    base = c.dims(c.node.args[0])
    sizes = c.sizes()
    if len(base) == len(sizes) and all(
        algebra.equal(a.size, s) for a, s in zip(base, sizes, strict=True)
    ):
        return base
    fresh = c.fresh()
    c.freeze(fresh, "addressed by")
    return fresh
