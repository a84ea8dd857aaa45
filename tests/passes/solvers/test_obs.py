"""Structured OBS: brute force on tiny cases, and the identities that make it exact."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.passes.solvers.obs import (
    Problem,
    damped,
    greedy,
    idle_features,
    loss,
    refit,
)


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
    from graphprune.passes.solvers import obs

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


def _with_dead(p: Problem, dead: int) -> Problem:
    """The same problem with as many dead units before its own, whose weights are large."""
    width = p.columns.shape[1]
    more = dead * width
    weight = torch.cat([torch.full((len(p.weight), more), 50.0, dtype=torch.float64), p.weight], 1)
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    gram[more:, more:] = p.gram
    columns = torch.cat([torch.arange(more).reshape(-1, width), p.columns + more])
    return Problem(weight, damped(gram, 0.0), columns, idle_features(weight, gram))


@pytest.mark.parametrize("width", [1, 3])
def test_dead_units_go_first_for_nothing_and_the_others_as_without_them(width: int) -> None:
    p = problem(2, 6, width)
    order, costs = greedy([_with_dead(p, 4)], 8)
    assert sorted(order[:4]) == [0, 1, 2, 3]
    assert costs[:4] == [0, 0, 0, 0]
    expected = greedy([p], 4)
    assert [unit - 4 for unit in order[4:]] == expected[0]
    assert costs[4:] == pytest.approx(expected[1], rel=1e-9)


def test_a_unit_that_is_dead_in_part_costs_what_the_rest_does() -> None:
    """A head of three dims of which one is dead, beside one that has its two others alone."""
    p = problem(4, 5, 2)
    weight = torch.cat([p.weight, torch.full((5, 5), 30.0, dtype=torch.float64)], 1)
    gram = torch.zeros(15, 15, dtype=torch.float64)
    gram[:10, :10] = p.gram
    columns = torch.cat([p.columns, torch.arange(10, 15)[:, None]], 1)
    partly = Problem(weight, damped(gram, 0.0), columns, idle_features(weight, gram))
    order, costs = greedy([partly], 4)
    expected = greedy([p], 4)
    assert order == expected[0]
    assert costs == pytest.approx(expected[1], rel=1e-9)


def test_a_consumer_that_sees_nothing_has_no_say() -> None:
    p = problem(5, 6, 1)
    weight = torch.arange(6.0, dtype=torch.float64).flip(0)[None] * 100
    nothing = torch.zeros(6, 6, dtype=torch.float64)
    blind = Problem(weight, damped(nothing, 0.01), p.columns, idle_features(weight, nothing))
    order, costs = greedy([p, blind], 5)
    expected = greedy([p], 5)
    assert order == expected[0]
    assert costs == pytest.approx(expected[1])


def test_what_float32_loses_beside_the_others_is_idle() -> None:
    weight = torch.ones(2, 4)
    gram = torch.tensor([1.0, 0.0, (4e-8) ** 2, (1e-5) ** 2]).diag()
    assert idle_features(weight, gram).tolist() == [False, True, True, False]
    weight[:, 2] = 1e4  # it counts by what reads it, not by its own size
    assert idle_features(weight, gram).tolist() == [False, True, False, False]


def test_damping_is_relative_to_the_live_features() -> None:
    """In other units the same matrix is damped alike, and dead features do not dilute it."""
    gram = problem(6, 5, 1).gram
    torch.testing.assert_close(damped(1e6 * gram, 0.1), 1e6 * damped(gram, 0.1), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        damped(gram, 0.1), gram + 0.1 * gram.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    )
    wide = torch.zeros(9, 9, dtype=torch.float64)
    wide[:5, :5] = gram
    torch.testing.assert_close(damped(wide, 0.1)[:5, :5], damped(gram, 0.1), rtol=1e-12, atol=0)


def test_a_kept_dead_feature_keeps_its_weight() -> None:
    p = _with_dead(problem(7, 6, 1), 3)
    fitted = refit(p.weight, p.gram, torch.tensor([1, 4, 6, 8]))
    torch.testing.assert_close(fitted[:, 1], p.weight[:, 1], rtol=1e-12, atol=0)
    assert not fitted[:, [0, 2, 3, 5, 7]].any()
