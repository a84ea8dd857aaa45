"""Digits: accuracy on held-out handwritten digits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphprune.models.data.batches import Batches
from graphprune.models.tasks.base import Progress, Task, TaskResult, scored, silent
from graphprune.models.zoo.digits import digits
from graphprune.training.outcome import MeanOutcome

_BATCH = 60


def examples(split: str) -> tuple[dict[str, Tensor], Tensor]:
    """Images pixel_values [n, 1, 8, 8] and labels [n] of "train" or "test"."""
    images, labels = digits(split)
    return {"pixel_values": images}, labels


def accuracy(model: Any, progress: Progress = silent) -> TaskResult:
    """Accuracy of a classifier of pixel_values [n, 1, 8, 8] on the 360 test digits."""
    batches = Batches(*examples("test"), _BATCH, shuffle=False)
    scores, labels = scored(model, batches, progress)
    return TASK.result(MeanOutcome(scores.argmax(dim=-1) == labels))


TASK = Task(
    name="digits",
    purpose="accuracy on the 360 held-out handwritten digits of scikit-learn",
    metric="accuracy",
    run=lambda r: accuracy(r.model, r.progress),
    reads_text=False,
    examples=examples,
    # A small network that was trained at a high rate does not move at the usual one.
    rate=1e-3,
)
