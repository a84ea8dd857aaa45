"""The algebra of axes: common refinement, splits that reach every use, freezing with reasons."""

import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphprune.axes import algebra
from graphprune.axes.algebra import concat, factors, find, leaf, leaves, product, recut, unify


def sizes(axis: algebra.Axis) -> list[object]:
    return [part.size for part in leaves(axis)]


def test_a_leaf_becomes_the_product_it_meets() -> None:
    weight, heads = leaf(12), product([leaf(3), leaf(4)])
    unify(weight, heads, "here")
    assert sizes(weight) == [3, 4]
    assert list(leaves(weight)) == list(leaves(heads))


def test_products_are_refined_to_their_common_refinement() -> None:
    left, right = product([leaf(6), leaf(4)]), product([leaf(2), leaf(12)])
    unify(left, right, "here")
    assert sizes(left) == sizes(right) == [2, 3, 4]
    assert list(leaves(left)) == list(leaves(right))
    assert not any(part.frozen for part in leaves(left))


def test_products_without_a_common_refinement_freeze_with_the_place() -> None:
    left, right = product([leaf(3), leaf(5)]), product([leaf(5), leaf(3)])
    unify(left, right, "the reshape")
    for part in [*leaves(left), *leaves(right)]:
        assert "the reshape" in next(iter(part.frozen))


def test_an_outer_factor_that_two_products_share_stays_free() -> None:
    left, right = product([leaf(20), leaf(60)]), product([leaf(30), leaf(40)])
    unify(left, right, "here")
    assert sizes(left) == [10, 2, 60]
    assert sizes(right) == [10, 3, 40]
    assert next(leaves(left)) is next(leaves(right))
    assert [bool(part.frozen) for part in leaves(left)] == [False, True, True]


def test_what_lies_between_common_boundaries_stays_free() -> None:
    # Groups of 60 channels that a skip cuts off at 1280, where the same are 32 groups of 40.
    left = concat([product([leaf(21), leaf(60)]), leaf(20)])
    right = product([leaf(32), leaf(40)])
    unify(left, right, "here")
    free = {part for part in leaves(left) if not part.frozen and part.size > 1}
    assert [part.size for part in free] == [10]
    assert free == {part for part in leaves(right) if not part.frozen and part.size > 1}
    # A group that begins before: the first two rows of 20 have a part of it.
    left = concat([leaf(10), product([leaf(21), leaf(30)])])
    right = product([leaf(32), leaf(20)])
    unify(left, right, "here")
    assert [part.size for part in leaves(right) if not part.frozen and part.size > 1] == [10]


def test_a_split_reaches_every_use_of_the_leaf() -> None:
    shared = leaf(12)
    use = product([leaf(5), shared])
    unify(shared, concat([leaf(4), leaf(8)]), "here")
    assert sizes(use) == [5, 4, 8]


def test_rotating_halves_ties_them() -> None:
    # x * cos + rotate_half(x) * sin: concat(a, b) meets concat(b, a).
    x = leaf(8)
    first, second = leaf(4), leaf(4)
    unify(x, concat([first, second]), "slice")
    unify(x, concat([second, first]), "add")
    assert find(first) is find(second)
    assert sizes(x) == [4, 4]


def test_concats_are_refined_segment_by_segment() -> None:
    left, right = concat([leaf(3), leaf(5)]), concat([leaf(4), leaf(4)])
    unify(left, right, "here")
    assert sizes(left) == sizes(right) == [3, 1, 4]


def test_a_product_is_cut_between_its_rows_but_not_inside_one() -> None:
    heads = product([leaf(4), leaf(8)])
    unify(heads, concat([leaf(8), leaf(24)]), "slice")
    assert [part.size for part in algebra.segments(heads)] == [8, 24]
    assert not any(part.frozen for part in leaves(heads))
    inside = product([leaf(4), leaf(8)])
    unify(inside, concat([leaf(4), leaf(28)]), "slice")
    first, *others = algebra.segments(inside)
    assert first.size == 8
    assert all(part.frozen for part in leaves(first))
    assert [part.size for part in leaves(others[0]) if not part.frozen] == [3]


def test_equal_segments_stacked_in_a_new_dimension_are_one_axis() -> None:
    q, k, v = leaf(6), leaf(6), leaf(6)
    result = recut([concat([q, k, v])], [3, 6], "view")
    assert result is not None
    assert find(q) is find(k) is find(v) is find(result[1])
    assert find(result[0]).frozen


def test_marks_copy_on_split_and_merge_on_union() -> None:
    frozen, normal = leaf(6), leaf(6)
    algebra.freeze(frozen, "because")
    algebra.normalize(normal)
    unify(frozen, normal, "here")
    assert find(normal).normalized
    assert list(find(normal).frozen) == ["because"]
    outer, inner = algebra.split_product(find(normal), 2, 3)
    assert list(outer.frozen) == list(inner.frozen) == ["because"]
    assert outer.normalized
    assert inner.normalized


def test_recut_with_symbolic_sizes() -> None:
    batch, length = sympy.Symbol("b", positive=True, integer=True), sympy.Symbol("s", positive=True)
    axes = [leaf(batch), leaf(length), product([leaf(4), leaf(8)])]
    result = recut(axes, [batch * length, 32], "view")
    assert result is not None
    assert [len(factors(axis)) for axis in result] == [2, 2]
    assert recut([leaf(batch), leaf(32)], [32, batch], "view") is None


