"""L1: train with a plain l1 penalty, the baseline of everything cleverer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from graphprune.axes import axis_groups
from graphprune.errors import UnsupportedError
from graphprune.ir.program import Program
from graphprune.passes.training.finetune import trained_report
from graphprune.passes.training.neuroprune import check_zeroing
from graphprune.passes.training.penalties import find_parts, l1_penalty, views
from graphprune.passes.training.zeros import sparsity_of, topology, zero_small
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.registry import register
from graphprune.training.fit import fit
from graphprune.training.optimizer import Plan
from graphprune.validate import check_number


@register
@final
@dataclass(frozen=True, slots=True)
class L1(Pass):
    """Train with alpha · Σ|w| over feed-forward, query, key and value; then zero small ones.

    Attributes:
        alpha: weight of the penalty.
        zero_below: after the last epoch, weights of smaller magnitude become zero; 0 for none.
        sparsity: instead, this part of all weights under penalty becomes zero, the smallest ones.
        epochs: passes over the data.
        lr: the highest learning rate of AdamW.
        weight_decay: AdamW's, on tensors of two and more dimensions.
        warmup: part of all steps in which the rate rises from zero.
        schedule: what it does then: "linear" or "cosine" to zero, or "constant".
        clip: the largest norm of all gradients together; 0 for none.
    """

    name: ClassVar[str] = "l1"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE | Invariant.SHAPES
    needs_float: ClassVar[bool] = True

    alpha: float = 1e-4
    zero_below: float = 1e-4
    sparsity: float | None = None
    epochs: int = 3
    lr: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.1
    schedule: str = "linear"
    clip: float = 1.0

    def __post_init__(self) -> None:
        Plan.of(self)
        check_number("alpha", self.alpha, "0 or more", low=0)
        check_zeroing(self.zero_below, self.sparsity)

    @property
    def needs_training(self) -> bool:
        return True

    def run(self, program: Program, ctx: Context) -> PassResult:
        parts = find_parts(axis_groups(program))
        if not parts.all:
            raise UnsupportedError(
                f"pass {ctx.running!r} finds neither feed-forward nor attention weights that are "
                "linear layers in this model"
            )
        threshold = self.zero_below or 1e-4

        def penalty(tensors: Mapping[str, Tensor]) -> Tensor:
            return self.alpha * l1_penalty(views(parts.all, tensors))

        def zeroed(now: Program) -> Program:
            if self.sparsity is None and not self.zero_below:
                return now
            return zero_small(now, parts.all, self.zero_below, self.sparsity)

        fitted = fit(
            program,
            ctx.training,
            ctx,
            Plan.of(self),
            penalty=penalty,
            after_training=zeroed,
            settings={
                "alpha": self.alpha,
                "zeroing": [self.zero_below, self.sparsity],
            },
        )
        result = fitted.program
        degrees = {
            "before": topology(program, parts.expanding, threshold),
            "after": topology(result, parts.expanding, threshold),
        }
        told = {"sparsity": sparsity_of(result, parts.all, 0.0), "degrees": degrees}
        return PassResult(result, True, {**trained_report(fitted), **told})
