"""Cut a model to the levels that a budget chose."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from graphprune.axes import axis_groups, frozen_parameters
from graphprune.axes.branches import branches
from graphprune.ir.program import Program
from graphprune.passes.budget.blocks import block_sites
from graphprune.passes.budget.candidates import GroupStatistics
from graphprune.passes.budget.items import Item, Level
from graphprune.passes.budget.sized import zeros_by_tensor
from graphprune.passes.sparsity.allocation import Share
from graphprune.passes.sparsity.sparsegpt import SparseGPT
from graphprune.passes.sparsity.sparsity_pattern import Pattern
from graphprune.passes.sparsity.zeroing import with_zeroed
from graphprune.passes.structural.allocation import others
from graphprune.passes.structural.records import Cuts, group_cuts
from graphprune.passes.structural.scores import score_named
from graphprune.passes.structural.sequential import StreamTarget, cut_groups
from graphprune.passes.structural.statistics import in_execution_order
from graphprune.pipeline.base import Context
from graphprune.pipeline.events import JSON

if TYPE_CHECKING:
    from graphprune.passes.budget.budget import Budget

log = logging.getLogger(__name__)


@final
@dataclass(frozen=True, slots=True)
class Cutter:
    """Cuts a dense model.

    Attributes:
        options: target and damping of least squares.
        program: the dense one.
        items: what there is to choose.
        seen: statistics of every group.
        pattern: of zero blocks; None where there are none to choose.
        ctx: of the pass, with the batches to calibrate on.
    """

    options: Budget
    program: Program
    items: Sequence[Item]
    seen: Mapping[str, GroupStatistics]
    pattern: Pattern | None
    ctx: Context

    def cut(self, chosen: Sequence[Level]) -> tuple[Program, Cuts, tuple[str, ...], list[str]]:
        """Remove branches, cut groups one after another on what the others give, zero blocks.

        Args:
            chosen: the level of each item.

        Returns:
            The program, its cuts, ids of the branches that went, and warnings.
        """
        gone = [i.branch for i, c in zip(self.items, chosen, strict=True) if c is None and i.branch]
        program, verifications = self.program, []
        if gone:
            program, verification = self.ctx.drop(program, gone)
            verifications.append(verification)
        groups = self.ctx.get(axis_groups, program)
        counts = self._counts(chosen)
        target = None
        if self.options.target == "stream":
            target = StreamTarget(self.program, self.ctx.get(branches, program))
        fitted = [groups[name] for name in counts if self.seen[name].weights]
        done = cut_groups(
            program,
            groups,
            in_execution_order(groups, fitted),
            counts,
            score_named("obs"),
            self.ctx,
            method="least-squares",
            damping=self.options.damping,
            target=target,
        )
        calibrated = done.calibrated()
        keep = dict(done.keep)
        for name in counts.keys() - keep.keys():
            order = torch.tensor(self.seen[name].order, dtype=torch.int64)
            keep[name] = others(groups[name].size, order[: groups[name].size - counts[name]])
        smaller = program
        if keep:
            smaller, verification = self.ctx.shrink(program, keep, done.program)
            verifications.append(verification)
        zeros = zeros_by_tensor(self.items, chosen)
        warnings: list[str] = []
        if zeros and self.pattern is not None:
            smaller, warnings = self._zeroed(smaller, zeros, self.pattern)
        cuts = Cuts(
            group_cuts(groups, keep),
            {name: units.tolist() for name, units in keep.items()},
            (),
            tuple(frozen_parameters(groups)),
            self.program.num_parameters(),
            smaller.num_parameters(),
            calibrated,
            _joined(verifications),
        )
        return smaller, cuts, tuple(branch.id for branch in gone), warnings

    def _zeroed(
        self, program: Program, zeros: Mapping[str, float], pattern: Pattern
    ) -> tuple[Program, list[str]]:
        """Zero blocks, each product on what the ones before it give, and fit what stays."""
        groups = self.ctx.get(axis_groups, program)
        sites = block_sites(groups, zeros, pattern)
        shares = {site.name: Share(zeros[site.tensor], pattern) for site in sites}
        step = SparseGPT(0.5, pattern=pattern.text, damping=self.options.damping)
        done = step.streamed(program, sites, shares, self.ctx)
        sentence = (
            "zero blocks are skipped where export(target='onnxruntime+kernels') writes the model, "
            "on the command line --target onnxruntime+kernels; elsewhere they make it no faster"
        )
        log.warning("%s", sentence)
        return with_zeroed(done.program, sites), [sentence, *done.remarks.warn(log)]

    def _counts(self, chosen: Sequence[Level]) -> dict[str, int]:
        """Group id -> units that stay, of the groups that lose some."""
        return {
            group.id: kept
            for item, level in zip(self.items, chosen, strict=True)
            if level is not None
            for group, kept in zip(item.groups, level.units, strict=True)
            if kept < group.size
        }


def _joined(verifications: Sequence[Mapping[str, JSON]]) -> dict[str, JSON] | None:
    """One report of several verifications: the last, with the largest error of all.

    None without any: zero blocks alone rewrite no graph.
    """
    if not verifications:
        return None
    errors = [v["max_error"] for v in verifications if "max_error" in v]
    return {**verifications[-1], **({"max_error": max(errors)} if errors else {})}
