"""Moments from shifted inputs are the moments of the patches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.axes.windows import Window
from graphprune.calibration import lagged
from graphprune.calibration.gram import Gram
from graphprune.calibration.lagged import LaggedGram, best_side


@given(
    kernel=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    data=st.data(),
    values=st.sampled_from([1, 2**24]),
)
@settings(max_examples=60, deadline=None)
def test_shifted_products_are_the_gram_matrix_of_the_patches(
    kernel: list[int], data: st.DataObject, values: int
) -> None:
    rank = len(kernel)
    side = data.draw(st.integers(0, rank - 1))
    kernel[side] = max(kernel[side], 2)
    dilation = data.draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    stride = data.draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank))
    stride[side] = 1
    padding = data.draw(st.lists(st.tuples(*[st.integers(0, 3)] * 2), min_size=rank, max_size=rank))
    window = Window(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    sizes = [d * (k - 1) + 2 for k, d in zip(kernel, dilation, strict=True)]
    batches = [torch.randn(2, 3, *sizes, dtype=torch.float64) for _ in range(2)]
    expected, found = Gram.empty(3 * window.taps), LaggedGram(window, 3, side)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lagged, "_VALUES", values)
        for x in batches:
            found.add(x)
            for rows in window.patches(x):
                expected.add(rows)
    gram = found.gram()
    assert gram.count == expected.count
    torch.testing.assert_close(gram.matrix, expected.matrix)
    torch.testing.assert_close(gram.total, expected.total)


def test_the_side_with_most_overlap_is_taken() -> None:
    window = Window((3, 9), (1, 1), ((0, 0), (0, 0)), (1, 1))
    assert best_side(window, (30, 30)) == 1
    assert best_side(window, (30, 2)) == 0
    assert best_side(window, (2, 2)) is None
    assert best_side(Window((9,), (2,), ((0, 0),), (1,)), (30,)) is None
