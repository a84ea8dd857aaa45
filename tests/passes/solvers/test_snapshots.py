"""Weights at any level from the order and the Gram matrix: the same as removing one by one."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.passes.solvers.obs import Problem, damped, greedy, refit
from graphprune.passes.solvers.snapshots import Snapshots


def problem(seed: int, units: int, width: int, others: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    features = units * width + others
    x = torch.randn(3 * features, features, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(features, features, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, features, generator=generator, dtype=torch.float64)
    order = torch.randperm(features, generator=generator)[: units * width].reshape(units, width)
    return Problem(weight, damped(x.T @ x, 0.01), order)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2))
def test_equals_least_squares_on_what_is_kept(
    seed: int, units: int, width: int, others: int
) -> None:
    p = problem(seed, units, width, others)
    gone, _ = greedy([p], units - 1)
    (last,) = set(range(units)) - set(gone)
    order = [*gone, last]
    snapshots = Snapshots.of(p, order)
    again = Snapshots.from_tensors(snapshots.tensors())
    for kept in range(1, units + 1):
        removed = p.columns[order[: units - kept]].reshape(-1)
        stays = torch.ones(len(p.gram), dtype=torch.bool)
        stays[removed] = False
        expected = refit(p.weight, p.gram, stays.nonzero().flatten())
        torch.testing.assert_close(snapshots.weight(kept), expected, rtol=1e-8, atol=1e-8)
        assert torch.equal(again.weight(kept), snapshots.weight(kept))
    assert torch.equal(snapshots.weight(units), p.weight)
