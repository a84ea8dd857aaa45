"""Lookups and scatters: what is addressed by number is frozen, the rest passes."""

from __future__ import annotations

import torch
from torch import fx

from graphprune.axes import algebra
from graphprune.axes.rules._base import Dims, RuleContext, rule


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
    """Advanced indexing: indexed dimensions are replaced by the broadcast of the indices."""
    dims, given = c.dims(c.get("self")), c.get("indices")
    if any(g is not None and g.meta["val"].dtype in (torch.bool, torch.uint8) for g in given):
        result: Dims = c.unknown()  # as many units as the mask has ones
        return result
    at = [i for i, g in enumerate(given) if g is not None]
    indices = [c.dims(given[i]) for i in at]
    c.freeze([dims[i] for i in at], "looked up by")
    rank = max((len(d) for d in indices), default=0)
    kept = [a for i, a in enumerate(dims) if i not in at]
    first = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    looked_up = c.broadcast(*indices, sizes=c.sizes()[first : first + rank])
    return (*kept[:first], *looked_up, *kept[first:])


@rule("index_select")
def index_select(c: RuleContext) -> Dims:
    """Units of one axis, by number."""
    dims = c.dims(c.get("self"))
    d = c.dim(len(dims))
    c.freeze(dims[d], "looked up by")
    return (*dims[:d], *c.dims(c.get("index")), *dims[d + 1 :])


@rule("gather", "take_along_dim")
def gather(c: RuleContext) -> Dims:
    """Places along one dimension, by number; along the others both sides walk together."""
    dims, index_dims = c.dims(c.get("self")), c.dims(c.get("index"))
    if c.get("dim") is None or len(dims) != len(index_dims):
        result: Dims = c.unknown()
        return result
    d = c.dim(len(dims))
    c.freeze(dims[d], "looked up by")
    for i, (axis, other) in enumerate(zip(dims, index_dims, strict=True)):
        if i != d and algebra.equal(axis.size, other.size):
            c.unify(axis, other)
        elif i != d:
            c.freeze((axis, other), "looked up in part by")
    return index_dims


@rule("index_add", "index_copy", "index_fill")
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


@rule("index_put", "scatter", "scatter_add", "masked_scatter", "scatter_reduce", "histc",
      "bincount", "one_hot", "bucketize", "searchsorted")  # fmt: skip
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
