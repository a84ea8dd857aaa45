"""StructuralPass, the owner of what all passes that remove units share."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from graphprune.axes import AxisGroup, AxisGroups, axis_groups, frozen_parameters
from graphprune.calibration.stream import Stream
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.ir.program import Program
from graphprune.ir.quantization import refuse_quantized
from graphprune.passes.name_patterns import check_names, check_patterns
from graphprune.passes.structural.allocation import Wanted, allocation_named
from graphprune.passes.structural.records import Calibrated, Cuts, Skipped, group_cuts
from graphprune.passes.structural.scores import Evidence, Needs, Score, finite, score_named
from graphprune.passes.structural.selection import Selection, Selector, select
from graphprune.passes.structural.sequential import cut_groups
from graphprune.passes.structural.statistics import (
    check_compensation,
    gather,
    in_execution_order,
)
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.validate import check_number, check_whole

OF = ("current", "dense")


@dataclass(frozen=True, slots=True)
class StructuralPass(Pass):
    """A pass that removes units: it owns their options, and chooses, compensates, cuts and reports.

    A subclass says with `selector` which groups it works on, and adds options of its own.

    Attributes:
        ratio: fraction of each group's units to remove, in [0, 1); one unit always stays.
        score: "magnitude" (L2 norm of all that goes with a unit), "random"; with calibration
            "obs" (exact cost after compensation), "fluctuation", "activation",
            "taylor" (gradients).
        allocation: "uniform" (the ratio of each group) or "global" (of all groups together).
        round_to: the kept count rounds up to a multiple of this; 8 or 16 suits vector units.
        compensate: how kept weights compensate for removed ones: "none", "bias", "least-squares";
            "auto" is least squares where calibration decides, else none.
        damping: fraction of the mean squared input added to the Gram matrix's diagonal; least
            squares takes more where that fits batches held out better, of four or more.
        floor: under "global", the fraction of each group's units that stays in any case.
        targets: name patterns; only groups that reach such a tensor. Globs for a name or a module,
            or "re:" and a regular expression.
        ignore: name patterns to leave alone.
        of: what ratio is a fraction of: the units of the "current" program, or those of the
            "dense" model, of which some may be gone already.
    """

    preserves: ClassVar[Invariant] = Invariant.INTERFACE
    needs_float: ClassVar[bool] = True
    without_data: ClassVar[str] = "score='magnitude' with compensate='none'"

    ratio: float
    score: str = "magnitude"
    allocation: str = "uniform"
    round_to: int = 1
    compensate: str = "auto"
    damping: float = 0.01
    floor: float = 0.0
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    of: str = "current"

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, "the fraction to remove, at least 0 and below 1",
                     low=0, high=1, open_high=True)  # fmt: skip
        check_whole("round_to", self.round_to, "at least 1, and whole")
        check_number("damping", self.damping, "0 or more", low=0)
        check_number(
            "floor", self.floor, "the fraction of each group that stays, 0 to 1", low=0, high=1
        )
        if self.of not in OF:
            was = "; 'now' is called 'current'" if self.of == "now" else ""
            raise RecipeError(
                f"of is 'current' or 'dense': ratio is a fraction of the program's units or of the "
                f"dense model's, got {self.of!r}{was}"
            )
        score_named(self.score)
        allocation_named(self.allocation)
        check_compensation(self.compensate)
        check_patterns("targets", self.targets)
        check_patterns("ignore", self.ignore)
        check_patterns("groups", self.selector.groups)

    @property
    @abc.abstractmethod
    def selector(self) -> Selector:
        """Which groups are cut, of those that `targets` and `ignore` leave."""

    @property
    def method(self) -> str:
        """How the kept weights compensate for the removed ones."""
        if self.compensate != "auto":
            return self.compensate
        return "least-squares" if self._scored_by_data else "none"

    @property
    def needs_calibration(self) -> bool:
        return self._scored_by_data or self.method != "none"

    @property
    def _scored_by_data(self) -> bool:
        return score_named(self.score).needs is not Needs.WEIGHTS

    def check(self, program: Program) -> None:
        check_names(self, program)

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Remove the lowest-scoring units.

        Raises:
            UnsupportedError: all that was asked for is frozen, nothing has the role, or the
                program is marked for quantization already.
        """
        refuse_quantized(program, ctx.running)
        groups = ctx.get(axis_groups, program)
        selection = self.selected(program, groups)
        prepared, calibrated = None, None
        if self.needs_calibration:
            keep, prepared, calibrated = self._calibrated(program, selection, ctx)
        else:
            keep = self._keep(program, selection, ctx)
        cut = {g.id: keep[g.id] for g in selection.groups if len(keep[g.id]) < g.size}
        report = self._report(program, groups, selection, cut)
        if not cut:
            return PassResult(program, False, report.to_json())
        smaller, verification = ctx.shrink(program, cut, prepared)
        report = replace(
            report,
            parameters_after=smaller.num_parameters(),
            calibrated=calibrated,
            verification=verification,
        )
        return PassResult(smaller, True, report.to_json())

    def _report(
        self,
        program: Program,
        groups: AxisGroups,
        selection: Selection,
        cut: Mapping[str, Tensor],
    ) -> Cuts:
        why = f"ratio {self.ratio} and round_to {self.round_to} keep all units"
        return Cuts(
            group_cuts(groups, cut),
            {name: units.tolist() for name, units in cut.items()},
            (
                *(Skipped.of(group, reason) for group, reason in selection.skipped),
                *(Skipped.of(group, why) for group in selection.groups if group.id not in cut),
            ),
            tuple(frozen_parameters(groups)),
            parameters_before=program.num_parameters(),
            parameters_after=program.num_parameters(),
        )

    def selected(self, program: Program, groups: AxisGroups) -> Selection:
        """The groups to cut, and those left out with the reason; raises as `select` does."""
        wanted = replace(self.selector, targets=self.targets, ignore=self.ignore)
        return select(program, groups, wanted)

    def _calibrated(
        self, program: Program, selection: Selection, ctx: Context
    ) -> tuple[dict[str, Tensor], Program, Calibrated]:
        """Choose and compensate group after group, each on what the cut ones before it make."""
        groups = ctx.get(axis_groups, program)
        order = in_execution_order(groups, selection.groups)
        score = score_named(self.score).begin(program, groups, order, ctx)
        counts = self._counts(program, groups, order, score, ctx)
        done = cut_groups(
            program, groups, order, counts, score, ctx, method=self.method, damping=self.damping
        )
        calibrated = done.calibrated()
        return done.keep, done.program, calibrated

    def _counts(
        self,
        program: Program,
        groups: AxisGroups,
        order: Sequence[AxisGroup],
        score: Score,
        ctx: Context,
    ) -> dict[str, int]:
        """How many units of each group stay. Only "global" has to look at all groups first."""
        wanted = self._wanted(groups, order, ctx)
        if self.allocation == "uniform":
            return {g.id: wanted.kept(g.id, g.size) for g in order}
        stream = Stream(program, ctx.batches())
        scores: dict[str, Tensor] = {}
        for group in order:
            moments = score.needs is Needs.MOMENTS
            parts = gather(stream, program, groups, group, ctx) if moments else ()
            scores[group.id] = finite(score, Evidence(program, group, ctx, parts, self.damping))
        keep = allocation_named(self.allocation)(scores, wanted)
        return {name: len(units) for name, units in keep.items()}

    def _keep(self, program: Program, selection: Selection, ctx: Context) -> dict[str, Tensor]:
        groups = ctx.get(axis_groups, program)
        score = score_named(self.score).begin(program, groups, selection.groups, ctx)
        scores: dict[str, Tensor] = {}
        for i, group in enumerate(selection.groups):
            ctx.progress(i, len(selection.groups), "groups")
            scores[group.id] = finite(score, Evidence(program, group, ctx))
        ctx.progress(len(selection.groups), len(selection.groups), "groups")
        wanted = self._wanted(groups, selection.groups, ctx)
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
        """What the kept count is a multiple of, so that channels are multiples of round_to."""
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
                f"{group.role} axis {group.id!r} of as many; take of='current'"
            )
        # Another factor of the same channels may be smaller already.
        before, after = (
            self._channels_of_a_unit(groups, g)[0] for groups, g in ((dense, former), (now, group))
        )
        return former.size * before / after

    def _channels_of_a_unit(self, groups: AxisGroups, group: AxisGroup) -> list[int]:
        """In each dimension that the group is a factor of; groups named by id count for one."""
        if self.selector.groups:
            return [1]
        return [c.size // group.size for c in groups.channels(group)] or [1]
