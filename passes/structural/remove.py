"""What PruneHeads, PruneNeurons and PruneAxis share: select, score, allocate, remove, report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from graphprune.axes import AxisGroup, axis_groups
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.events import JSON
from graphprune.passbase import Context, PassResult
from graphprune.passes.structural.allocate import allocation_named
from graphprune.passes.structural.score import score_named
from graphprune.passes.structural.select import Selection, Selector, check_patterns, select
from graphprune.program import Program


@dataclass(frozen=True, slots=True)
class Removal:
    """How much to remove, chosen how, from the groups that `selector` takes."""

    selector: Selector
    ratio: float
    score: str = "magnitude"
    allocation: str = "uniform"
    round_to: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float):
            raise RecipeError(f"ratio must be a number, got {self.ratio!r}")
        if math.isnan(self.ratio) or not 0 <= self.ratio < 1:
            raise RecipeError(
                f"ratio is the part to remove, at least 0 and below 1, got {self.ratio!r}"
            )
        if isinstance(self.round_to, bool) or not isinstance(self.round_to, int):
            raise RecipeError(f"round_to must be a whole number, got {self.round_to!r}")
        if self.round_to < 1:
            raise RecipeError(f"round_to must be at least 1, got {self.round_to!r}")
        score_named(self.score)
        allocation_named(self.allocation)
        for option in ("groups", "targets", "ignore"):
            check_patterns(option, getattr(self.selector, option))

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Remove the lowest-scoring units.

        Raises:
            UnsupportedError: all that was asked for is frozen, or nothing has the role.
        """
        selection = select(program, ctx.get(axis_groups, program), self.selector)
        keep = self._keep(program, selection, ctx)
        cut = {g.id: keep[g.id] for g in selection.groups if len(keep[g.id]) < g.size}
        if not cut:
            return PassResult(program, False, _report(program, program, selection, cut, self))
        smaller, verification = ctx.shrink(program, cut)
        report = _report(program, smaller, selection, cut, self)
        return PassResult(smaller, True, {**report, "verification": verification})

    def _keep(self, program: Program, selection: Selection, ctx: Context) -> dict[str, Tensor]:
        score = score_named(self.score)
        scores: dict[str, Tensor] = {}
        for i, group in enumerate(selection.groups):
            ctx.progress(i, len(selection.groups), "groups")
            scores[group.id] = _finite(score(program, group, ctx), group, self.score)
        ctx.progress(len(selection.groups), len(selection.groups), "groups")
        return allocation_named(self.allocation)(scores, self.ratio, self.round_to)


def _finite(scores: Tensor, group: AxisGroup, name: str) -> Tensor:
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise UnsupportedError(
            f"score {name!r} of {group.id!r} is not finite for units {bad[:5]}: its tensors hold "
            "NaN or infinity; repair the weights first"
        )
    return scores


def _report(
    before: Program,
    after: Program,
    selection: Selection,
    cut: Mapping[str, Tensor],
    removal: Removal,
) -> dict[str, JSON]:
    untouched = [
        _skipped(group, f"ratio {removal.ratio} and round_to {removal.round_to} keep all units")
        for group in selection.groups
        if group.id not in cut
    ]
    return {
        "groups": [
            {
                "id": group.id,
                "role": group.role,
                "before": group.size,
                "after": len(cut[group.id]),
            }
            for group in selection.groups
            if group.id in cut
        ],
        "kept": {group: keep.tolist() for group, keep in cut.items()},
        "skipped": [_skipped(group, reason) for group, reason in selection.skipped] + untouched,
        "parameters_before": before.num_parameters(),
        "parameters_after": after.num_parameters(),
    }


def _skipped(group: AxisGroup, reason: str) -> dict[str, JSON]:
    return {"id": group.id, "role": group.role, "size": group.size, "reason": reason}
