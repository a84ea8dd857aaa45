"""NeuroPrune: train so that connections, features and heads that are not needed die.

    min  task + alpha Σ_layers R_ffn + beta Σ_layers R_att           (arXiv 2404.01306, eq. 1 and 2)

    R_ffn = Σ_u v_u Σ_j |w_uj|     v_u = 1 / (fraction of unit u's weights with |w| >= eps)
    R_att = Σ_i s_i^½              s_i = Σ |w| of q, k and v over input feature i

v_u is a constant for the gradient, so weights of u shrink at the rate alpha v_u sign(w): units with
few connections lose the rest faster, and rows die whole. The slope of R_att, sign(w) / (2 s_i^½),
grows as s_i gets small, which empties whole features.

Heads h and k whose incoming weights (q, k, v and biases) are equal have the same output a, and with
the output projection O_h a + O_k a = (O_h + O_k) a: one of them can go. Here they may differ by
theta, so merging is exact at theta = 0 alone.

With a pattern of blocks a connection is a block, see `penalties`: units are rows of blocks (so many
neurons, or input features), which die together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, final

from torch import Tensor

from graphprune.axes import axis_groups
from graphprune.errors import RecipeError
from graphprune.ir.program import JSON, Program
from graphprune.passes.training.merge import merge_units, plan_merge
from graphprune.passes.training.penalties import (
    Parts,
    attachment_penalty,
    find_parts,
    group_penalty,
    seen,
    views,
)
from graphprune.passes.training.training_pass import trained_report
from graphprune.passes.training.zeros import PenaltyPass, sparsity_of, topology
from graphprune.pipeline.base import Context, Invariant, Keep, PassResult
from graphprune.pipeline.registry import register
from graphprune.rewrite.shrink import removed_since
from graphprune.suggest import suggest
from graphprune.training.loop import Hooks, fit
from graphprune.validate import check_number

CONTRACTING = ("rows", "columns")


@register
@final
@dataclass(frozen=True, slots=True)
class NeuroPrune(PenaltyPass):
    """Train with penalties that wire the network sparsely, and merge heads that are equal.

    loss = task + alpha · feed-forward + beta · attention         (arXiv 2404.01306)

    1. Feed-forward: l1 weighted by preferential attachment. Each unit's weights are divided by the
       fraction of its connections that is alive, so that units with few connections die whole.
    2. Attention: the square root of each input feature's l1 norm over query, key and value.
    3. After every epoch, heads whose incoming weights differ by at most theta from another's are
       merged into it: their outgoing weights are added, and they are removed, verified. The last
       head stays; grouped-query attention merges whole groups. Position biases must match too.
    4. In the end small weights become zero for good. Zeros alone make nothing faster.
    5. With blocks, a connection is a block in cases 1, 2 and 4, its size the L2 norm times the root
       of how many weights it has. This is ours: the paper knows single weights only.

    The paper leaves open which of alpha and beta is which, the exact weights of case 1, how often
    they are computed (here: at every step), and the rule of case 4. This is one reading, with
    options where another one is as likely.

    Attributes:
        alpha: weight of the feed-forward penalty.
        beta: weight of the attention penalty.
        theta: largest difference of two heads that count as one; None merges none.
        threshold: a connection below it counts as dead; of blocks their root mean square is meant.
        contracting: units of the weights that read neurons: "rows" (outputs, as in the paper), or
            "columns" (the neurons, which then die from both sides).
    """

    name: ClassVar[str] = "neuroprune"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE

    alpha: float = 1e-4
    beta: float = 1e-4
    theta: float | None = 0.15
    threshold: float = 1e-4
    contracting: str = "rows"

    def __post_init__(self) -> None:
        PenaltyPass.__post_init__(self)
        check_number("alpha", self.alpha, "0 or more", low=0)
        check_number("beta", self.beta, "0 or more", low=0)
        if self.theta is not None:
            check_number("theta", self.theta, "0 or more, or null", low=0)
        check_number("threshold", self.threshold, "a number above 0", low=0, open_low=True)
        if self.contracting not in CONTRACTING:
            raise RecipeError(
                f"contracting is {self.contracting!r}; {suggest(self.contracting, CONTRACTING)}"
            )

    def run(self, program: Program, ctx: Context) -> PassResult:
        parts = self.some_parts(program, ctx)
        heads = axis_groups(program).with_role("head", "kv_group")
        state = _State(self, parts, {group.id: group.size for group in heads})
        before = _wiring(program, parts, self.threshold)
        fitted = fit(
            program,
            ctx.training,
            ctx,
            self.plan(),
            Hooks(
                penalty=state.penalty,
                after_epoch=state.merged,
                after_training=self.zeroed,
                bind=state.bind,
            ),
            settings={
                "alpha": self.alpha,
                "beta": self.beta,
                "theta": self.theta,
                "wiring": [self.threshold, self.contracting],
                "zeroing": [self.zero_below, self.sparsity, self.pattern],
            },
        )
        result = fitted.program
        parts = self.parts(result)
        removed = removed_since(program, result)
        report = {
            **trained_report(fitted),
            **removed,
            "sparsity": sparsity_of(result, parts.all, 0.0),
            "degrees": {"before": before, "after": _wiring(result, parts, self.threshold)},
            "heads": state.heads(removed["kept"]),
            "merges": [
                line["merged"]
                for line in result.history[len(program.history) :]
                if "merged" in line
            ],
            "skipped": state.skipped,
        }
        return PassResult(result, True, report)

    def parts(self, program: Program) -> Parts:
        return find_parts(axis_groups(program), self.contracting == "columns")


@dataclass(slots=True)
class _State:
    """The state of a run: the parts, as structure goes, and notes for the report."""

    options: NeuroPrune
    parts: Parts
    sizes: Mapping[str, int]
    skipped: dict[str, str] = field(default_factory=dict)

    def bind(self, program: Program) -> None:
        """Find the parts again: positions of units change once some are gone."""
        self.parts = self.options.parts(program)

    def penalty(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """alpha · feed-forward + beta · attention."""
        some = next(iter(tensors.values()))
        total = some.new_zeros(())
        own, blocks = self.options, self.options.blocks
        for part, view in seen((*self.parts.expanding, *self.parts.contracting), tensors):
            attachment = attachment_penalty(view, own.threshold, part.oriented(blocks))
            total = total + own.alpha * attachment
        for parts in self.parts.attention:
            if together := views(parts, tensors):
                total = total + own.beta * group_penalty(together, parts[0].oriented(blocks))
        return total

    def merged(self, program: Program, epoch: int) -> tuple[Program, Keep]:
        """Merge redundant heads, attention after attention.

        Args:
            program: as trained so far.
            epoch: from 0.

        Returns:
            The program with outgoing weights added up, at the old shapes, and group id -> heads
            that stay.
        """
        keep: dict[str, list[int]] = {}
        if self.options.theta is None:
            return program, keep
        groups = axis_groups(program)
        merged = program
        for group in groups.with_role("head", "kv_group"):
            plan = plan_merge(program, groups, group, self.options.theta)
            if isinstance(plan, str):
                self.skipped[group.id] = plan
                continue
            if len(plan.kept) == group.size:
                continue
            merged = merge_units(merged, groups, group, plan.into)
            keep[group.id] = plan.kept
            distances = [float(plan.distances[i, j]) for i, j in enumerate(plan.into) if i != j]
            note = {
                "epoch": epoch + 1,
                "group": group.id,
                "into": list(plan.into),
                "largest_difference": max(distances),
            }
            # The history is part of a checkpoint, so the note survives an interruption.
            merged = merged.record({"merged": note})
        return merged, keep

    def heads(self, kept: Mapping[str, list[int]]) -> dict[str, dict[str, int]]:
        """Heads of each group before and after, from the units that were kept of some."""
        return {
            name: {"before": size, "after": len(kept.get(name, range(size)))}
            for name, size in self.sizes.items()
        }


def _wiring(program: Program, parts: Parts, threshold: float) -> dict[str, JSON]:
    return {
        "expanding": topology(program, parts.expanding, threshold),
        "contracting": topology(program, parts.contracting, threshold),
    }
