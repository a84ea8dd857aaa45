"""Exact removal of blocks against brute force: explicit least squares for every block."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphprune.passes.solvers import block_obs, sparsegpt
from graphprune.passes.solvers.obs import Problem, greedy, loss, refit
from graphprune.passes.solvers.sparsegpt import Inputs
from graphprune.passes.sparsity.sparsity_pattern import parse_pattern
from tests.passes.solvers.test_sparsegpt import case

seeds = st.integers(0, 10_000)


def best_without(weight: Tensor, gram: Tensor, gone: Tensor) -> Tensor:
    """The best weights where some are zero: the normal equations of each row, solved alone."""
    result = torch.zeros_like(weight)
    for r, row in enumerate(~gone):
        keep = row.nonzero().flatten()
        left = gram[keep][:, keep]
        result[r, keep] = torch.linalg.solve(left, gram[keep] @ weight[r])
    return result


def costs_of(weight: Tensor, gram: Tensor, text: str, gone: Tensor) -> Tensor:
    """The loss after each further block, by brute force; infinite where it is gone already."""
    pattern = parse_pattern(text)
    rows, columns = weight.shape
    costs = torch.full(pattern.shape(rows, columns), torch.inf, dtype=torch.float64)
    for r, c in itertools.product(*map(range, costs.shape)):
        one = torch.zeros(costs.shape, dtype=torch.bool)
        one[r, c] = True
        block = pattern.spread(one, rows, columns)
        if not bool((block & gone).any()):
            costs[r, c] = loss(weight, best_without(weight, gram, gone | block), gram)
    return costs


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(9, 20), st.integers(4, 11), st.sampled_from(["8x2", "8x4", "16x3"]))
def test_the_first_block_is_the_best_of_all_and_costs_what_it_should(
    seed: int, rows: int, columns: int, text: str
) -> None:
    """Choice, cost and compensation, blocks at the edges too."""
    pattern = parse_pattern(text)
    weight, gram = case(seed, rows, columns)
    inputs = Inputs.of(gram, 0.01)
    costs = costs_of(weight, inputs.gram, text, torch.zeros_like(weight, dtype=torch.bool))
    one = torch.zeros(costs.shape, dtype=torch.bool)
    one[divmod(int(costs.argmin()), costs.shape[1])] = True
    gone = pattern.spread(one, rows, columns)
    pruned = sparsegpt.sparsegpt(weight, inputs, 1 / costs.numel(), pattern)
    assert torch.equal(pruned == 0, gone)
    torch.testing.assert_close(pruned, best_without(weight, inputs.gram, gone))
    assert loss(weight, pruned, inputs.gram) == pytest.approx(float(costs.min()), rel=1e-7)
    order, found = block_obs.sequences(weight, torch.linalg.inv(inputs.gram), pattern)
    first = costs.min(1)
    assert torch.equal(order[:, 0], first.indices)
    torch.testing.assert_close(found[:, 0], first.values, rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("text", ["8x2", "8x4", "16x4"])
@pytest.mark.parametrize("collected", [1, 8, 64])
def test_every_further_block_is_the_best_of_those_left(
    text: str, collected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy by brute force, up to the last block but one."""
    monkeypatch.setattr(block_obs, "_COLLECTED", collected)
    pattern = parse_pattern(text)
    weight, gram = case(collected, 19, 13)
    inputs = Inputs.of(gram, 0.01)
    gone = torch.zeros_like(weight, dtype=torch.bool)
    units = math.prod(pattern.shape(19, 13))
    for count in range(1, units):
        costs = costs_of(weight, inputs.gram, text, gone)
        one = torch.zeros(costs.shape, dtype=torch.bool)
        one[divmod(int(costs.argmin()), costs.shape[1])] = True
        gone |= pattern.spread(one, 19, 13)
        pruned = sparsegpt.sparsegpt(weight, inputs, count / units, pattern)
        assert torch.equal(pruned == 0, gone)
        assert loss(weight, pruned, inputs.gram) == pytest.approx(float(costs.min()), rel=1e-6)


