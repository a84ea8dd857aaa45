"""The algebra of axes: leaves, products and concatenations, unified by union-find.

Every dimension of every tensor is an axis:

    leaf(size)            an unstructured dimension
    product(a, b, …)      row-major: 384 = heads(12) × head_dim(32)
    concat(a, b, …)       segments: a fused 96 = q(32) | k(32) | v(32)

Position p of a product a × b is p = i_a · |b| + i_b, of a concatenation a | b it is i_a for p < |a|
and |a| + i_b after it, so sizes obey |a × b| = |a| · |b| and |a | b| = |a| + |b|. Removing index i
of a leaf removes every position that has it: |b| of them where a is the outer factor.

Unifying two axes says that they are the same one from now on. A leaf takes the structure of the
other side. Two structures are split to their common refinement, from the outside in:

    12 × 32 = 4 × 96       4 divides 12:  12 = 4 × 3 and then 96 = 3 × 32    ->  4 × 3 × 32
    32 | 64 = 48 | 48      32 < 48:       48 = 32 | 16 and 64 = 16 | 48      ->  32 | 16 | 48

    20 × 60 = 30 × 40     10 divides both:  20 = 10 × 2, 30 = 10 × 3    ->  10 × (2 × 60 = 3 × 40)
    21 × 60 | 20 = 32 × 40   both have a boundary at 1200:  20 × 60 = 30 × 40 and 60 | 20 = 2 × 40

A split leaf is split wherever it occurs, because all its occurrences are one node (union-find,
by forwarding). What has no common refinement (2 × 60 = 3 × 40 above) is frozen, with the reason.
Sizes are integers or sympy expressions of the symbolic input sizes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import sympy
import torch
from torch import Tensor

Size = Any  # an int, or a sympy expression of the symbolic input sizes
_serial = itertools.count()


class Axis:
    """A node of the algebra. Compare with `is` after `find`; sizes never change."""

    __slots__ = ("_forward", "children", "frozen", "kind", "normalized", "serial", "size")

    def __init__(self, size: Size, kind: str = "leaf", children: tuple[Axis, ...] = ()) -> None:
        self.size: Final = size
        self.kind = kind
        self.children = children
        self.frozen: dict[str, None] = {}  # reasons, in order
        self.normalized = False
        self.serial = next(_serial)
        self._forward: Axis | None = None

    def __repr__(self) -> str:
        axis = find(self)
        if axis.kind == "leaf":
            return f"{axis.size}"
        return f"({(' × ' if axis.kind == 'product' else ' | ').join(map(repr, axis.children))})"


def leaf(size: Size) -> Axis:
    """A new unstructured axis."""
    return Axis(size)


def find(axis: Axis) -> Axis:
    """The representative of an axis."""
    while axis._forward is not None:
        axis = axis._forward
    return axis


def product(axes: Sequence[Axis]) -> Axis:
    """The row-major product; factors of size one vanish."""
    children = [f for axis in axes for f in factors(axis)]
    if len(children) <= 1:
        return children[0] if children else leaf(1)
    return Axis(sympy_product([c.size for c in children]), "product", tuple(children))


def concat(axes: Sequence[Axis]) -> Axis:
    """The concatenation; empty segments vanish."""
    children = [s for axis in axes for s in segments(axis) if s.size != 0]
    if len(children) <= 1:
        return children[0] if children else leaf(0)
    return Axis(sum(c.size for c in children), "concat", tuple(children))


def sympy_product(sizes: Sequence[Size]) -> Size:
    """The product of sizes, an int when all are."""
    result: Size = 1
    for size in sizes:
        result = result * size
    return result if isinstance(result, int) else sympy.expand(result)


def factors(axis: Axis) -> list[Axis]:
    """The factors of an axis, products flattened, concatenations whole, ones dropped."""
    axis = find(axis)
    if axis.kind == "product":
        return [f for child in axis.children for f in factors(child)]
    return [] if axis.size == 1 else [axis]


def segments(axis: Axis) -> list[Axis]:
    """The segments of an axis; (a | b) × c counts as a × c | b × c."""
    axis = find(axis)
    if axis.kind == "concat":
        return [s for child in axis.children for s in segments(child)]
    if axis.kind == "product":
        first, *rest = factors(axis)
        if first.kind == "concat":
            return [product([s, *rest]) for s in segments(first)]
    return [axis]


def leaves(axis: Axis) -> Iterator[Axis]:
    """The leaves of an axis, in order; one that occurs twice comes twice."""
    axis = find(axis)
    if axis.kind == "leaf":
        yield axis
    else:
        for child in axis.children:
            yield from leaves(child)


def terms(axis: Axis) -> list[tuple[Axis, ...]]:
    """An axis as a sum of products: (a | b) × c has the terms (a, c) and (b, c), leaves all."""
    axis = find(axis)
    if axis.kind == "leaf":
        return [(axis,)]
    parts = [terms(child) for child in axis.children]
    if axis.kind == "concat":
        return [term for part in parts for term in part]
    return [tuple(itertools.chain(*choice)) for choice in itertools.product(*parts)]


def freeze(axis: Axis, reason: str) -> None:
    """Mark every leaf of the axis untouchable."""
    for node in leaves(axis):
        node.frozen.setdefault(reason)


def normalize(axis: Axis) -> None:
    """Mark every leaf as one whose removal changes a mean or variance."""
    for node in leaves(axis):
        node.normalized = True


def divide(a: Size, b: Size) -> Size | None:
    """a / b when that is exact, else None; symbols count as positive integers."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    quotient = sympy.cancel(sympy.sympify(a) / b)
    numerator, denominator = sympy.fraction(quotient)
    if denominator != 1:
        return None
    return int(numerator) if numerator.is_Integer else numerator


