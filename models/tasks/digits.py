"""Digits: accuracy on held-out handwritten digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graphprune.models.tasks.base import TaskResult, runner
from graphprune.models.zoo.digits import digits


def accuracy(
    model: Any, progress: Callable[[int, int], None] = lambda done, total: None
) -> TaskResult:
    """Share of the 360 test digits that a classifier of pixel_values [n, 1, 8, 8] names rightly."""
    images, labels = digits("test")
    run = runner(model)
    right = 0
    batches = list(zip(images.chunk(6), labels.chunk(6), strict=True))
    for done, (pixels, wanted) in enumerate(batches, 1):
        right += int((run({"pixel_values": pixels}).argmax(dim=-1) == wanted).sum())
        progress(done, len(batches))
    return TaskResult("digits", "accuracy", right / len(labels), len(labels))
