"""What evaluations measure, on scores written out."""

from __future__ import annotations

import math

import pytest
import torch

from graphprune.errors import TrainingError
from graphprune.training.metrics import Metric, spearman


def test_spearman_is_that_of_scipy() -> None:
    from scipy.stats import spearmanr

    a, b = torch.randint(0, 6, (40,)).double(), torch.randint(0, 9, (40,)).double()
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert spearman(a, torch.ones(40).double()) == 0


def test_a_metric_counts_examples_not_batches() -> None:
    score = Metric("classification")
    logits = torch.eye(3)
    score.add(logits, {"labels": torch.tensor([0, 1, 0])})
    score.add(logits[:1], {"labels": torch.tensor([0])})
    assert score.value() == 3 / 4
    with pytest.raises(TrainingError, match="nothing to measure"):
        Metric("classification").value()


@pytest.mark.parametrize("loss", ["classification", "regression"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_metric_of_broken_scores_is_refused(loss: str, bad: float) -> None:
    scores = torch.randn(4, 3 if loss == "classification" else 1)
    scores[2, 0] = bad
    labels = torch.tensor([0, 1, 2, 0])
    with pytest.raises(TrainingError, match="outputs hold NaN or infinity"):
        Metric(loss).add(scores, {"labels": labels})
    if loss == "classification":
        # What does not count may be anything, and a class may be ruled out.
        labels[2], scores[0, 1] = -100, -math.inf
        Metric(loss).add(scores, {"labels": labels})
