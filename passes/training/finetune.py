"""Finetune: train the pruned model on, with its own loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from graphprune.ir.program import Program
from graphprune.passes.training.training_pass import PlainTrainingPass, trained_report
from graphprune.pipeline.base import Context, PassResult
from graphprune.pipeline.registry import register
from graphprune.training.loop import fit


@register
@final
@dataclass(frozen=True, slots=True)
class Finetune(PlainTrainingPass):
    """Train all weights on the loss that `compile(..., training=...)` was given.

    1. Weights that a pass before has zeroed stay zero.
    2. Structure stays as it is; tied and shared parameters are trained once.
    3. Dropout and batch norm are in training mode meanwhile, and back in eval mode afterwards.
    """

    name: ClassVar[str] = "finetune"

    # By position too.
    epochs: int = 2
    lr: float = 5e-5

    def run(self, program: Program, ctx: Context) -> PassResult:
        fitted = fit(program, ctx.training, ctx, self.plan())
        return PassResult(fitted.program, True, trained_report(fitted))
