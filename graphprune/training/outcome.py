"""Outcomes of evaluations item by item, and what one model loses against another by them.

An evaluation of one model gives a number. The difference of two such numbers does not say whether
one model is worse by at most 0.01: on other items it would be another. The paired bootstrap (Efron
and Tibshirani 1993, chapter 13; Koehn 2004) gives a bound for any metric: draw items with
replacement, the same ones for both models, evaluate both on them, and take a quantile of the
differences. What is hard for both models cancels out.

It is in this room because it needs the metrics, and passes, models and reports import it.
"""

from __future__ import annotations

import abc
from dataclasses import asdict, dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from graphprune.errors import GraphPruneError
from graphprune.pipeline.events import JSON
from graphprune.training.metrics import spearman
from graphprune.validate import check_number, check_whole

_DRAWN_AT_ONCE = 2**20  # items of all draws together: 8 MiB a tensor


class Outcome(abc.ABC):
    """An evaluation item by item, enough for the metric on any draw of the items.

    Attributes:
        higher_is_better: whether a drop is a lower value.
        relative: whether drops are fractions of the dense model's value, and not in the unit of
            the metric.
    """

    higher_is_better: bool = True
    relative: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def count(self) -> int:
        """Items that can be drawn: pairs, images, windows of a text."""

    @abc.abstractmethod
    def value(self, indices: Tensor | None = None) -> float:
        """The metric on items [n] drawn with repetition, or on all of them."""

    def values(self, draws: Tensor) -> Tensor:
        """The metric on each of several draws of items [draws, n]; float64 [draws]."""
        return torch.tensor([self.value(row) for row in draws], dtype=torch.float64)


@final
@dataclass(frozen=True, slots=True, eq=False)
class MeanOutcome(Outcome):
    """A metric that is the mean of one number an item: accuracy of 0 and 1, agreement.

    Attributes:
        items: [n], any type; averaged in float64.
        higher_is_better: False for an error.
    """

    items: Tensor
    higher_is_better: bool = True

    @property
    def count(self) -> int:
        return len(self.items)

    def value(self, indices: Tensor | None = None) -> float:
        chosen = self.items if indices is None else self.items[indices]
        return float(chosen.double().mean())

    def values(self, draws: Tensor) -> Tensor:
        return self.items.double()[draws].mean(dim=1)


@final
@dataclass(frozen=True, slots=True, eq=False)
class RankOutcome(Outcome):
    """Spearman's correlation of a model's scores and labels, both [n]; 0 where one is constant."""

    scores: Tensor
    labels: Tensor

    @property
    def count(self) -> int:
        return len(self.labels)

    def value(self, indices: Tensor | None = None) -> float:
        if indices is None:
            return spearman(self.scores, self.labels)
        return spearman(self.scores[indices], self.labels[indices])

    def values(self, draws: Tensor) -> Tensor:
        x, y = (_ranks_of_draws(values, draws) for values in (self.scores, self.labels))
        x, y = (ranks - ranks.mean(dim=1, keepdim=True) for ranks in (x, y))
        norms = x.norm(dim=1) * y.norm(dim=1)
        # Equal ranks have exactly their mean, so that a constant draw has the norm 0.
        return torch.where(norms == 0, 0.0, (x * y).sum(dim=1) / norms)


def _ranks_of_draws(values: Tensor, draws: Tensor) -> Tensor:
    """Mean ranks of values [n] within each of several draws [draws, m]; float64 [draws, m].

    Without sorting a draw: the rank of a distinct value follows from how often it and those below
    it were drawn.
    """
    distinct, places = torch.unique(values, return_inverse=True)
    drawn = places[draws]
    counts = torch.zeros(len(draws), len(distinct), dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones(1, 1, dtype=torch.float64).expand(drawn.shape))
    return (counts.cumsum(dim=1) - (counts - 1) / 2).gather(1, drawn)


@final
@dataclass(frozen=True, slots=True, eq=False)
class PerplexityOutcome(Outcome):
    """exp of the mean negative log-likelihood a token, over segments of text.

    A drop is the relative rise, pruned / dense - 1 = exp(difference of the mean losses) - 1: a
    perplexity has no unit that could be compared between models and vocabularies.

    Attributes:
        losses: negative log-likelihood summed over each segment, in nats; [n].
        tokens: that each segment predicts; [n].
    """

    losses: Tensor
    tokens: Tensor
    higher_is_better: bool = False
    relative: ClassVar[bool] = True

    @property
    def count(self) -> int:
        return len(self.losses)

    def value(self, indices: Tensor | None = None) -> float:
        chosen = torch.arange(self.count) if indices is None else indices
        return float(self.values(chosen.unsqueeze(0)))

    def values(self, draws: Tensor) -> Tensor:
        # torch, unlike math, has an infinity for what is too large.
        losses, tokens = (part.double()[draws].sum(dim=1) for part in (self.losses, self.tokens))
        return (losses / tokens).exp()