def equal(a: Size, b: Size) -> bool:
    """Whether two sizes are the same number for every value of the symbols."""
    if a is b or a == b:
        return True
    return not (isinstance(a, int) and isinstance(b, int)) and bool(sympy.expand(a - b) == 0)


def _become(axis: Axis, structure: Axis) -> None:
    """Turn a leaf into a structure of new leaves; its marks go to all of them."""
    for part in leaves(structure):
        part.frozen.update(axis.frozen)
        part.normalized |= axis.normalized
    axis._forward = structure


def split_product(axis: Axis, outer: Size, inner: Size) -> tuple[Axis, Axis]:
    """Split a leaf into outer × inner, everywhere it occurs."""
    parts = leaf(outer), leaf(inner)
    _become(axis, product(parts))
    return parts


def split_concat(axis: Axis, first: Size) -> list[Axis] | None:
    """Split an axis in two segments, the first of this size; None when it has no such boundary."""
    axis = find(axis)
    if axis.kind == "leaf":
        parts = leaf(first), leaf(axis.size - first)
        _become(axis, concat(parts))
        return list(parts)
    if axis.kind == "product":
        outer, *rest = factors(axis)
        # Only after whole rows of the outer factor: (a | b) × c = a × c | b × c.
        rows = divide(first, sympy_product([r.size for r in rest]))
        if rows is not None and split_concat(outer, rows) is not None:
            return segments(axis)
    return None


def unify(a: Axis, b: Axis, where: str) -> None:
    """Say that two axes are one. Where they cannot be, freeze both with `where` as the place."""
    a, b = find(a), find(b)
    if a is b:
        return
    if not equal(a.size, b.size):
        _give_up(a, b, f"sizes {a.size} and {b.size} meet at {where}")
    elif a.kind == "leaf" or b.kind == "leaf":
        one, other = (a, b) if a.kind == "leaf" else (b, a)
        if any(x is one for x in leaves(other)):
            _give_up(a, b, f"an axis meets a part of itself at {where}")
            return
        for part in leaves(other):
            part.frozen.update(one.frozen)
            part.normalized |= one.normalized
        one._forward = other
    elif a.kind == b.kind == "product":
        _freeze_unlike(*_refine_products(factors(a), factors(b), where), where)
    elif not _refine_segments(segments(a), segments(b), where) and (
        # The only factor of a concatenation is itself: two of them would be unified for ever.
        a.kind == b.kind or any(_refine_products(factors(a), factors(b), where))
    ):
        _refine_between(segments(a), segments(b), where)


def _give_up(a: Axis, b: Axis, reason: str) -> None:
    freeze(a, reason)
    freeze(b, reason)


def _freeze_unlike(left: Sequence[Axis], right: Sequence[Axis], where: str) -> None:
    """Freeze the factors of two sides that have no common refinement."""
    if left or right:
        a, b = product(left), product(right)
        _give_up(a, b, f"{a!r} and {b!r} have no common refinement at {where}")


