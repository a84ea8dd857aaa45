"""Sensitivity: what it costs to cut each axis group alone, and how much time each role gives back.

For a group and a ratio, the units that the score gives up go, at the old shapes and compensated as
the pruning passes would, and the model's outputs are compared with what they were.

For a role and a ratio, all of its groups are cut for good and the model is timed. Which units go
makes no difference to the time, so one export is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, fx

from graphprune.axes import AxisGroup, AxisGroups, axis_groups
from graphprune.axes.roles import ROLES as ALL_ROLES
from graphprune.calibration.stream import Stream, flat_batch
from graphprune.errors import GraphPruneError, RecipeError, UnsupportedError
from graphprune.ir.program import Program
from graphprune.pipeline.base import Context
from graphprune.pipeline.events import JSON
from graphprune.rewrite.mask import mask
from graphprune.rewrite.shrink import shrink
from graphprune.suggest import suggest

if TYPE_CHECKING:
    from graphprune.passes.structural.removal import Removal

ROLES = ("head", "kv_group", "neuron")
RATIOS = (0.25, 0.5, 0.75)

# (candidate, dense) -> milliseconds of both, measured in turns
Clock = Callable[[Program, Program], tuple[float, float]]
Progress = Callable[[int, int], None]


@final
@dataclass(frozen=True, slots=True)
class Cost:
    """One group cut alone.

    Attributes:
        group: its id.
        role: its role.
        size: units it has.
        kept: units that stayed.
        ratio: part that was asked to go.
        error: relative error of the model's outputs, |y' - y| / |y| over all calibration rows.
    """

    group: str
    role: str
    size: int
    kept: int
    ratio: float
    error: float


@final
@dataclass(frozen=True, slots=True)
class Time:
    """All groups of a role cut at one ratio, in ONNX Runtime, beside the dense model."""

    role: str
    ratio: float
    ms: float
    dense_ms: float


@final
@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What `sensitivity` found.

    Attributes:
        score: how units were chosen; `compensation` how the others made up for them.
        samples: calibration samples that the outputs were compared on.
        costs: one for every group and ratio, in execution order.
        times: one for every role and ratio; empty without a clock.
        skipped: group id -> why it could not be looked at.
    """

    score: str
    compensation: str
    samples: int
    costs: tuple[Cost, ...]
    times: tuple[Time, ...]
    skipped: Mapping[str, str]

    def to_json(self) -> dict[str, JSON]:
        """Plain data."""
        data: dict[str, JSON] = asdict(self)
        return {**data, "costs": list(data["costs"]), "times": list(data["times"])}

    @property
    def ratios(self) -> list[float]:
        """The ratios that were looked at, ascending."""
        return sorted({c.ratio for c in self.costs})