def test_a_block_that_is_cheap_after_a_costly_one_waits_for_it() -> None:
    """Inputs with a correlation of -1/2: equal weights cost 0.75, then 0.25; opposite ones rise."""
    gram = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
    weight = torch.zeros(16, 2, dtype=torch.float64)
    weight[0] = torch.tensor([1.0, 1.01])
    weight[8] = torch.tensor([0.7, -0.7])
    pattern = parse_pattern("8x1")
    order, costs = block_obs.sequences(weight, torch.linalg.inv(gram), pattern)
    assert float(costs[0, 1]) < float(costs[1, 0]) < float(costs[0, 0]) < float(costs[1, 1])
    gone = block_obs.cheapest_blocks(weight, torch.linalg.inv(gram), 0.5, pattern)
    firsts = [tuple(row) for row in gone[[0, 8]].nonzero().tolist()]
    assert firsts == [(0, int(order[0, 0])), (1, int(order[1, 0]))]


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(1, 8), st.integers(1, 12))
def test_one_strip_is_structured_obs(seed: int, rows: int, units: int) -> None:
    """The same order and costs as `obs`, which goes one unit at a time; the costs add up."""
    weight, gram = case(seed, rows, 3 * units)
    inputs = Inputs.of(gram, 0.01)
    columns = torch.arange(3 * units).reshape(-1, 3)
    order, costs = greedy([Problem(weight, inputs.gram, columns)], units)
    mine, price = block_obs.sequences(
        weight, torch.linalg.inv(inputs.gram), parse_pattern(f"{rows}x3")
    )
    assert mine[0].tolist() == order
    torch.testing.assert_close(price[0], torch.tensor(costs, dtype=torch.float64), rtol=1e-6,
                               atol=1e-9)  # fmt: skip
    assert float(price.sum()) == pytest.approx(loss(weight, 0 * weight, inputs.gram), rel=1e-8)


def test_strips_may_be_done_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = case(3, 40, 12)
    inverse, pattern = torch.linalg.inv(Inputs.of(gram, 0.01).gram), parse_pattern("8x4")
    whole = block_obs.sequences(weight, inverse, pattern)
    monkeypatch.setattr(block_obs, "_BYTES", 2 * 8 * 12 * 12)
    for one, other in zip(whole, block_obs.sequences(weight, inverse, pattern), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("seed", range(3))
def test_exact_costs_less_than_a_sweep(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refitting a sweep's choice helps, choosing by exact costs helps more; masks are as many."""
    weight, gram = case(seed, 64, 60)
    inputs, pattern = Inputs.of(gram, 0.01), parse_pattern("16x4")

    def cost() -> tuple[float, Tensor]:
        pruned = sparsegpt.sparsegpt(weight, inputs, 0.5, pattern)
        alive = pattern.units(pruned.abs()) > 0
        assert int(alive.sum()) == alive.numel() // 2
        assert torch.equal(pattern.spread(alive, 64, 60), pruned != 0)
        return loss(weight, pruned, inputs.gram), alive

    exact, _ = cost()
    monkeypatch.setattr(sparsegpt, "_AFFORDABLE", 0)
    refitted, alive = cost()
    monkeypatch.setattr(sparsegpt, "TALL", 99)
    swept, _ = cost()
    assert exact < refitted
    # A sweep compensates to the right: it is exact where all that goes lies left of what stays.
    is_exact = bool((alive.int().diff(dim=1) >= 0).all())
    assert refitted == pytest.approx(swept, rel=1e-9) if is_exact else refitted < swept


def test_dead_features_lose_their_weights_and_count_first() -> None:
    weight, _ = case(7, 16, 8)
    x = torch.randn(30, 8, dtype=torch.float64)
    x[:, [2, 4, 5]] = 0
    inputs = Inputs.of(x.T @ x, 0.01)
    pruned = sparsegpt.sparsegpt(weight, inputs, 0.25, parse_pattern("8x2"))
    assert not pruned[:, [2, 4, 5]].any()
    assert (pruned == 0).sum(0).tolist() == [0, 0, 16, 0, 16, 16, 0, 0]


def test_all_blocks_but_one_may_go() -> None:
    weight, gram = case(1, 16, 8)
    inputs = Inputs.of(gram, 0.01)
    pruned = sparsegpt.sparsegpt(weight, inputs, 0.99, parse_pattern("8x4"))
    start, end = (pruned != 0).nonzero()[[0, -1]].tolist()
    assert int((pruned != 0).sum()) == 32
    strip = slice(start[0], end[0] + 1)
    keep = torch.arange(start[1], end[1] + 1)
    torch.testing.assert_close(pruned[strip], refit(weight[strip], inputs.gram, keep))
