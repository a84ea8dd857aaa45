"""The metrics of evaluations, one for each loss; higher is better in each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from graphprune.errors import TrainingError
from graphprune.training.losses import (
    IGNORED,
    LOSSES,
    Loss,
    check_labels,
    labels_of,
    loss_of,
    scores_of,
)


def metric_name(loss: Loss) -> str:
    """Name the metric of an evaluation on batches."""
    return LOSSES[loss] if isinstance(loss, str) else "negative loss"


@final
class Metric:
    """An evaluation in progress: batches go in, one number comes out, higher is better."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.total, self.count = 0.0, 0
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def add(self, outputs: Any, batch: Mapping[str, Any]) -> None:
        """Count one batch.

        Raises:
            TrainingError: labels are missing or do not fit, or the scores hold NaN or infinity.
        """
        if self.loss == "classification":
            labels = labels_of(batch)
            logits = scores_of(self.loss, outputs, labels)
            check_labels(self.loss, logits.shape, labels)
            counted = labels != IGNORED
            # A class may be ruled out by -inf, the best one may not.
            _check_finite(logits.amax(-1)[counted])
            self.total += int((logits.argmax(-1) == labels)[counted].sum())
            self.count += int(counted.sum())
        elif self.loss == "regression":
            labels = labels_of(batch)
            logits = scores_of(self.loss, outputs, labels)
            check_labels(self.loss, logits.shape, labels)
            _check_finite(logits)
            self.pairs.append((logits.flatten().double().cpu(), labels.flatten().double().cpu()))
            self.count += labels.numel()
        else:
            summed = loss_of(self.loss, outputs, batch)
            self.total -= float(summed.total)
            self.count += summed.count

    def value(self) -> float:
        """The metric over all batches.

        Raises:
            TrainingError: nothing was counted.
        """
        if not self.count:
            raise TrainingError("eval yields nothing to measure: no batch, or no label that counts")
        if self.pairs:
            scores, labels = (torch.cat(part) for part in zip(*self.pairs, strict=True))
            return spearman(scores, labels)
        return self.total / self.count


def spearman(a: Tensor, b: Tensor) -> float:
    """The rank correlation of two vectors, ties at their mean rank; 0 where one is constant."""
    return pearson(_ranks(a), _ranks(b))


def pearson(a: Tensor, b: Tensor) -> float:
    """The correlation of two vectors; 0 where one is constant."""
    # Compare the values: the mean of equal ones may differ from them by rounding.
    if any(bool((values == values[0]).all()) for values in (a, b)):
        return 0.0
    x, y = a - a.mean(), b - b.mean()
    return float(x @ y / (x.norm() * y.norm()))


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[inverse]


def _check_finite(scores: Tensor) -> None:
    if not bool(scores.isfinite().all()):
        raise TrainingError(
            "the model's outputs hold NaN or infinity, so there is nothing to evaluate: a layer "
            "before overflows, or its weights are broken"
        )
