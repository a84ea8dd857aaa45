"""TrainingPass: the owner of what the passes that train share, options and report."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from graphprune.errors import RecipeError
from graphprune.ir.program import JSON
from graphprune.passes.training.schedule import check_schedule
from graphprune.pipeline.base import Invariant, Pass
from graphprune.training.loop import Fitted
from graphprune.training.objective import Distillation
from graphprune.training.optimizer import Plan
from graphprune.verify.equivalence import combined


@dataclass(frozen=True, kw_only=True)
class TrainingPass(Pass):
    """A pass that trains on what `compile(..., training=...)` was given.

    Options are given by keyword; a subclass that takes one by position declares it again.
    Subclasses that `slots=True` recreates call `TrainingPass.__post_init__(self)`: super()
    would look for the class before that.

    Attributes:
        epochs: passes over the data.
        lr: the highest learning rate of AdamW.
        weight_decay: AdamW's, on tensors of two and more dimensions.
        warmup: fraction of all steps in which the rate rises from zero.
        clip: the largest norm of all gradients together; 0 for none.
    """

    __slots__ = ()

    preserves: ClassVar[Invariant] = Invariant.INTERFACE | Invariant.SHAPES
    needs_float: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    epochs: int = 2
    lr: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        self.plan()

    @property
    @abc.abstractmethod
    def rate_schedule(self) -> str:
        """The schedule of the learning rate after the warmup."""

    @property
    def needs_training(self) -> bool:
        return True

    def plan(self) -> Plan:
        """How long to train and with which steps.

        Raises:
            RecipeError: an option has no meaning.
        """
        return Plan(
            self.epochs, self.lr, self.weight_decay, self.warmup, self.rate_schedule, self.clip
        )


@dataclass(frozen=True, kw_only=True)
class PlainTrainingPass(TrainingPass):
    """A pass that trains and has no other schedule than the learning rate's.

    Attributes:
        schedule: what the rate does after the warmup: "linear" or "cosine" to zero, or "constant".
    """

    __slots__ = ()

    schedule: str = "linear"

    @property
    def rate_schedule(self) -> str:
        return self.schedule


@dataclass(frozen=True, kw_only=True)
class DistillingPass(TrainingPass):
    """A pass that may learn from the dense model.

    Attributes:
        temperature: what divides logits before they are compared; higher is softer.
        alpha: weight of the labels beside the dense model's outputs, 0 to 1.
        hidden_weight: weight of the hidden states; 0 leaves them out.
    """

    __slots__ = ()

    temperature: float = 2.0
    alpha: float = 0.5
    hidden_weight: float = 1.0

    def __post_init__(self) -> None:
        TrainingPass.__post_init__(self)
        Distillation(self.temperature, self.alpha, self.hidden_weight)

    def distillation(self) -> Distillation | None:
        """How to learn from the dense model; None where it does not."""
        return Distillation(self.temperature, self.alpha, self.hidden_weight)


@dataclass(frozen=True, kw_only=True)
class GradualPass(DistillingPass):
    """A pass that prunes on a schedule while it trains.

    Attributes:
        schedule: how pruning goes on: "cubic" (fast first) or "linear".
        begin: fraction of all steps after which it begins.
        end: fraction of all steps after which it is done; equal to `begin`, all at once.
        lr_schedule: what the learning rate does after the warmup: "linear" or "cosine" to zero, or
            "constant".
        distill: learn from the dense model's outputs and hidden states too, as Distill does.
    """

    __slots__ = ()

    begin: float = 0.0
    end: float = 0.7
    lr_schedule: str = "linear"
    distill: bool = False

    @property
    @abc.abstractmethod
    def schedule(self) -> str:
        """A field of the subclasses, which take it by position."""

    def __post_init__(self) -> None:
        DistillingPass.__post_init__(self)
        check_schedule(self.schedule, self.begin, self.end)
        if not isinstance(self.distill, bool):
            raise RecipeError(f"distill is true or false, got {self.distill!r}")

    @property
    def rate_schedule(self) -> str:
        return self.lr_schedule

    def distillation(self) -> Distillation | None:
        return DistillingPass.distillation(self) if self.distill else None


def trained_report(fitted: Fitted) -> dict[str, JSON]:
    """The report of a training, with a sentence for the table and what was checked."""
    record = fitted.record
    checked = f"nothing to compare: weights were trained; {record.masked_weights:,} stayed zero"
    verification = {"checked": checked, **_verification(record.cuts)}
    return {"summary": record.summary, **record.to_json(), "verification": verification}


def _verification(cuts: Sequence[Mapping[str, JSON]]) -> Mapping[str, JSON]:
    """The largest difference of all removals while training; or why none was measured."""
    compared = [cut for cut in cuts if "max_error" in cut]
    if compared:
        return {**combined(compared), "cuts": len(compared)}
    return next((cut for cut in cuts if "skipped" in cut), {})
