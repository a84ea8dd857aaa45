"""Sensitivity: what it costs to cut each axis group alone, and how much time each role gives back.

For a group and a ratio, the units that the score gives up go, at the old shapes and compensated as
the pruning passes would, and the model's outputs are compared with what they were.

For a role and a ratio, all of its groups are cut for good and the model is timed. Which units go
makes no difference to the time, so one export is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.axes import AxisGroup, AxisGroups, axis_groups
from graphprune.calibration.stream import Stream, flat_batch
from graphprune.errors import GraphPruneError, RecipeError, UnsupportedError
from graphprune.ir.program import Program
from graphprune.passes.structural.allocation import kept_count, others, units_to_remove
from graphprune.passes.structural.axis import PruneAxis
from graphprune.passes.structural.scores import Evidence, score_named
from graphprune.passes.structural.statistics import (
    Consumer,
    compensate,
    gather,
    in_execution_order,
)
from graphprune.pipeline.base import Context
from graphprune.report.sensitivity import Cost, Sensitivity, Time
from graphprune.rewrite.mask import mask
from graphprune.rewrite.shrink import shrink

CUT_ROLES = ("head", "kv_group", "neuron")
RATIOS = (0.25, 0.5, 0.75)

# (candidate, dense) -> milliseconds of both, measured interleaved
Timer = Callable[[Program, Program], tuple[float, float]]
Progress = Callable[[int, int], None]


def sensitivity(
    program: Program,
    calibration: Iterable[Any],
    *,
    ratios: Sequence[float] = RATIOS,
    score: str = "obs",
    roles: Sequence[str] = (),
    clock: Timer | None = None,
    progress: Progress = lambda done, total: None,
    seed: int = 0,
) -> Sensitivity:
    """Cut every group alone at every ratio, and say what that does to the outputs.

    Args:
        program: the model; it is not changed.
        calibration: batches like its example inputs.
        ratios: fractions of the units to remove, each above 0 and below 1.
        score: as the pruning passes take it.
        roles: which groups; by default heads, key/value groups and neurons, those that there are.
        clock: times a role's cut against the dense program; None leaves times out.
        progress: called with (done, total).
        seed: for score "random".

    Raises:
        RecipeError: a ratio, the score or a role is not valid.
        UnsupportedError: no group has the roles, or all of them are frozen.
        GraphPruneError: there are no batches, or they do not fit.
    """
    steps = check_options(ratios, score, roles)
    batches = list(calibration)
    groups = axis_groups(program)
    chosen = in_execution_order(groups, steps[0].selected(program, groups).groups)
    names = list(dict.fromkeys(g.role for g in chosen)) if clock else []
    total = len(chosen) * len(steps) + len(names) * len(steps)
    bench = _Bench(program, groups, chosen, batches, score, seed)
    costs: list[Cost] = []
    skipped: dict[str, str] = {}
    for i, group in enumerate(chosen):
        try:
            for j, cost in enumerate(bench.costs(group, steps)):
                costs.append(cost)
                progress(i * len(steps) + j + 1, total)
        except UnsupportedError as e:
            skipped[group.id] = str(e)
    if not costs:
        raise UnsupportedError(next(iter(skipped.values())))
    times: list[Time] = []
    for role in names:
        for step in steps:
            assert clock is not None
            cut = {g.id: range(_kept(g, step)) for g in chosen if g.role == role}
            ms, dense_ms = clock(shrink(program, cut), program)
            times.append(Time(role, step.ratio, ms, dense_ms))
            progress(len(chosen) * len(steps) + len(times), total)
    method = steps[0].method
    return Sensitivity(score, method, bench.samples, tuple(costs), tuple(times), skipped)


def check_options(
    ratios: Sequence[float], score: str, roles: Sequence[str]
) -> tuple[PruneAxis, ...]:
    """The passes that would do what `sensitivity` looks at, by ratio; needs no model.

    Raises:
        RecipeError: a ratio, the score or a role is not valid; near matches are named.
    """
    if not ratios:
        raise RecipeError("sensitivity needs at least one ratio, for instance 0.5")
    taken = tuple(roles) or CUT_ROLES
    steps = tuple(PruneAxis(ratio, score, role=taken) for ratio in sorted(dict.fromkeys(ratios)))
    if steps[0].ratio == 0:
        raise RecipeError("a ratio of 0 removes nothing; sensitivity takes ratios above 0")
    return steps


def _kept(group: AxisGroup, step: PruneAxis) -> int:
    return kept_count(units_to_remove(step.ratio, group.size), group.size, step.round_to)


class _Bench:
    """The batches at their way through the dense model, and its outputs to compare with."""

    def __init__(
        self,
        program: Program,
        groups: AxisGroups,
        chosen: Sequence[AxisGroup],
        batches: Sequence[Any],
        score: str,
        seed: int,
    ) -> None:
        self.program = program
        self.groups = groups
        self.ctx = Context(calibration=batches, seed=seed)
        self.stream = Stream(program, batches)
        self.flat = [flat_batch(program.forward, batch, i) for i, batch in enumerate(batches)]
        self.samples = sum(int(flat[0].shape[0]) if flat[0].dim() else 1 for flat in self.flat)
        results: Any = self.stream.nodes[-1].args[0]
        self.results: list[fx.Node] = list(results)
        self.dense = [self._rows(i, out) for i, out in enumerate(self.stream.outputs(program))]
        if not all(bool(rows.isfinite().all()) for rows in self.dense):
            raise GraphPruneError(
                "the model's outputs on the calibration batches hold NaN or infinity; check the "
                "batches and the weights"
            )
        self.score = score_named(score).begin(program, groups, chosen, self.ctx)

    def costs(self, group: AxisGroup, steps: Sequence[PruneAxis]) -> Iterator[Cost]:
        """Measure the output error of each step when it cuts this group alone."""
        for step, keep, outputs in self._variants(group, steps):
            error = self._error(outputs)
            yield Cost(group.id, group.role, group.size, len(keep), step.ratio, error)

    def _variants(
        self, group: AxisGroup, steps: Sequence[PruneAxis]
    ) -> Iterator[tuple[PruneAxis, Tensor, list[list[Tensor]]]]:
        last = steps[-1]
        with_data = last.needs_calibration
        parts: Sequence[Consumer] = ()
        if with_data:
            parts = gather(self.stream, self.program, self.groups, group, self.ctx, held=True)
        seen = Evidence(self.program, group, self.ctx, parts, last.damping)
        # Smaller cuts are beginnings of the largest.
        order, _ = self.score.order(seen, group.size - _kept(group, last))
        for step in steps:
            keep = others(group.size, order[: group.size - _kept(group, step)])
            if with_data:
                changed, _ = compensate(self.program, group, parts, keep, step.method, step.damping)
                yield step, keep, self.stream.outputs(changed)
            else:
                # A mask does also where no product with a weight sums the units.
                masked = mask(self.program, {group.id: keep})
                yield step, keep, [masked.run(flat) for flat in self.flat]

    def _error(self, outputs: Sequence[Sequence[Tensor]]) -> float:
        """|y' - y| / |y| over all rows of all float outputs."""
        wrong = whole = 0.0
        for i, (dense, flat) in enumerate(zip(self.dense, outputs, strict=True)):
            wrong += float((self._rows(i, flat) - dense).square().sum())
            whole += float(dense.square().sum())
        return (wrong / max(whole, 1e-300)) ** 0.5

    def _rows(self, batch: int, flat: Sequence[Tensor]) -> Tensor:
        """All float outputs of a batch in one vector, padded positions left out; float64."""
        found = [
            self.stream.rows[batch](node, value).flatten().double()
            for node, value in zip(self.results, flat, strict=True)
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim()
        ]
        if not found:
            raise UnsupportedError("the model has no floating-point output to compare")
        return torch.cat(found)