def sensitivity(
    program: Program,
    calibration: Iterable[Any],
    *,
    ratios: Sequence[float] = RATIOS,
    score: str = "obs",
    roles: Sequence[str] = (),
    clock: Clock | None = None,
    progress: Progress = lambda done, total: None,
    seed: int = 0,
) -> Sensitivity:
    """Cut every group alone at every ratio, and say what that does to the outputs.

    Args:
        program: the model; it is not changed.
        calibration: batches like its example inputs.
        ratios: parts of the units to remove, each above 0 and below 1.
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
    from graphprune.passes.structural.selection import Selector, select
    from graphprune.passes.structural.statistics import in_execution_order

    check_options(ratios, score, roles)
    removals = _removals(ratios, score)
    batches = list(calibration)
    groups = axis_groups(program)
    chosen = in_execution_order(
        groups, select(program, groups, Selector(tuple(roles) or ROLES)).groups
    )
    names = list(dict.fromkeys(g.role for g in chosen)) if clock else []
    total = len(chosen) * len(removals) + len(names) * len(removals)
    bench = _Bench(program, groups, chosen, batches, seed)
    costs: list[Cost] = []
    skipped: dict[str, str] = {}
    for i, group in enumerate(chosen):
        try:
            for j, cost in enumerate(bench.costs(group, removals)):
                costs.append(cost)
                progress(i * len(removals) + j + 1, total)
        except UnsupportedError as e:
            skipped[group.id] = str(e)
    if not costs:
        raise UnsupportedError(next(iter(skipped.values())))
    times: list[Time] = []
    for role in names:
        for removal in removals:
            assert clock is not None
            cut = {g.id: range(_kept(g, removal)) for g in chosen if g.role == role}
            ms, dense_ms = clock(shrink(program, cut), program)
            times.append(Time(role, removal.ratio, ms, dense_ms))
            progress(len(chosen) * len(removals) + len(times), total)
    method = removals[0].method
    return Sensitivity(score, method, bench.samples, tuple(costs), tuple(times), skipped)


def check_options(ratios: Sequence[float], score: str, roles: Sequence[str]) -> None:
    """Refuse, before a model is loaded, options of `sensitivity` that are valid for no model.

    Raises:
        RecipeError: a ratio, the score or a role is not valid; near matches are named.
    """
    _removals(ratios, score)
    for role in roles:
        if role not in ALL_ROLES:
            raise RecipeError(f"there is no role {role!r}; {suggest(role, ALL_ROLES)}")


def _removals(ratios: Sequence[float], score: str) -> list[Removal]:
    from graphprune.passes.structural.removal import Removal
    from graphprune.passes.structural.selection import Selector

    if not ratios:
        raise RecipeError("sensitivity needs at least one ratio, for instance 0.5")
    found = [Removal(Selector(ROLES), ratio, score) for ratio in sorted(dict.fromkeys(ratios))]
    if found[0].ratio == 0:
        raise RecipeError("a ratio of 0 removes nothing; sensitivity takes ratios above 0")
    return found


def _kept(group: AxisGroup, removal: Removal) -> int:
    from graphprune.passes.structural.allocation import kept_count, removed_count

    return kept_count(removed_count(removal.ratio, group.size), group.size, removal.round_to)


class _Bench:
    """The batches at their way through the dense model, and its outputs to compare with."""

    def __init__(
        self,
        program: Program,
        groups: AxisGroups,
        chosen: Sequence[AxisGroup],
        batches: Sequence[Any],
        seed: int,
    ) -> None:
        self.program = program
        self.groups = groups
        self.chosen = chosen
        self.ctx = Context(calibration=batches, seed=seed)
        self.first_order: Mapping[str, Tensor] = {}
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

    def costs(self, group: AxisGroup, removals: Sequence[Removal]) -> Iterator[Cost]:
        """What each removal does to the outputs when it hits this group alone."""
        for removal, keep, outputs in self._variants(group, removals):
            error = self._error(outputs)
            yield Cost(group.id, group.role, group.size, len(keep), removal.ratio, error)

    def _variants(
        self, group: AxisGroup, removals: Sequence[Removal]
    ) -> Iterator[tuple[Removal, Tensor, list[list[Tensor]]]]:
        from graphprune.passes.structural.statistics import compensate, gather

        if not removals[0].needs_calibration:
            # Without statistics a mask does, also where no product with a weight sums the units.
            for removal in removals:
                keep = self._chosen(group, [], removal)
                masked = mask(self.program, {group.id: keep})
                yield removal, keep, [masked.run(flat) for flat in self.flat]
            return
        parts = gather(self.stream, self.program, self.groups, group, self.ctx)
        orders = self._order(group, parts, removals[-1])
        for removal in removals:
            keep = self._chosen(group, parts, removal, orders)
            changed, _ = compensate(
                self.program, group, parts, keep, removal.method, removal.damping
            )
            yield removal, keep, self.stream.outputs(changed)

    def _order(self, group: AxisGroup, parts: Any, removal: Removal) -> list[int]:
        """Units in the order in which OBS removes them; smaller cuts are its beginnings."""
        from graphprune.passes.structural.statistics import obs_order

        if removal.score != "obs":
            return []
        count = group.size - _kept(group, removal)
        return obs_order(self.program, group, parts, count, removal.damping)[0]

    def _chosen(
        self, group: AxisGroup, parts: Any, removal: Removal, order: Sequence[int] = ()
    ) -> Tensor:
        from graphprune.passes.structural.allocation import best
        from graphprune.passes.structural.scores import score_named
        from graphprune.passes.structural.statistics import DATA_SCORES

        count = _kept(group, removal)
        if removal.score == "obs":
            stays = torch.ones(group.size, dtype=torch.bool)
            stays[list(order[: group.size - count])] = False
            return stays.nonzero().flatten()
        if removal.score == "taylor":
            return best(self._taylor()[group.id], count)
        if removal.score in DATA_SCORES:
            return best(DATA_SCORES[removal.score](self.program, group, parts), count)
        return best(score_named(removal.score)(self.program, group, self.ctx), count)

    def _taylor(self) -> Mapping[str, Tensor]:
        """First-order scores of all groups: one run over the batches gives them together."""
        from graphprune.passes.structural.taylor import taylor_scores

        if not self.first_order:
            self.first_order = taylor_scores(self.program, self.groups, self.chosen, self.ctx)
        return self.first_order

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
            self.stream.rows[batch].of(node, value).flatten().double()
            for node, value in zip(self.results, flat, strict=True)
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim()
        ]
        if not found:
            raise UnsupportedError("the model has no floating-point output to compare")
        return torch.cat(found)
