"""Structured OBS: brute force on tiny cases, and the identities that make it exact."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.passes.structural.obs import Problem, damped, greedy, loss, refit


def problem(seed: int, units: int, width: int, rows: int = 5, rank: int = 40) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    features = units * width
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    x = torch.randn(rank, features, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    order = torch.randperm(features, generator=generator).reshape(units, width)
    return Problem(weight, damped(x.T @ x, 0.01), order)


def kept(p: Problem, removed: list[int]) -> torch.Tensor:
    stay = [u for u in range(len(p.columns)) if u not in removed]
    return p.columns[stay].reshape(-1).sort().values


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 7), st.integers(1, 4), st.data())
def test_costs_are_the_exact_rise_of_the_loss(
    seed: int, units: int, width: int, data: st.DataObject
) -> None:
    """Sequential removal is joint least squares on what is left, whatever the order."""
    p = problem(seed, units, width)
    count = data.draw(st.integers(1, units - 1))
    order, costs = greedy([p], count)
    assert len(set(order)) == count
    fitted = refit(p.weight, p.gram, kept(p, order))
    assert sum(costs) == pytest.approx(loss(p.weight, fitted, p.gram), rel=1e-8)


def test_the_first_unit_is_the_best_one_by_brute_force() -> None:
    for seed in range(5):
        p = problem(seed, 6, 3)
        losses = [loss(p.weight, refit(p.weight, p.gram, kept(p, [u])), p.gram) for u in range(6)]
        order, costs = greedy([p], 1)
        assert order == [int(torch.tensor(losses).argmin())]
        assert costs[0] == pytest.approx(min(losses), rel=1e-9)


def test_greedy_comes_close_to_the_best_subset() -> None:
    p = problem(3, 6, 2)
    _, costs = greedy([p], 3)
    best = min(
        loss(p.weight, refit(p.weight, p.gram, kept(p, list(gone))), p.gram)
        for gone in itertools.combinations(range(6), 3)
    )
    assert best <= sum(costs) * (1 + 1e-9)
    assert sum(costs) <= 3 * best


def test_blocks_of_downdates_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphprune.passes.structural import obs

    p = problem(1, 30, 2, rank=200)
    monkeypatch.setattr(obs, "_BLOCK", 1)
    one = greedy([p], 25)
    monkeypatch.setattr(obs, "_BLOCK", 64)
    many = greedy([p], 25)
    assert one[0] == many[0]
    assert one[1] == pytest.approx(many[1], rel=1e-6)


def test_a_diagonal_gram_matrix_needs_no_update() -> None:
    weight = torch.randn(4, 6, dtype=torch.float64)
    gram = torch.rand(6, dtype=torch.float64).add(0.5).diag()
    p = Problem(weight, gram, torch.arange(6)[:, None])
    order, costs = greedy([p], 3)
    saliency = weight.square().sum(0) * gram.diagonal()
    assert order == saliency.argsort()[:3].tolist()
    assert costs == pytest.approx(saliency.sort().values[:3].tolist())
    fitted = refit(weight, gram, kept(p, order))
    torch.testing.assert_close(fitted[:, kept(p, order)], weight[:, kept(p, order)])


def test_several_consumers_add_their_costs() -> None:
    a, b = problem(1, 5, 2), problem(2, 5, 3)
    order, costs = greedy([a, b], 2)
    total = sum(loss(p.weight, refit(p.weight, p.gram, kept(p, order)), p.gram) for p in (a, b))
    assert sum(costs) == pytest.approx(total, rel=1e-8)


def test_dead_features_are_damped_not_divided_by() -> None:
    gram = torch.zeros(3, 3)
    gram[0, 0] = 4.0
    assert torch.linalg.eigvalsh(damped(gram, 0.01)).min() > 0
    assert torch.equal(damped(torch.zeros(2, 2), 0.0), torch.eye(2, dtype=torch.float64))