def test_a_reshape_is_divided_at_common_boundaries() -> None:
    batch, length = sympy.symbols("batch length", positive=True, integer=True)
    axes = [leaf(batch), leaf(4), leaf(length), leaf(8)]
    parts = algebra.aligned(axes, [batch, 2, 2, 8, length, 1])
    assert [([f.size for f in part], sizes) for part, sizes in parts] == [
        ([batch], [batch]),
        ([4], [2, 2]),
        ([length, 8], [8, length]),
        ([], [1]),
    ]


@given(st.data())
def test_parts_of_a_reshape_are_reshaped_for_themselves(data: st.DataObject) -> None:
    """Tensors of the parts, multiplied as an outer product, are reshaped alike part by part."""
    primes = data.draw(st.lists(st.sampled_from([2, 3]), min_size=1, max_size=5))
    before, after = (_grouped(data, data.draw(st.permutations(primes))) for _ in range(2))
    parts = algebra.aligned([leaf(size) for size in before], after)
    assert [f.size for part, _ in parts for f in part] == [size for size in before if size > 1]
    assert [size for _, sizes in parts for size in sizes] == after
    whole = torch.ones(())
    reshaped = torch.ones(())
    for part, sizes in parts:
        numbers = torch.randn([f.size for f in part])
        whole = torch.tensordot(whole, numbers, 0)
        reshaped = torch.tensordot(reshaped, numbers.reshape(sizes), 0)
    assert torch.equal(whole.reshape(after), reshaped)


def _grouped(data: st.DataObject, primes: list[int]) -> list[int]:
    """Products of neighbors, with ones between them."""
    result = [1]
    for prime in primes:
        if data.draw(st.booleans()):
            result[-1] *= prime
        else:
            result.append(prime)
        if not data.draw(st.integers(0, 5)):
            result.append(1)
    return result


@given(st.lists(st.integers(2, 4), min_size=2, max_size=4), st.randoms())
def test_kept_indices_are_those_of_a_masked_tensor(shape: list[int], random: object) -> None:
    """Shrinking a dimension that is a product keeps exactly the rows whose every factor is kept."""
    parts = [leaf(n) for n in shape]
    generator = torch.Generator().manual_seed(sum(shape))
    keep = {
        part: torch.randperm(part.size, generator=generator)[: max(1, part.size - 1)].sort()[0]
        for part in parts
    }
    alive = torch.ones(shape, dtype=torch.bool)
    for dim, part in enumerate(parts):
        gone = torch.ones(part.size, dtype=torch.bool)
        gone[keep[part]] = False
        alive.index_fill_(dim, gone.nonzero().flatten(), False)
    expected = alive.flatten().nonzero().flatten()
    axis = product(parts)
    assert torch.equal(algebra.expanded(axis, keep), expected)
    assert algebra.new_size(axis, keep) == len(expected)
    both = concat([axis, leaf(5)])
    shifted = torch.cat([expected, torch.arange(5) + int(axis.size)])
    assert torch.equal(algebra.expanded(both, keep), shifted)


def test_unit_labels_name_the_unit_at_each_position() -> None:
    heads, dims, other = leaf(2), leaf(3), leaf(2)
    axis = concat([product([heads, dims]), other])
    assert algebra.unit_labels(axis, heads).tolist() == [0, 0, 0, 1, 1, 1, -1, -1]
    assert algebra.unit_labels(axis, dims).tolist() == [0, 1, 2, 0, 1, 2, -1, -1]
    assert algebra.unit_labels(axis, other).tolist() == [-1] * 6 + [0, 1]


def test_concats_without_a_common_refinement_freeze_with_the_place() -> None:
    # A symbolic difference has no sign: neither boundary is known to come first.
    n, m = sympy.Symbol("n", positive=True, integer=True), sympy.Symbol("m", positive=True)
    left, right = concat([leaf(n), leaf(m)]), concat([leaf(m), leaf(n)])
    unify(left, right, "the cat")
    for part in [*leaves(left), *leaves(right)]:
        assert "no common refinement at the cat" in next(iter(part.frozen))


def _structure(
    data: st.DataObject, size: int, depth: int, pool: list[algebra.Axis]
) -> algebra.Axis:
    """Any axis of a size, of new leaves and of ones that are already somewhere."""
    known = [axis for axis in pool if axis.size == size]
    reuse = data.draw(st.booleans())
    if known and reuse:
        return data.draw(st.sampled_from(known))
    kind = data.draw(st.sampled_from(["leaf", "product", "concat"])) if depth else "leaf"
    divisors = [d for d in range(2, size) if size % d == 0]
    if kind == "product" and divisors:
        outer = data.draw(st.sampled_from(divisors))
        parts = [_structure(data, s, depth - 1, pool) for s in (outer, size // outer)]
        result = product(parts)
    elif kind == "concat" and size > 1:
        first = data.draw(st.integers(1, size - 1))
        result = concat([_structure(data, s, depth - 1, pool) for s in (first, size - first)])
    else:
        result = leaf(size)
    pool.append(result)
    return result


@given(st.data())
def test_any_two_structures_unify_or_freeze(data: st.DataObject) -> None:
    pool: list[algebra.Axis] = []
    size = data.draw(st.sampled_from([4, 6, 8, 12, 24]))
    pairs = []
    for _ in range(data.draw(st.integers(1, 4))):
        left, right = (_structure(data, size, 3, pool) for _ in range(2))
        unify(left, right, "here")
        pairs.append((left, right))
    for left, right in pairs:
        for part in {find(p) for p in [*leaves(left), *leaves(right)]}:
            if part.size > 1 and not part.frozen:
                keep = {part: torch.arange(part.size - 1)}
                a, b = algebra.expanded(left, keep), algebra.expanded(right, keep)
                assert torch.equal(a, b)
