"""Distill: train the pruned model to do as the dense one does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from graphprune.errors import RecipeError
from graphprune.ir.program import Program
from graphprune.passes.training.finetune import trained_report
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.registry import register
from graphprune.training.fit import fit
from graphprune.training.objective import Distillation
from graphprune.training.optimizer import Plan


@register
@final
@dataclass(frozen=True, slots=True)
class Distill(Pass):
    """Train all weights towards the dense model's outputs and hidden states.

    loss = alpha · labels + (1 - alpha) · outputs + hidden_weight · hidden

    1. outputs: the divergence of the softened logits times temperature², where the loss is
       "classification" or "causal-lm"; else the squared distance of the outputs.
    2. hidden: the relative squared distance of the residual stream's values, at nodes that both
       graphs have by one name and in one shape; the report lists them, and the others with why.
    3. labels: the loss that `compile(..., training=...)` was given. Without labels it is left out,
       and the teacher's outputs have the whole weight.
    4. Rows that are padding count for nothing; weights that were zeroed stay zero.

    Attributes:
        temperature: what divides logits before they are compared; higher is softer.
        hidden: whether hidden states are compared.
        alpha: weight of the labels, 0 to 1.
        hidden_weight: weight of the hidden states.
        epochs: passes over the data.
        lr: the highest learning rate of AdamW.
        weight_decay: AdamW's, on tensors of two and more dimensions.
        warmup: part of all steps in which the rate rises from zero.
        schedule: what it does then: "linear" or "cosine" to zero, or "constant".
        clip: the largest norm of all gradients together; 0 for none.
    """

    name: ClassVar[str] = "distill"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE | Invariant.SHAPES
    needs_float: ClassVar[bool] = True

    temperature: float = 2.0
    hidden: bool = True
    alpha: float = 0.5
    hidden_weight: float = 1.0
    epochs: int = 2
    lr: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.1
    schedule: str = "linear"
    clip: float = 1.0

    def __post_init__(self) -> None:
        Plan.of(self)
        if not isinstance(self.hidden, bool):
            raise RecipeError(f"hidden is true or false, got {self.hidden!r}")
        self._distillation()

    @property
    def needs_training(self) -> bool:
        return True

    def run(self, program: Program, ctx: Context) -> PassResult:
        fitted = fit(
            program,
            ctx.training,
            ctx,
            Plan.of(self),
            distillation=self._distillation(),
        )
        return PassResult(fitted.program, True, trained_report(fitted))

    def _distillation(self) -> Distillation:
        Distillation(self.temperature, self.alpha, self.hidden_weight)
        return Distillation(
            self.temperature, self.alpha, self.hidden_weight if self.hidden else 0.0
        )
