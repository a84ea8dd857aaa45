"""Distill: train the pruned model to match the dense one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from graphprune.errors import RecipeError
from graphprune.ir.program import Program
from graphprune.passes.training.training_pass import (
    DistillingPass,
    PlainTrainingPass,
    trained_report,
)
from graphprune.pipeline.base import Context, PassResult
from graphprune.pipeline.registry import register
from graphprune.training.loop import fit
from graphprune.training.objective import Distillation


@register
@final
@dataclass(frozen=True, slots=True)
class Distill(DistillingPass, PlainTrainingPass):
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
        hidden: whether hidden states are compared.
    """

    name: ClassVar[str] = "distill"

    temperature: float = 2.0  # by position too
    hidden: bool = True

    def __post_init__(self) -> None:
        DistillingPass.__post_init__(self)
        if not isinstance(self.hidden, bool):
            raise RecipeError(f"hidden is true or false, got {self.hidden!r}")

    def run(self, program: Program, ctx: Context) -> PassResult:
        fitted = fit(program, ctx.training, ctx, self.plan(), distillation=self.distillation())
        return PassResult(fitted.program, True, trained_report(fitted))

    def distillation(self) -> Distillation:
        hidden = self.hidden_weight if self.hidden else 0.0
        return Distillation(self.temperature, self.alpha, hidden)