def _refine_products(
    left: list[Axis], right: list[Axis], where: str
) -> tuple[list[Axis], list[Axis]]:
    """Unify two lists of factors, outermost first, as far as they have a common refinement.

    Returns:
        the inner factors of both that have none; two empty lists if all do.
    """
    left, right = list(left), list(right)
    while left and right:
        x, y = left.pop(0), right.pop(0)
        x, y = find(x), find(y)
        if x.kind == "product" or y.kind == "product":  # split by an earlier step of this loop
            left[:0], right[:0] = factors(x), factors(y)
            continue
        if equal(x.size, y.size):
            unify(x, y, where)
            continue
        if x.kind == y.kind == "leaf" and (outer := _shared_factor(x.size, y.size)):
            for axis, others in ((x, left), (y, right)):
                others[:0] = split_product(axis, outer, axis.size // outer)
            continue
        # x | y: y = x × (y / x), and what is left of y meets the next factor of the other side.
        small, large, rest = (x, y, right) if divide(y.size, x.size) is not None else (y, x, left)
        parts = take_outer(large, small.size, where)
        if parts is None:
            return [x, *left], [y, *right]
        unify(small, parts[0], where)
        rest.insert(0, parts[1])
    return left, right


def _shared_factor(a: Size, b: Size) -> int | None:
    """The largest common divisor of two sizes, where it is neither of them nor one."""
    if not (isinstance(a, int) and isinstance(b, int)):
        return None
    divisor = math.gcd(a, b)
    return divisor if divisor not in (1, a, b) else None


def take_outer(axis: Axis, outer: Size, where: str) -> tuple[Axis, Axis] | None:
    """Write an axis that is no product as outer × inner; None where that cannot be.

    A leaf splits. A concatenation of `outer` segments of equal size is their stack, in which the
    segments become one axis: q | k | v as 3 × q. The stack itself cannot lose units.
    """
    inner = divide(axis.size, outer)
    if inner is None:
        return None
    if axis.kind == "leaf":
        return split_product(axis, outer, inner)
    parts = segments(axis)
    if len(parts) == outer and all(equal(p.size, inner) for p in parts):
        for part in parts[1:]:
            unify(parts[0], part, where)
        stack = leaf(outer)
        freeze(stack, f"segments are stacked at {where}")
        return stack, parts[0]
    return None


def _refine_segments(left: list[Axis], right: list[Axis], where: str) -> bool:
    """Unify two lists of segments, first to last; whether both end together."""
    left, right = list(left), list(right)
    while left and right:
        x, y = find(left.pop(0)), find(right.pop(0))
        if equal(x.size, y.size):
            unify(x, y, where)
            continue
        difference = x.size - y.size
        if not isinstance(difference, int):  # which one is longer depends on the inputs
            return False
        small, large, rest = (x, y, right) if difference < 0 else (y, x, left)
        parts = segments(large)
        if len(parts) == 1:
            split = split_concat(large, small.size)
            if split is None:
                return False
            parts = split
        # The longer one is back in its list, in pieces; the shorter one meets the first of them.
        rest[:0] = parts
        (left if rest is right else right).insert(0, small)
    return not left and not right


def _refine_between(left: list[Axis], right: list[Axis], where: str) -> None:
    """Unify what lies between boundaries that two lists of segments share; freeze the rest."""
    left, right = list(left), list(right)
    if not all(isinstance(axis.size, int) for axis in (*left, *right)):
        a, b = concat(left), concat(right)
        _give_up(a, b, f"{a!r} and {b!r} have no common refinement at {where}")
        return
    while left and right:
        shared = sorted(_boundaries(left) & _boundaries(right))
        first, shortest = shared[0], min(left[0].size, right[0].size)
        # Where the shared boundaries are evenly spaced, products have an outer factor in common.
        count = 1
        while shared[count - 1 : count] == [count * first] and count * first <= shortest:
            count += 1
        end = max(count - 1, 1) * first
        a, b = (concat(_take_segments(axes, end)) for axes in (left, right))
        if find(a).kind == "concat" or find(b).kind == "concat":
            if not _same(a, b):
                _give_up(a, b, f"{a!r} and {b!r} have no common refinement at {where}")
        else:
            unify(a, b, where)
        left = [part for axis in left for part in segments(axis)]
        right = [part for axis in right for part in segments(axis)]


def _same(a: Axis, b: Axis) -> bool:
    """Whether two axes are the same leaves in the same order, joined alike."""
    return terms(a) == terms(b)


def _boundaries(axes: Sequence[Axis]) -> set[int]:
    """Where a list of segments can be cut, the end included."""
    found: set[int] = set()
    start = 0
    for axis in axes:
        inner = axis.size // factors(axis)[0].size if axis.size > 1 else 1
        found.update(range(start + inner, start + axis.size + 1, inner))
        start += axis.size
    return found


def _take_segments(axes: list[Axis], size: int) -> list[Axis]:
    """Take segments of this size together from the front of a list, cutting the last one."""
    taken: list[Axis] = []
    while size:
        first, *others = segments(axes.pop(0))  # a leaf of another segment may have been cut
        axes[:0] = others
        if first.size > size:
            parts = split_concat(first, size)
            assert parts is not None
            axes[:0] = parts
            continue
        taken.append(first)
        size -= first.size
    return taken


def recut(axes: Sequence[Axis], sizes: Sequence[Size], where: str) -> list[Axis] | None:
    """Cut the row-major list of factors of `axes` into dimensions of other sizes (view, reshape).

    None when a boundary falls inside an axis that cannot be split.
    """
    rest = [f for axis in axes for f in factors(axis)]
    result: list[Axis] = []
    for size in sizes:
        taken: list[Axis] = []
        needed = size
        while not equal(needed, 1):
            if not rest:
                return None
            first = find(rest.pop(0))
            if first.kind == "product":
                rest[:0] = factors(first)
                continue
            remaining = divide(needed, first.size)
            if remaining is None:  # the boundary is inside this factor: its outer part belongs here
                parts = take_outer(first, needed, where)
                if parts is None:
                    return None
                rest[:0] = [parts[1]]
                first, remaining = parts[0], 1
            taken.append(first)
            needed = remaining
        result.append(product(taken) if taken else leaf(1))
    return result if not rest else None


def aligned(axes: Sequence[Axis], sizes: Sequence[Size]) -> list[tuple[list[Axis], list[Size]]]:
    """Factors and sizes of a reshape, divided at every boundary that both sides have.

    [2, 4, 15, 8] -> [2, 4, 8, 15] has the parts 2 -> 2, 4 -> 4 and 15, 8 -> 8, 15.
    """
    rest = [f for axis in axes for f in factors(axis)]
    before = [sympy_product([f.size for f in rest[:n]]) for n in range(len(rest) + 1)]
    result: list[tuple[list[Axis], list[Size]]] = []
    taken = cut = 0
    for end in range(1, len(sizes) + 1):
        size = sympy_product(sizes[:end])
        place = next((n for n in range(taken, len(before)) if equal(before[n], size)), None)
        if place is not None:
            result.append((rest[taken:place], list(sizes[cut:end])))
            taken, cut = place, end
    if taken < len(rest) or cut < len(sizes):
        result.append((rest[taken:], list(sizes[cut:])))
    return result


def new_size(axis: Axis, keep: Mapping[Axis, Tensor]) -> Size:
    """The size of an axis once its leaves keep only these indices, int64 [kept] by leaf."""
    axis = find(axis)
    if axis.kind == "leaf":
        return len(keep[axis]) if axis in keep else axis.size
    sizes = [new_size(child, keep) for child in axis.children]
    return sympy_product(sizes) if axis.kind == "product" else sum(sizes)


def expanded(axis: Axis, keep: Mapping[Axis, Tensor]) -> Tensor:
    """Positions along an axis of static size that stay, as int64 [new size], ascending per leaf."""
    axis = find(axis)
    if axis.kind == "leaf":
        return keep[axis] if axis in keep else torch.arange(int(axis.size))
    result = torch.zeros(1 if axis.kind == "product" else 0, dtype=torch.int64)
    offset = 0
    for child in axis.children:
        indices = expanded(child, keep)
        if axis.kind == "product":  # p = p_outer · |child| + i, row-major
            result = (result[:, None] * int(child.size) + indices[None, :]).reshape(-1)
        else:
            result = torch.cat([result, indices + offset])
            offset += int(child.size)
    return result


def unit_labels(axis: Axis, wanted: Axis) -> Tensor:
    """For each position along an axis, the index of leaf `wanted` there, or -1; int64 [size]."""
    axis, wanted = find(axis), find(wanted)
    if axis.kind == "leaf":
        size = int(axis.size)
        return torch.arange(size) if axis is wanted else torch.full((size,), -1)
    labels = [unit_labels(child, wanted) for child in axis.children]
    if axis.kind == "concat":
        return torch.cat(labels)
    # A product's position has the label of whichever factor holds the leaf.
    result = torch.full((1,), -1)
    for label in labels:
        inner = label[None, :].expand(len(result), -1)
        result = torch.where(inner >= 0, inner, result[:, None]).reshape(-1)
    return result
