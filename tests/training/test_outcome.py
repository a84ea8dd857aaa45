"""Outcomes and paired drops: against scipy, by simulation, and where nothing can be compared."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from graphprune.errors import GraphPruneError
from graphprune.training.metrics import spearman
from graphprune.training.outcome import (
    MeanOutcome,
    Outcome,
    PerplexityOutcome,
    RankOutcome,
    paired_drop,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ranked(n: int, noise: float, seed: int = 0) -> tuple[RankOutcome, RankOutcome]:
    """A dense model's scores, and those of a pruned one that follows it with noise; tied labels."""
    g = seeded(seed)
    labels = torch.randint(0, 11, (n,), generator=g).double() / 2
    dense = labels + torch.randn(n, generator=g)
    pruned = dense + noise * torch.randn(n, generator=g)
    return RankOutcome(dense, labels), RankOutcome(pruned, labels)


@pytest.mark.parametrize(
    "outcome",
    [
        MeanOutcome(torch.tensor([True, False, True, True, False])),
        RankOutcome(torch.tensor([0.1, 0.5, 0.5, 0.2, 0.9]), torch.tensor([1.0, 2, 3, 1, 1])),
        PerplexityOutcome(torch.tensor([3.0, 1, 2, 9, 4]), torch.tensor([3, 1, 2, 7, 2])),
    ],
)
def test_many_draws_give_what_each_gives_alone(outcome: Outcome) -> None:
    draws = torch.randint(5, (40, 5), generator=seeded())
    alone = torch.tensor([outcome.value(row) for row in draws], dtype=torch.float64)
    torch.testing.assert_close(outcome.values(draws), alone, atol=1e-12, rtol=0)
    assert outcome.value() == pytest.approx(outcome.value(torch.arange(5)))
    assert outcome.count == 5


def test_the_metrics_are_those_of_the_field() -> None:
    stats = pytest.importorskip("scipy.stats")
    dense, _ = ranked(50, 0.5)
    wanted = float(stats.spearmanr(dense.scores, dense.labels).statistic)
    assert dense.value() == pytest.approx(wanted, abs=1e-12)
    perplexity = PerplexityOutcome(torch.tensor([2.0, 4.0]), torch.tensor([1, 2]))
    assert perplexity.value() == pytest.approx(torch.tensor(2.0).exp().item())


@pytest.mark.parametrize("metric", ["mean", "rank"])
def test_bounds_are_those_of_scipy(metric: str) -> None:
    stats = pytest.importorskip("scipy.stats")
    dense, pruned = ranked(12, 1.0)
    if metric == "mean":
        pair: tuple[Outcome, Outcome] = (MeanOutcome(dense.scores), MeanOutcome(pruned.scores))

        def statistic(a: Tensor, b: Tensor, axis: int = -1) -> Tensor:
            return a.mean(axis) - b.mean(axis)

        columns: tuple[Any, ...] = (dense.scores.numpy(), pruned.scores.numpy())
    else:
        pair = (dense, pruned)

        def statistic(a: Tensor, b: Tensor, c: Tensor) -> float:  # type: ignore[misc]
            first, second = (spearman(torch.tensor(x), torch.tensor(c)) for x in (a, b))
            return first - second

        columns = (*(o.scores.numpy() for o in (dense, pruned)), dense.labels.numpy())
    found = stats.bootstrap(
        columns,
        statistic,
        paired=True,
        vectorized=metric == "mean",
        n_resamples=1500,
        method="percentile",
        alternative="less",
        confidence_level=0.9,
        rng=0,
    )
    drop = paired_drop(*pair, confidence=0.9, draws=20_000)
    # The quantile 0.9 of 1,500 draws is at a rank of 0.9 with a standard error of 0.008.
    near = torch.tensor(found.bootstrap_distribution)
    low, high = (float(near.quantile(q)) for q in (0.88, 0.92))
    assert low < drop.upper < high
    assert drop.lower < drop.observed < drop.upper
    assert drop.observed == pytest.approx(pair[0].value() - pair[1].value())


@pytest.mark.parametrize("metric", ["mean", "rank"])
def test_the_bound_holds_as_often_as_it_says(metric: str) -> None:
    """Of 200 samples of a population whose drop is known, 95 % have a bound above it."""
    everything = ranked(50_000, 0.7)
    items, held = 150, 0
    if metric == "mean":
        labels = everything[0].labels
        right = [(o.scores - labels).abs() < 0.8 for o in everything]
        true = float(right[0].double().mean() - right[1].double().mean())
    else:
        true = everything[0].value() - everything[1].value()
    g = seeded(1)
    for repeat in range(200):
        taken = torch.randint(50_000, (items,), generator=g)
        pair: list[Outcome]
        if metric == "mean":
            pair = [MeanOutcome(r[taken]) for r in right]
        else:
            pair = [RankOutcome(o.scores[taken], o.labels[taken]) for o in everything]
        held += true <= paired_drop(pair[0], pair[1], draws=400, seed=repeat).upper
    # Two standard errors of 200 are 0.03.
    assert 0.91 < held / 200 < 0.985


