"""Packed weights: what is packed comes back, and zeros take no room."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphprune.exporters.kernels.packing import HEIGHTS, LARGEST, WIDTH, density, pack

Floats = npt.NDArray[np.float32]


def sparse(rng: np.random.Generator, outputs: int, inputs: int, height: int, part: float) -> Floats:
    """A weight of which `part` of the blocks is zero."""
    strips, groups = -(-outputs // height), -(-inputs // WIDTH)
    alive = rng.random((strips, groups)) >= part
    whole = np.repeat(np.repeat(alive, height, 0), WIDTH, 1)[:outputs, :inputs]
    return (rng.standard_normal((outputs, inputs)) * whole).astype(np.float32)


@given(
    outputs=st.integers(1, 100),
    inputs=st.integers(1, 60),
    height=st.sampled_from(HEIGHTS),
    bits=st.sampled_from(list(LARGEST)),
    part=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_what_is_packed_comes_back_to_half_a_step(
    outputs: int, inputs: int, height: int, bits: int, part: float, seed: int
) -> None:
    weight = sparse(np.random.default_rng(seed), outputs, inputs, height, part)
    packed = pack(weight, height, bits)
    steps = packed.scales[:outputs, None]
    assert (np.abs(packed.unpacked() - weight) <= steps * 0.5001).all()
    assert np.abs(packed.blocks.astype(int)).max(initial=0) <= LARGEST[bits]
    assert ((weight == 0) <= (packed.unpacked() == 0)).all()


@given(seed=st.integers(0, 2**16), height=st.sampled_from(HEIGHTS))
def test_only_blocks_with_a_nonzero_are_kept_in_order(seed: int, height: int) -> None:
    weight = sparse(np.random.default_rng(seed), 96, 40, height, 0.6)
    packed = pack(weight, height, 8)
    assert len(packed.blocks) == round(density(weight, height) * (96 // height) * 10)
    assert packed.blocks.any(axis=(1, 2)).all()
    for first, last in zip(packed.starts, packed.starts[1:], strict=False):
        assert (np.diff(packed.columns[first:last]) > 0).all()


def test_a_block_of_one_weight_is_where_the_weight_is() -> None:
    weight = np.zeros((40, 10), np.float32)
    weight[33, 9] = -2.0
    packed = pack(weight, 32, 7)
    assert packed.starts.tolist() == [0, 0, 1]
    assert packed.columns.tolist() == [2]
    assert packed.blocks[0, 1].tolist() == [0, -64, 0, 0]
    assert packed.scales[33] == pytest.approx(2 / 64)


def test_no_other_blocks() -> None:
    with pytest.raises(ValueError, match="high"):
        pack(np.zeros((8, 8), np.float32), 8, 8)
