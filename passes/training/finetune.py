"""Finetune: train the pruned model on, with its own loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from graphprune.ir.program import JSON, Program
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.registry import register
from graphprune.training.fit import Fitted, fit
from graphprune.training.optimizer import Plan
from graphprune.verify.equivalence import combined


@register
@final
@dataclass(frozen=True, slots=True)
class Finetune(Pass):
    """Train all weights on the loss that `compile(..., training=...)` was given.

    1. Weights that a pass before has zeroed stay zero.
    2. Structure stays as it is; tied and shared parameters are trained once.
    3. Dropout and batch norm are in training mode meanwhile, and back in eval mode afterwards.

    Attributes:
        epochs: passes over the data.
        lr: the highest learning rate of AdamW.
        weight_decay: AdamW's, on tensors of two and more dimensions.
        warmup: part of all steps in which the rate rises from zero.
        schedule: what it does then: "linear" or "cosine" to zero, or "constant".
        clip: the largest norm of all gradients together; 0 for none.
    """

    name: ClassVar[str] = "finetune"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE | Invariant.SHAPES
    needs_float: ClassVar[bool] = True

    epochs: int = 2
    lr: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.1
    schedule: str = "linear"
    clip: float = 1.0

    def __post_init__(self) -> None:
        Plan.of(self)

    @property
    def needs_training(self) -> bool:
        return True

    def run(self, program: Program, ctx: Context) -> PassResult:
        fitted = fit(program, ctx.training, ctx, Plan.of(self))
        return PassResult(fitted.program, True, trained_report(fitted))


def trained_report(fitted: Fitted) -> dict[str, JSON]:
    """What training reports, with a sentence for the table and what was checked."""
    told = dict(fitted.report)
    losses = [record["loss"] for record in told["epochs"]]
    words = f"trained {told['steps']:,} steps, loss {losses[0]:.3g}"
    if len(losses) > 1:
        words += f" to {losses[-1]:.3g}"
    labels = [record["labels"] for record in told["epochs"] if "labels" in record]
    if len(labels) > 1:
        words += f" (labels {labels[0]:.3g} to {labels[-1]:.3g})"
    if told.get("stopped_early"):
        words += f", stopped early after epoch {len(losses)}"
    if told["metric_after"] is not None:
        words += f", {told['metric']} {told['metric_before']:.4g} to {told['metric_after']:.4g}"
    checked = f"nothing to compare: weights were trained; {told['masked_weights']:,} stayed zero"
    return {"summary": words, **told, "verification": {"checked": checked, **_proof(told)}}


def _proof(told: dict[str, JSON]) -> dict[str, JSON]:
    """The largest difference that removing units on the way made; or why none was looked for."""
    cuts = [cut for cut in told["cuts"] if "max_error" in cut]
    if cuts:
        return {**combined(cuts), "cuts": len(cuts)}
    return next((cut for cut in told["cuts"] if "skipped" in cut), {})
