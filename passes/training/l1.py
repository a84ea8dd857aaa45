"""L1: train with a plain l1 penalty, the baseline of other penalties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from graphprune.ir.program import Program
from graphprune.passes.training.penalties import connections, seen
from graphprune.passes.training.training_pass import trained_report
from graphprune.passes.training.zeros import PenaltyPass, sparsity_of, topology
from graphprune.pipeline.base import Context, PassResult
from graphprune.pipeline.registry import register
from graphprune.training.loop import Hooks, fit
from graphprune.validate import check_number


@register
@final
@dataclass(frozen=True, slots=True)
class L1(PenaltyPass):
    """Train with alpha · Σ|w| over feed-forward, query, key and value; then zero small ones.

    With blocks, |w| is a block's L2 norm times the root of its size (a group lasso).

    Attributes:
        alpha: weight of the penalty.
    """

    name: ClassVar[str] = "l1"

    alpha: float = 1e-4

    def __post_init__(self) -> None:
        PenaltyPass.__post_init__(self)
        check_number("alpha", self.alpha, "0 or more", low=0)

    def run(self, program: Program, ctx: Context) -> PassResult:
        parts = self.some_parts(program, ctx)
        threshold = self.zero_below or 1e-4

        def penalty(tensors: Mapping[str, Tensor]) -> Tensor:
            strengths = [
                connections(view, part.oriented(self.blocks)).sum()
                for part, view in seen(parts.all, tensors)
            ]
            return self.alpha * torch.stack(strengths).sum()

        fitted = fit(
            program,
            ctx.training,
            ctx,
            self.plan(),
            Hooks(penalty=penalty, after_training=self.zeroed),
            settings={
                "alpha": self.alpha,
                "zeroing": [self.zero_below, self.sparsity, self.pattern],
            },
        )
        result = fitted.program
        degrees = {
            "before": topology(program, parts.expanding, threshold),
            "after": topology(result, parts.expanding, threshold),
        }
        more = {"sparsity": sparsity_of(result, parts.all, 0.0), "degrees": degrees}
        return PassResult(result, True, {**trained_report(fitted), **more})
