"""Groups cut one after another, each on the activations after the cuts before it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor, fx

from graphprune.axes import AxisGroup, AxisGroups
from graphprune.axes.branches import Branch
from graphprune.axes.sites import contractions
from graphprune.calibration.gram import Remarks
from graphprune.calibration.stream import Stream
from graphprune.ir.graph import is_op
from graphprune.ir.program import Program
from graphprune.passes.solvers.held_out import Residual
from graphprune.passes.structural.allocation import others
from graphprune.passes.structural.records import Calibrated
from graphprune.passes.structural.scores import Evidence, Needs, Score
from graphprune.passes.structural.statistics import (
    Consumer,
    compensate,
    gather,
    with_patches,
)
from graphprune.pipeline.base import Context

log = logging.getLogger(__name__)

# What may lie between the last product of a branch and the sum: nothing that changes a value.
_PASSES_ON = ("to", "contiguous", "clone", "alias", "dropout", "detach")


@final
@dataclass(frozen=True, slots=True)
class StreamTarget:
    """Fit the last product of a residual branch to the dense model's stream after the branch.

    What earlier cuts have changed in the stream is repaired too, as far as the kept units can
    (K-prune, arXiv 2308.03449, section 4.3), and as far as batches that are held out agree
    (`solvers.held_out`); without any, nothing of it is. Elsewhere weights are fitted to their own
    output.

    Attributes:
        dense: the program to follow.
        branches: of the program that is cut; sums go by the same names in both.
    """

    dense: Program
    branches: Sequence[Branch]

    def sum_after(self, part: Consumer, stream: Stream) -> fx.Node | None:
        """The sum that takes a product's output as it is, and is in both graphs; else None."""
        entry, window = part.site.entry, part.site.window
        if part.site.group is not None or (window is not None and window.apart):
            return None  # the site's rows are no channels of the sum
        by_name = {node.name: node for node in stream.nodes}
        there = {node.name for node in self.dense.entries[entry].graph.nodes}
        for branch in self.branches:
            place = branch.places.get(entry)
            if place is None or place.add not in there:
                continue
            node = by_name.get(place.value)
            while node is not None and node is not part.site.node and is_op(node, *_PASSES_ON):
                node = node.all_input_nodes[0]
            if node is part.site.node:
                return by_name[place.add]
        return None


@final
@dataclass(slots=True)
class CutGroups:
    """The cut so far.

    Attributes:
        program: with the kept weights fitted, at the old shapes.
        keep: group id -> units that stay.
        errors: group id -> relative output error of what reads it.
        curves: group id -> scores in the order of removal.
    """

    program: Program
    keep: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    _few: Remarks = field(default_factory=Remarks)
    _refitted: set[str] = field(default_factory=set)

    def calibrated(self) -> Calibrated:
        """Return the measurements; updates the program's record of zeros."""
        warnings = self._few.warn(log)
        self.program = _without_zeros(self.program, self._refitted, warnings)
        return Calibrated(self.errors, self.curves, warnings)


def cut_groups(
    program: Program,
    groups: AxisGroups,
    order: Sequence[AxisGroup],
    counts: Mapping[str, int],
    score: Score,
    ctx: Context,
    *,
    method: str,
    damping: float,
    target: StreamTarget | None = None,
) -> CutGroups:
    """Choose and compensate group after group; nothing is removed yet.

    Args:
        program: what to cut.
        groups: its axis groups.
        order: those to cut, in execution order.
        counts: group id -> how many units stay.
        score: which units go first.
        ctx: the batches and the progress.
        method: how kept weights compensate for removed ones.
        damping: fraction of the mean squared input added to a Gram matrix's diagonal.
        target: what least squares fits to; by default each weight's own output.
    """
    batches = list(ctx.batches())
    stream = Stream(program, batches)
    dense = Stream(target.dense, batches) if target is not None else None
    done = CutGroups(program)
    for group in order:
        # Gradients alone know of a recurrence, whose inputs are inside its operator.
        blind = method == "none" and score.needs is Needs.GRADIENTS and _recurs(groups, group)
        fits = method == "least-squares"
        parts = [] if blind else gather(stream, done.program, groups, group, ctx, held=fits)
        for part in parts:
            done._few.add_shortage(part.site.name, part.gram)
        if method == "least-squares":
            done._refitted |= {part.site.tensor for part in parts}
        count = group.size - counts[group.id]
        gone, costs = score.order(Evidence(done.program, group, ctx, parts, damping), count)
        done.keep[group.id] = others(group.size, gone[:count])
        done.curves[group.id] = _curve(costs)
        if target is not None and dense is not None:
            parts = [_towards_stream(part, target, dense, stream, done.program) for part in parts]
        if method == "least-squares":
            keep = done.keep[group.id]
            parts = [with_patches(stream, done.program, part, groups, keep) for part in parts]
        done.program, done.errors[group.id] = compensate(
            done.program, group, parts, done.keep[group.id], method, damping
        )
    return done


def _recurs(groups: AxisGroups, group: AxisGroup) -> bool:
    """Whether an operator reads the group by a weight, of its own results."""
    return any(c.operand.op == "get_attr" for _, c in contractions(groups, group))


def _towards_stream(
    part: Consumer, target: StreamTarget, dense: Stream, pruned: Stream, program: Program
) -> Consumer:
    """The consumer with the residual of the stream after it, where it ends a branch."""
    total = target.sum_after(part, pruned)
    if total is None:
        return part
    there = next(node for node in dense.nodes if node.name == total.name)
    after, after_there = (s.nodes[s.number[n] + 1] for s, n in ((pruned, total), (dense, there)))
    features = len(part.units) + (part.site.bias is not None)
    rows = part.site.matrix(program).shape[0]
    found = Residual.empty(rows, features)
    theirs = dense.before(target.dense, {after_there})
    read: dict[fx.Node, Any] = {}
    for i, node, values in pruned.before(program, {part.site.node, after}):
        if node is part.site.node:
            read = {n: values[n] for n in node.all_input_nodes if n in values}
            continue
        _, _, others_there = next(theirs)
        residual = dense.results_at(part.site, there, others_there[there], i)
        residual = residual - pruned.results_at(part.site, total, values[total], i)
        done = 0
        for inputs in pruned.inputs(part.site, read, i):
            if part.site.bias is not None:
                inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
            found.add(residual[done : done + len(inputs)], inputs, held=pruned.is_held(i))
            done += len(inputs)
    # Read to the end, so that the dense stream records its position.
    assert next(theirs, None) is None
    return replace(part, residual=found)


def _without_zeros(program: Program, refitted: set[str], warnings: list[str]) -> Program:
    """Record where least squares has filled weights that an earlier pass had set to zero."""
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
    """Scores for a picture: at most `points` of them, as fractions of the largest."""
    if not len(scores):
        return []
    at = torch.linspace(0, len(scores) - 1, min(points, len(scores))).round().long()
    parts: list[float] = (scores[at] / scores.max().clamp_min(1e-300)).tolist()
    return parts