def test_a_pair_says_more_than_two_single_figures() -> None:
    """What both models find hard does not widen the bound."""
    dense, pruned = ranked(300, 0.1)
    drop = paired_drop(dense, pruned)
    other = torch.randperm(300, generator=seeded(3))
    alone = paired_drop(dense, RankOutcome(pruned.scores[other], pruned.labels[other]))
    assert alone.observed == pytest.approx(drop.observed)
    assert drop.upper - drop.observed < 0.5 * (alone.upper - alone.observed)


def test_a_model_loses_nothing_against_itself() -> None:
    dense, _ = ranked(60, 0.5)
    drop = paired_drop(dense, RankOutcome(dense.scores.clone(), dense.labels.clone()))
    assert (drop.observed, drop.upper, drop.lower, drop.items) == (0, 0, 0, 60)


@pytest.mark.parametrize("constant", ["scores", "labels"])
def test_constant_scores_or_labels_rank_nothing(constant: str) -> None:
    """A correlation of constants is 0, on all items and on draws that are constant by chance."""
    dense, _ = ranked(5, 0.5)
    flat = torch.full((5,), 0.1, dtype=torch.float64)
    if constant == "scores":
        drop = paired_drop(dense, RankOutcome(flat, dense.labels))
        assert drop.observed == dense.value()
    else:
        drop = paired_drop(RankOutcome(dense.scores, flat), RankOutcome(dense.scores, flat))
        assert drop.observed == 0
    assert all(torch.tensor([drop.upper, drop.lower]).isfinite())
    same = torch.zeros(3, 5, dtype=torch.int64)
    assert torch.equal(dense.values(same), torch.zeros(3, dtype=torch.float64))


def test_a_perplexity_drops_by_a_fraction_of_the_dense_one() -> None:
    tokens = torch.full((40,), 10)
    losses = 20 + torch.rand(40, generator=seeded())
    dense = PerplexityOutcome(losses, tokens)
    drop = paired_drop(dense, PerplexityOutcome(losses + 0.1, tokens))
    # 0.1 nats more on each of ten tokens: the same on any draw.
    rise = torch.tensor(0.01, dtype=torch.float64).expm1().item()
    assert [drop.observed, drop.upper, drop.lower] == pytest.approx([rise] * 3, abs=1e-6)
    assert drop.relative
    assert "drop 1.01 %, below 1.01 % with 95 % confidence (40 items)" in drop.summary
    diverged = PerplexityOutcome(losses * 1e6, tokens)
    assert paired_drop(dense, diverged).upper == float("inf")


def test_errors_drop_where_they_rise() -> None:
    errors = torch.tensor([0.0, 1.0, 0.0, 0.0])
    dense, pruned = (MeanOutcome(e, higher_is_better=False) for e in (errors, errors + 0.25))
    assert paired_drop(dense, pruned).observed == pytest.approx(0.25)


def test_equal_seeds_give_equal_bounds_and_others_near_ones() -> None:
    pair = ranked(100, 0.5)
    first, again, other = (paired_drop(*pair, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.upper != other.upper
    assert first.upper == pytest.approx(other.upper, abs=0.01)
    assert json.loads(json.dumps(first.to_json()))["items"] == 100


def test_draws_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = ranked(30, 0.5)
    whole = paired_drop(*pair)
    monkeypatch.setattr("graphprune.training.outcome._DRAWN_AT_ONCE", 30 * 7)
    parts = paired_drop(*pair)
    assert parts.observed == whole.observed
    assert parts.upper == pytest.approx(whole.upper, abs=0.02)


def test_two_thousand_draws_of_a_benchmark_take_seconds() -> None:
    pair = ranked(1500, 0.5)
    start = time.process_time()
    paired_drop(*pair)
    assert time.process_time() - start < 5


def test_what_cannot_be_compared_is_said_so() -> None:
    dense, pruned = ranked(10, 0.5)
    with pytest.raises(GraphPruneError, match="same items, got 10 of the dense model and 9"):
        paired_drop(dense, RankOutcome(pruned.scores[:9], pruned.labels[:9]))
    with pytest.raises(GraphPruneError, match="same items, got 0"):
        paired_drop(MeanOutcome(torch.zeros(0)), MeanOutcome(torch.zeros(0)))
    with pytest.raises(GraphPruneError, match="not RankOutcome and MeanOutcome"):
        paired_drop(dense, MeanOutcome(pruned.scores))
    infinite = MeanOutcome(torch.full((3,), torch.inf))
    with pytest.raises(GraphPruneError, match="the dense model's value is inf"):
        paired_drop(infinite, infinite)
    with pytest.raises(GraphPruneError, match=r"confidence must be between 0\.5 and 1"):
        paired_drop(dense, pruned, confidence=1.0)
    with pytest.raises(GraphPruneError, match="draws must be a whole number"):
        paired_drop(dense, pruned, draws=0)
