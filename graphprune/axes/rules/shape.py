"""Operators that move, cut, join, insert or make dimensions, and their size arguments."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from graphprune.axes import algebra
from graphprune.axes.algebra import Axis
from graphprune.axes.facts import Dims, size_of
from graphprune.axes.rules.context import RewriteContext, RuleContext, resolve
from graphprune.axes.rules.registry import rewriter, rule
from graphprune.ir.graph import op_name


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten")
def view(c: RuleContext) -> Dims:
    """The flat row-major list of factors, cut into other dimensions."""
    if c.get("dtype") is not None:  # the same bytes read as another type
        result: Dims = c.unknown()
        return result
    return c.recut(c.dims(c.node.args[0]), c.sizes())


@rewriter("view", "reshape", "_unsafe_view")
def resize_view(r: RewriteContext) -> None:
    name = "shape" if "shape" in r.arguments else "size"
    if name in r.arguments and any(r.changed(a) for a in r.output):
        r.set(**{name: r.resize(r.get(name), r.output)})


@rewriter("unflatten")
def resize_unflatten(r: RewriteContext) -> None:
    d = int(r.get("dim")) % len(r.dims(r.get("self")))
    sizes = r.get("sizes")
    r.set(sizes=r.resize(sizes, r.output[d : d + len(sizes)]))


@rule("transpose", "swapaxes", "swapdims")
def transpose(c: RuleContext) -> Dims:
    """Two dimensions change places."""
    dims = list(c.dims(c.node.args[0]))
    a, b = (int(cast(int, d)) % len(dims) for d in c.node.args[1:3])
    dims[a], dims[b] = dims[b], dims[a]
    return tuple(dims)


@rule("permute", "numpy_T", "t", "mT", "mH", "adjoint", "matrix_H", "movedim")
def permute(c: RuleContext) -> Dims:
    """Dimensions in another order, whichever way it is spelled."""
    dims = c.dims(c.node.args[0])
    order = c.get("dims")
    if order is None:
        axes = list(reversed(range(len(dims))))
        if op_name(c.node) in {"mT", "mH", "adjoint"}:
            axes = [*range(len(dims) - 2), len(dims) - 1, len(dims) - 2]
    else:
        axes = [int(d) % len(dims) for d in order]
    if c.get("source") is not None:
        axes = _moved(len(dims), c.get("source"), c.get("destination"))
    return tuple(dims[a] for a in axes)


def _moved(rank: int, source: object, destination: object) -> list[int]:
    marked = torch.empty(tuple(range(2, rank + 2)), device="meta")
    moved = torch.movedim(marked, source, destination)  # type: ignore[call-overload]
    return [int(s) - 2 for s in moved.shape]


@rule("unsqueeze")
def unsqueeze(c: RuleContext) -> Dims:
    """A new dimension of size one."""
    dims = c.dims(c.get("self"))
    d = int(c.get("dim")) % (len(dims) + 1)
    return (*dims[:d], algebra.leaf(1), *dims[d:])


@rule("squeeze")
def squeeze(c: RuleContext) -> Dims:
    """Dimensions of size one go (capture spells out which)."""
    dims = c.dims(c.get("self"))
    given = c.get("dim", range(len(dims)))
    drop = {int(d) % len(dims) for d in ([given] if isinstance(given, int) else given)}
    kept = tuple(a for i, a in enumerate(dims) if not (i in drop and a.size == 1))
    return kept


@rule("expand", "broadcast_to")
def expand(c: RuleContext) -> Dims:
    """A dimension of size one, or none, becomes a new axis."""
    dims, sizes = c.dims(c.get("self")), c.sizes()
    dims = (*[algebra.leaf(1)] * (len(sizes) - len(dims)), *dims)
    return tuple(
        a if algebra.equal(a.size, s) else algebra.leaf(s) for a, s in zip(dims, sizes, strict=True)
    )


@rewriter("expand", "broadcast_to")
def resize_expand(r: RewriteContext) -> None:
    r.set(size=r.resize(r.get("size"), r.output))


@rule("repeat", "tile")
def repeat(c: RuleContext) -> Dims:
    """n repetitions of an axis are product(n, axis)."""
    dims = c.dims(c.get("self"))
    counts = [size_of(n) for n in c.static("repeats", c.static("dims"))]
    rank = max(len(dims), len(counts))
    dims = (*[algebra.leaf(1)] * (rank - len(dims)), *dims)
    counts = [1] * (rank - len(counts)) + counts
    result = []
    for i, (axis, n) in enumerate(zip(dims, counts, strict=True)):
        copies = algebra.leaf(n)
        c.remember(**{f"repeat{i}": copies})
        result.append(algebra.product([copies, axis]))
    return tuple(result)


@rewriter("repeat", "tile")
def resize_repeat(r: RewriteContext) -> None:
    name = "repeats" if "repeats" in r.arguments else "dims"
    counts = list(r.get(name))
    first = len(r.output) - len(counts)
    for i in range(len(counts)):
        copies = r.extra(f"repeat{first + i}")
        if copies is not None and r.changed(copies):
            counts[i] = r.size(copies)
    r.set(**{name: counts})


@rule("repeat_interleave")
def repeat_interleave(c: RuleContext) -> Dims:
    """Each unit n times in a row: product(axis, n)."""
    dims, count, d = c.dims(c.get("self")), c.get("repeats"), c.get("dim")
    if not isinstance(count, int) or d is None:
        return _fallback(c)
    d = int(d) % len(dims)
    copies = algebra.leaf(count)
    c.remember(copies=copies)
    return (*dims[:d], algebra.product([dims[d], copies]), *dims[d + 1 :])


@rewriter("repeat_interleave")
def resize_repeat_interleave(r: RewriteContext) -> None:
    copies = r.extra("copies")
    if copies is not None and r.changed(copies):
        r.set(repeats=r.static_size(copies))
    if r.get("output_size") is not None:
        r.set(output_size=None)


@rule("slice")
def slice_(c: RuleContext) -> Dims:
    """A segment of an axis; with a step s, the outer factor of product(n/s, s)."""
    dims = c.dims(c.get("self"))
    d = c.dim(len(dims), default=0)
    axis, size, new = dims[d], dims[d].size, c.sizes()[d]
    step = int(c.get("step", 1))
    if algebra.equal(size, new) and step == 1:
        return dims
    start, end = resolve(c.get("start") or 0), resolve(c.get("end"))
    if not all(isinstance(x, int) for x in (size, start, new)) or (
        end is not None and not isinstance(end, int)
    ):
        piece = algebra.leaf(new)
        c.freeze([axis, piece], "cut at a size that depends on the input by")
    elif step != 1:
        piece = _strided(c, axis, start, step)
    else:
        first = max(start + size, 0) if start < 0 else min(start, size)
        before, piece, after = c.cut(axis, [first, new, size - first - new])
        c.remember(before=before, piece=piece, after=after)
    return (*dims[:d], piece, *dims[d + 1 :])


def _strided(c: RuleContext, axis: Axis, start: int, step: int) -> Axis:
    """Rows of `step` units, the first of each taken; a last, shorter row is there or not."""
    rank = len(c.dims(c.get("self")))
    count = int(c.sizes()[c.dim(rank, default=0)])
    start = max(start + axis.size, 0) if start < 0 else min(start, axis.size)
    if c.is_frozen(axis) or not count:
        piece = algebra.leaf(count)
        c.freeze([axis, piece], "taken with a stride by")
        return piece
    # The last row may be followed by more than belongs to it, or be shorter than the others.
    if start < step and axis.size % step == 0 and count * step == axis.size:
        outer, inner = algebra.leaf(count), algebra.leaf(step)
        c.freeze(inner, "taken with a stride by")
        c.unify(axis, algebra.product([outer, inner]))
        return outer
    full = count if axis.size - start >= count * step else count - 1
    outer, inner = algebra.leaf(full), algebra.leaf(step)
    last = algebra.leaf(count - full)
    before, after = (algebra.leaf(n) for n in (start, axis.size - start - full * step - last.size))
    c.freeze((inner, last), "taken with a stride by")
    c.unify(axis, algebra.concat([before, algebra.product([outer, inner]), last, after]))
    taken = algebra.concat([outer, last])
    c.remember(strided_from=before, rows=taken)
    return taken


@rewriter("slice")
def resize_slice(r: RewriteContext) -> None:
    before, piece, after = r.extra("before"), r.extra("piece"), r.extra("after")
    if r.extra("strided_from") is not None:
        if r.changed(r.extra("strided_from")) or r.changed(r.extra("rows")):
            _resize_strided(r)
        return
    if before is None or piece is None or after is None:
        d = int(r.get("dim", 0)) % len(r.output)
        if int(r.get("step", 1)) != 1 and r.changed(r.output[d]):
            r.set(end=2**63 - 1)
        elif r.changed(r.output[d]) and isinstance(r.get("end"), int) and r.get("end") > 0:
            r.set(end=r.size(r.output[d]))  # the whole axis, spelled with its old size
        return
    if r.changed(before) or r.changed(piece) or r.changed(after):
        start = r.static_size(before) if before.size else 0
        r.set(start=start, end=start + r.static_size(piece))


def _resize_strided(r: RewriteContext) -> None:
    before, rows = r.extra("strided_from"), r.extra("rows")
    assert before is not None
    assert rows is not None
    step = int(r.get("step"))
    start = r.static_size(before) if before.size else 0
    r.set(start=start, end=start + step * (r.static_size(rows) - 1) + 1)


@rule("narrow")
def narrow(c: RuleContext) -> Dims:
    """A segment of an axis, by start and length."""
    dims = c.dims(c.get("self"))
    d = c.dim(len(dims))
    axis, start, length = dims[d], resolve(c.get("start")), resolve(c.get("length"))
    if algebra.equal(axis.size, c.sizes()[d]):
        return dims
    if not all(isinstance(x, int) for x in (axis.size, start, length)):
        piece = algebra.leaf(c.sizes()[d])
        c.freeze([axis, piece], "cut at a size that depends on the input by")
    else:
        start %= axis.size
        before, piece, _ = c.cut(axis, [start, length, axis.size - start - length])
        c.remember(before=before, piece=piece)
    return (*dims[:d], piece, *dims[d + 1 :])


@rewriter("narrow")
def resize_narrow(r: RewriteContext) -> None:
    before, piece = r.extra("before"), r.extra("piece")
    if before is not None and piece is not None:
        r.set(start=r.static_size(before) if before.size else 0, length=r.static_size(piece))
    else:
        d = int(r.get("dim")) % len(r.output)
        if r.changed(r.output[d]):
            r.set(length=r.size(r.output[d]))


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split")
def split(c: RuleContext) -> list[Dims]:
    """Consecutive segments of an axis."""
    dims = c.dims(c.get("self"))
    d = c.dim(len(dims), default=0)
    sizes = [size_of(v.shape[d]) for v in c.value]
    if len(sizes) == 1:
        return [dims]
    pieces = c.cut(dims[d], sizes)
    return [(*dims[:d], piece, *dims[d + 1 :]) for piece in pieces]


@rewriter("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split")
def resize_split(r: RewriteContext) -> None:
    """Uneven segments: whatever it was becomes split_with_sizes."""
    d = int(r.get("dim", 0)) % len(r.output[0])
    pieces = [dims[d] for dims in r.output]
    if any(r.changed(p) for p in pieces):
        r.node.target = torch.ops.aten.split_with_sizes.default
        r.node.args = (r.get("self"), [r.size(p) for p in pieces], d)
        r.node.kwargs = {}


@rule("cat", "concat", "concatenate")
def cat(c: RuleContext) -> Dims:
    """Axes one after another."""
    given = c.get("tensors")
    parts = [c.dims(t) for t in given]
    parts = [p for p in parts if not (len(p) == 1 and p[0].size == 0)]
    d = c.dim(len(parts[0]), default=0)
    result = []
    for i in range(len(parts[0])):
        if i == d:
            result.append(algebra.concat([p[i] for p in parts]))
        else:
            for p in parts[1:]:
                c.unify(parts[0][i], p[i])
            result.append(parts[0][i])
    return tuple(result)


@rule("stack")
def stack(c: RuleContext) -> Dims:
    """A new dimension over tensors of equal axes."""
    parts = [c.dims(t) for t in c.get("tensors")]
    d = int(c.get("dim", 0)) % (len(parts[0]) + 1)
    for p in parts[1:]:
        for a, b in zip(parts[0], p, strict=True):
            c.unify(a, b)
    count = algebra.leaf(len(parts))
    c.freeze(count)
    return (*parts[0][:d], count, *parts[0][d:])


@rule("select")
def select(c: RuleContext) -> Dims:
    """One unit by number: it stays. Once all are known, the others are axes of their own."""
    dims, index = c.dims(c.get("self")), resolve(c.get("index"))
    d = c.dim(len(dims))
    if c.is_frozen(dims[d]) or not isinstance(index, int):
        c.freeze(dims[d], "one unit is picked from it by")
    else:
        c.facts.picked.append((c.node, dims[d], index % int(dims[d].size)))
    return (*dims[:d], *dims[d + 1 :])


@rewriter("select")
def resize_select(r: RewriteContext) -> None:
    before = r.extra("before")
    if r.changed(before):
        assert before is not None
        r.set(index=r.static_size(before))


@rule("roll")
def roll(c: RuleContext) -> Dims:
    """x = a | b becomes b | a."""
    dims, over = list(c.dims(c.get("self"))), c.get("dims")
    if not over:
        c.freeze(dims)
        return tuple(dims)
    for number, (shift, dim) in enumerate(zip(c.static("shifts"), over, strict=True)):
        d = int(dim) % len(dims)
        if c.is_frozen(dims[d]) or not isinstance(shift, int):
            c.freeze(dims[d])
            continue
        shift %= dims[d].size
        first, second = c.cut(dims[d], [dims[d].size - shift, shift])
        c.remember(**{f"shift{number}": second})
        dims[d] = algebra.concat([second, first])
    return tuple(dims)


@rewriter("roll")
def resize_roll(r: RewriteContext) -> None:
    shifts = list(r.get("shifts"))
    for number in range(len(shifts)):
        moved = r.extra(f"shift{number}")
        if moved is not None and r.changed(moved):
            shifts[number] = r.static_size(moved)
    if shifts != list(r.get("shifts")):
        r.set(shifts=shifts)


@rule("diagonal")
def diagonal(c: RuleContext) -> Dims:
    """Two dimensions become one of places, which comes last."""
    dims = c.dims(c.get("self"))
    sides = {c.dim(len(dims), "dim1", 0), c.dim(len(dims), "dim2", 1)}
    places = c.fresh()[-1]
    c.freeze([*(dims[d] for d in sides), places], "a diagonal of it is taken by")
    return (*(axis for d, axis in enumerate(dims) if d not in sides), places)


@rule("unfold")
def unfold(c: RuleContext) -> Dims:
    """Windows of one dimension: their places, and what is inside, which comes last."""
    dims, fresh = c.dims(c.get("self")), c.fresh()
    d = c.dim(len(dims), "dimension")
    c.freeze((dims[d], fresh[d], fresh[-1]), "cut in windows by")
    return (*dims[:d], fresh[d], *dims[d + 1 :], fresh[-1])


@rule("unbind")
def unbind(c: RuleContext) -> list[Dims]:
    """Units by number, one output each."""
    dims = c.dims(c.get("self"))
    d = c.dim(len(dims), default=0)
    c.freeze(dims[d], "its units are distinguished by")
    return [(*dims[:d], *dims[d + 1 :])] * len(c.value)


_SIZED = (
    "zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full",
    "new_empty", "empty_strided", "new_empty_strided", "empty_permuted",
)  # fmt: skip


@rule(*_SIZED)
def make(c: RuleContext) -> Dims:
    """New dimensions that take the axis they meet."""
    return c.fresh()


@rewriter(*_SIZED)
def resize_made(r: RewriteContext) -> None:
    r.set(size=r.resize(r.get("size"), r.output))


@rule("arange", "linspace", "eye", "scalar_tensor", "tril_indices", "triu_indices", "hann_window")
def count(c: RuleContext) -> Dims:
    """Numbers in order: nothing can be taken out."""
    dims = c.fresh()
    c.freeze(dims, "counted by")
    return dims


@rule("getitem")
def getitem(c: RuleContext) -> Dims:
    """One of several outputs."""
    found = c.facts.dims[c.node.args[0]]  # type: ignore[index]
    result: Dims = found[c.node.args[1]]
    return result


@rule("sym_size", "sym_numel", "sym_stride", "sym_storage_offset", "numel")
def sizes_only(c: RuleContext) -> Dims:
    """Sizes are numbers; static ones are constants already."""
    return ()


def _fallback(c: RuleContext) -> Dims:
    result: Dims = c.unknown()
    assert isinstance(c.value, Tensor)
    return result
