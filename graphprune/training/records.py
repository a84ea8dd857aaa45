"""Records of a training, and their JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from graphprune.ir.program import JSON


@final
@dataclass(frozen=True, slots=True)
class Epoch:
    """One pass over the data.

    Attributes:
        number: from 1.
        means: "loss", and of several terms each.
        metric: what `eval` gave after it; None without one.
        seconds: evaluation included.
    """

    number: int
    means: Mapping[str, float]
    metric: float | None = None
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        return self.means["loss"]

    def to_json(self) -> dict[str, JSON]:
        metric = {} if self.metric is None else {"metric": self.metric}
        return {"epoch": self.number, **self.means, **metric, "seconds": self.seconds}

    @classmethod
    def from_json(cls, data: Mapping[str, JSON]) -> Epoch:
        means = dict(data)
        number, seconds = means.pop("epoch"), means.pop("seconds")
        return cls(number, metric=means.pop("metric", None), means=means, seconds=seconds)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingReport:
    """The record of a training.

    Attributes:
        epochs: in order.
        steps: of the optimizer.
        processes: that trained together.
        metric: name of what `eval` measures; None without one.
        metric_before, metric_after: of the program given, and of the one returned.
        masked_weights: that stayed zero.
        seconds: over all runs, where it was resumed.
        notes: what a user should know about the graph in training.
        cuts: of each removal on the way, what its verification reported.
        objective: what was minimized.
        best_epoch: whose weights were returned; None where they are the last one's.
        stopped_early: whether it ended before the last epoch.
    """

    epochs: Sequence[Epoch]
    steps: int
    processes: int = 1
    metric: str | None = None
    metric_before: float | None = None
    metric_after: float | None = None
    masked_weights: int = 0
    seconds: float = 0.0
    notes: Sequence[str] = ()
    cuts: Sequence[Mapping[str, JSON]] = ()
    objective: Mapping[str, JSON] = field(default_factory=dict)
    best_epoch: int | None = None
    stopped_early: bool = False

    @property
    def summary(self) -> str:
        """A sentence for the table of passes."""
        first, last = self.epochs[0], self.epochs[-1]
        words = f"trained {self.steps:,} steps, loss {first.loss:.3g}"
        if len(self.epochs) > 1:
            words += f" to {last.loss:.3g}"
        labels = [epoch.means["labels"] for epoch in self.epochs if "labels" in epoch.means]
        if len(labels) > 1:
            words += f" (labels {labels[0]:.3g} to {labels[-1]:.3g})"
        if self.stopped_early:
            words += f", stopped early after epoch {len(self.epochs)}"
        if self.metric_after is not None:
            words += f", {self.metric} {self.metric_before:.4g} to {self.metric_after:.4g}"
        return words

    def to_json(self) -> dict[str, JSON]:
        found: dict[str, JSON] = {
            "epochs": [epoch.to_json() for epoch in self.epochs],
            "steps": self.steps,
            "processes": self.processes,
            "metric": self.metric,
            "metric_before": self.metric_before,
            "metric_after": self.metric_after,
            "masked_weights": self.masked_weights,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "cuts": [dict(cut) for cut in self.cuts],
            **self.objective,
        }
        if self.best_epoch is not None:
            found |= {"best_epoch": self.best_epoch, "stopped_early": self.stopped_early}
        return found