@final
@dataclass(frozen=True, slots=True)
class Drop:
    """The loss of a pruned model against the dense one; negative where it gains.

    Attributes:
        observed: on all items.
        upper: one-sided bound: the drop is below it with `confidence`, over draws of the items.
        lower: one-sided bound from below, with the same confidence.
        confidence: of each bound.
        items: that both models were evaluated on.
        relative: whether the three are fractions of the dense value, not in the metric's unit.
    """

    observed: float
    upper: float
    lower: float
    confidence: float
    items: int
    relative: bool = False

    @property
    def summary(self) -> str:
        """As words: "drop 0.0041, below 0.0093 with 95 % confidence (1,379 items)"."""
        observed, upper = (
            f"{100 * value:.2f} %" if self.relative else f"{value:.4f}"
            for value in (self.observed, self.upper)
        )
        return (
            f"drop {observed}, below {upper} with {100 * self.confidence:g} % confidence "
            f"({self.items:,} items)"
        )

    def to_json(self) -> dict[str, JSON]:
        """Plain data, the fields by name."""
        return asdict(self)


def paired_drop(
    dense: Outcome,
    pruned: Outcome,
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Drop:
    """How much a pruned model loses against the dense one, with bounds by the paired bootstrap.

    The drop is dense - pruned in the unit of the metric, the other way round where lower is
    better, divided by the dense value where the outcome is `relative`. Bounds are percentiles, the
    outer one of two draws. They know only differences that the items show: models that agree on
    all of few items have the bound 0. They hold for one comparison: of several candidates that are
    tried on the same items until one passes, the one that passes is a little worse than it looks.

    Args:
        dense: of the dense model.
        pruned: of the pruned one, on the same items in the same order.
        confidence: of each bound alone.
        draws: of as many items as there are, with replacement.
        seed: of the draws; equal seeds give equal bounds.

    Raises:
        GraphPruneError: the outcomes are not of the same items and metric, or the dense value is
            no finite number (0 for a relative drop).
        RecipeError: confidence or draws are out of range.
    """
    check_number("confidence", confidence, "between 0.5 and 1", low=0.5, high=1, open_high=True)
    check_whole("draws", draws)
    _check_pair(dense, pruned)
    count, generator = dense.count, torch.Generator().manual_seed(seed)
    parts = [
        _drops(dense, pruned, torch.randint(count, (rows, count), generator=generator))
        for rows in _chunks(draws, max(1, _DRAWN_AT_ONCE // count))
    ]
    drops = torch.cat(parts)
    upper = drops.quantile(confidence, interpolation="higher")
    lower = drops.quantile(1 - confidence, interpolation="lower")
    everything = torch.tensor([[d.value() for d in (dense, pruned)]], dtype=torch.float64)
    observed = _difference(dense, everything[:, 0], everything[:, 1])
    return Drop(
        float(observed), float(upper), float(lower), confidence, count, relative=dense.relative
    )


def _chunks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _drops(dense: Outcome, pruned: Outcome, draws: Tensor) -> Tensor:
    return _difference(dense, dense.values(draws), pruned.values(draws))


def _difference(outcome: Outcome, dense: Tensor, pruned: Tensor) -> Tensor:
    """Drops [n] from values [n]."""
    lost = dense - pruned if outcome.higher_is_better else pruned - dense
    return lost / dense.abs() if outcome.relative else lost


def _check_pair(dense: Outcome, pruned: Outcome) -> None:
    if type(dense) is not type(pruned) or dense.higher_is_better != pruned.higher_is_better:
        raise GraphPruneError(
            f"a drop is between outcomes of one metric, not {type(dense).__name__} and "
            f"{type(pruned).__name__}: evaluate both models by the same task"
        )
    if not dense.count or dense.count != pruned.count:
        raise GraphPruneError(
            f"a drop is between outcomes of the same items, got {dense.count} of the dense model "
            f"and {pruned.count} of the pruned one: evaluate both on the same data"
        )
    value = torch.tensor(dense.value())
    if not bool(value.isfinite()) or (dense.relative and not value):
        raise GraphPruneError(
            f"the dense model's value is {float(value)}, from which nothing can be lost: evaluate "
            "it by a task that it can do"
        )
