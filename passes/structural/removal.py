"""What PruneHeads, PruneNeurons and PruneAxis share: select, score, allocate, remove, report."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphprune.axes import AxisGroup, AxisGroups, axis_groups, frozen_parameters
from graphprune.calibration.gram import Remarks
from graphprune.calibration.stream import Stream
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.ir.program import Program
from graphprune.ir.quantization import refuse_quantised
from graphprune.passes.name_patterns import check_patterns
from graphprune.passes.structural.allocation import (
    Wanted,
    allocation_named,
    best,
)
from graphprune.passes.structural.scores import SCORES, score_named
from graphprune.passes.structural.selection import Selection, Selector, select
from graphprune.passes.structural.statistics import (
    DATA_SCORES,
    Consumer,
    check_compensation,
    compensate,
    gather,
    in_execution_order,
    marginal_costs,
    obs_order,
)
from graphprune.passes.structural.taylor import taylor_scores
from graphprune.pipeline.base import Context, PassResult
from graphprune.pipeline.events import JSON
from graphprune.suggest import suggest

log = logging.getLogger(__name__)

# Scores that activations decide; they compensate unless told otherwise.
DATA_CHOICES = ("obs", "taylor", *DATA_SCORES)
OF = ("now", "dense")


@dataclass(frozen=True, slots=True)
class Removal:
    """How much to remove, chosen how, from the groups that `selector` takes."""

    selector: Selector
    ratio: float
    score: str = "magnitude"
    allocation: str = "uniform"
    round_to: int = 1
    compensate: str = "auto"
    damping: float = 0.01
    floor: float = 0.0
    of: str = "now"

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
        if isinstance(self.damping, bool) or not 0 <= self.damping < math.inf:
            raise RecipeError(f"damping must be 0 or more, got {self.damping!r}")
        if isinstance(self.floor, bool) or not 0 <= self.floor <= 1:
            raise RecipeError(
                f"floor is the part of each group that stays, 0 to 1, got {self.floor!r}"
            )
        if self.of not in OF:
            raise RecipeError(f"ratio is a part of the units 'now' or 'dense', got of={self.of!r}")
        known = (*SCORES, *DATA_CHOICES)
        if self.score not in known:
            raise RecipeError(f"there is no score {self.score!r}; {suggest(self.score, known)}")
        allocation_named(self.allocation)
        check_compensation(self.compensate)
        for option in ("groups", "targets", "ignore"):
            check_patterns(option, getattr(self.selector, option))

    @property
    def method(self) -> str:
        """How the kept weights make up for the removed ones."""
        if self.compensate != "auto":
            return self.compensate
        return "least-squares" if self.score in DATA_CHOICES else "none"

    @property
    def needs_calibration(self) -> bool:
        """Whether activations decide, so that there must be batches."""
        return self.score in DATA_CHOICES or self.method != "none"

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Remove the lowest-scoring units.

        Raises:
            UnsupportedError: all that was asked for is frozen, nothing has the role, or the
                program is marked for quantisation already.
        """
        refuse_quantised(program, ctx.running)
        groups = ctx.get(axis_groups, program)
        selection = select(program, groups, self.selector)
        if self.needs_calibration:
            keep, prepared, notes = self._calibrated(program, selection, ctx)
        else:
            keep, prepared, notes = self._keep(program, selection, ctx), None, {}
        cut = {g.id: keep[g.id] for g in selection.groups if len(keep[g.id]) < g.size}
        if not cut:
            return PassResult(
                program, False, _report(program, program, groups, selection, cut, self)
            )
        smaller, verification = ctx.shrink(program, cut, prepared)
        report = {**_report(program, smaller, groups, selection, cut, self), **notes}
        return PassResult(smaller, True, {**report, "verification": verification})

    def _calibrated(
        self, program: Program, selection: Selection, ctx: Context
    ) -> tuple[dict[str, Tensor], Program, dict[str, JSON]]:
        """Choose and compensate group after group, each on what the cut ones before it make."""
        if ctx.calibration is None:
            raise RecipeError(
                f"pass {ctx.running!r} with score {self.score!r} and compensate {self.method!r} "
                "looks at activations and needs calibration batches: give compile(..., "
                "calibration=batches), or --calibration FILE"
            )
        groups = ctx.get(axis_groups, program)
        order = in_execution_order(groups, selection.groups)
        slopes = taylor_scores(program, groups, order, ctx) if self.score == "taylor" else {}
        counts = self._counts(program, groups, order, slopes, ctx)
        stream = Stream(program, ctx.calibration)
        keep: dict[str, Tensor] = {}
        errors: dict[str, JSON] = {}
        curves: dict[str, JSON] = {}
        few = Remarks()
        refitted: set[str] = set()
        for group in order:
            parts = gather(stream, program, groups, group, ctx)
            for part in parts:
                few.add(part.site.name, part.gram.shortage())
            refitted |= {part.site.tensor for part in parts if self.method == "least-squares"}
            keep[group.id], scores = self._choose(
                program, group, parts, counts[group.id], slopes, ctx
            )
            curves[group.id] = _curve(scores)
            program, errors[group.id] = compensate(
                program, group, parts, keep[group.id], self.method, self.damping
            )
        warnings = few.warn(log)
        program = _without_zeros(program, refitted, warnings)
        notes = {"output_error": errors, "score_curves": curves, "warnings": warnings}
        return keep, program, notes

    def _choose(
        self,
        program: Program,
        group: AxisGroup,
        parts: Sequence[Consumer],
        count: int,
        slopes: Mapping[str, Tensor],
        ctx: Context,
    ) -> tuple[Tensor, Tensor]:
        """The `count` units to keep, and scores in the order in which units would go."""
        if self.score == "obs":
            removed, costs = obs_order(program, group, parts, group.size - count, self.damping)
            gone = torch.zeros(group.size, dtype=torch.bool)
            gone[removed] = True
            return (~gone).nonzero().flatten(), torch.tensor(costs, dtype=torch.float64)
        scores = self._scores(program, group, parts, slopes, ctx)
        return best(scores, count), scores.sort().values

    def _scores(
        self,
        program: Program,
        group: AxisGroup,
        parts: Sequence[Consumer],
        slopes: Mapping[str, Tensor],
        ctx: Context,
    ) -> Tensor:
        if group.id in slopes:
            return _finite(slopes[group.id], group, self.score)
        if self.score in DATA_SCORES:
            return _finite(DATA_SCORES[self.score](program, group, parts), group, self.score)
        return _finite(score_named(self.score)(program, group, ctx), group, self.score)

    def _counts(
        self,
        program: Program,
        groups: AxisGroups,
        order: Sequence[AxisGroup],
        slopes: Mapping[str, Tensor],
        ctx: Context,
    ) -> dict[str, int]:
        """How many units of each group stay. Only "global" has to look at all groups first."""
        wanted = self._wanted(groups, order, ctx)
        if self.allocation == "uniform":
            return {g.id: wanted.kept(g.id, g.size) for g in order}
        assert ctx.calibration is not None
        stream = Stream(program, ctx.calibration)
        scores: dict[str, Tensor] = {}
        for group in order:
            parts = gather(stream, program, groups, group, ctx)
            if self.score == "obs":
                scores[group.id] = marginal_costs(program, group, parts, self.damping)
            else:
                scores[group.id] = self._scores(program, group, parts, slopes, ctx)
        keep = allocation_named(self.allocation)(scores, wanted)
        return {name: len(units) for name, units in keep.items()}

    def _keep(self, program: Program, selection: Selection, ctx: Context) -> dict[str, Tensor]:
        score = score_named(self.score)
        scores: dict[str, Tensor] = {}
        for i, group in enumerate(selection.groups):
            ctx.progress(i, len(selection.groups), "groups")
            scores[group.id] = _finite(score(program, group, ctx), group, self.score)
        ctx.progress(len(selection.groups), len(selection.groups), "groups")
        wanted = self._wanted(ctx.get(axis_groups, program), selection.groups, ctx)
        return allocation_named(self.allocation)(scores, wanted)

    def _wanted(self, now: AxisGroups, groups: Sequence[AxisGroup], ctx: Context) -> Wanted:
        costs = {group.id: group.cost for group in groups}
        steps = {group.id: self._step(now, group) for group in groups}
        sizes: dict[str, float] = {}
        if self.of == "dense" and ctx.reference is not None:
            dense = ctx.get(axis_groups, ctx.reference)
            sizes = {group.id: self._dense_size(now, group, dense, ctx) for group in groups}
        return Wanted(self.ratio, self.round_to, self.floor, costs, sizes, steps)

    def _step(self, now: AxisGroups, group: AxisGroup) -> int:
        """What the kept count of a group is a multiple of, so that its channels are of round_to."""
        beside = self._channels_of_a_unit(now, group)
        return math.lcm(*(self.round_to // math.gcd(self.round_to, count) for count in beside))

    def _dense_size(
        self, now: AxisGroups, group: AxisGroup, dense: AxisGroups, ctx: Context
    ) -> float:
        """How many units of today's the group had in the dense model."""
        former = next((g for g in dense if g.id == group.id and g.role == group.role), None)
        if former is None or former.size < group.size:
            raise UnsupportedError(
                f"pass {ctx.running!r} counts units of the dense model, which has no "
                f"{group.role} axis {group.id!r} of as many; take of='now'"
            )
        # Another factor of the same channels may be smaller by now.
        before, after = (
            self._channels_of_a_unit(groups, g)[0] for groups, g in ((dense, former), (now, group))
        )
        return former.size * before / after

    def _channels_of_a_unit(self, groups: AxisGroups, group: AxisGroup) -> list[int]:
        """In each dimension that the group is a factor of; groups named by id count for one."""
        if self.selector.groups:
            return [1]
        return [c.size // group.size for c in groups.channels(group)] or [1]


def _without_zeros(program: Program, refitted: set[str], warnings: list[str]) -> Program:
    """Take note where least squares has filled weights that an earlier pass had set to zero."""
    filled = sorted(refitted & program.zeroed)
    if not filled:
        return program
    more = f" and {len(filled) - 1} more" if len(filled) > 1 else ""
    sentence = (
        f"least squares filled the zeros of {filled[0]!r}{more}: remove structure first and zero "
        "weights afterwards"
    )
    log.warning("%s", sentence)
    warnings.append(sentence)
    return replace(program, zeroed=program.zeroed - refitted)


def _curve(scores: Tensor, points: int = 64) -> list[float]:
    """Scores for a picture: at most `points` of them, as parts of the largest."""
    if not len(scores):
        return []
    at = torch.linspace(0, len(scores) - 1, min(points, len(scores))).round().long()
    return (scores[at] / scores.max().clamp_min(1e-300)).tolist()


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
    groups: AxisGroups,
    selection: Selection,
    cut: Mapping[str, Tensor],
    removal: Removal,
) -> dict[str, JSON]:
    untouched = [
        _skipped(group, f"ratio {removal.ratio} and round_to {removal.round_to} keep all units")
        for group in selection.groups
        if group.id not in cut
    ]
    left = {name: len(keep) for name, keep in cut.items()}
    return {
        "groups": [
            {
                "id": group.id,
                "role": group.role,
                "before": group.size,
                "after": left[group.id],
                **_channels(groups, group, left),
            }
            for group in selection.groups
            if group.id in cut
        ],
        "kept": {group: keep.tolist() for group, keep in cut.items()},
        "skipped": [_skipped(group, reason) for group, reason in selection.skipped] + untouched,
        "frozen": [frozen.to_json() for frozen in frozen_parameters(groups)],
        "parameters_before": before.num_parameters(),
        "parameters_after": after.num_parameters(),
    }


def _channels(groups: AxisGroups, group: AxisGroup, left: Mapping[str, int]) -> dict[str, JSON]:
    """The dimensions that a cut group is a factor of, before and after; nothing if it is alone."""
    found = [
        {
            "id": channels.id,
            "before": channels.size,
            "after": math.prod(left.get(name, groups[name].size) for name in channels.factors),
        }
        for channels in groups.channels(group)
    ]
    return {"channels": found} if found else {}


def _skipped(group: AxisGroup, reason: str) -> dict[str, JSON]:
    return {"id": group.id, "role": group.role, "size": group.size, "reason": reason}
