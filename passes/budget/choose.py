"""One run of Budget: table, statistics, search and correction."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch

from graphprune.calibration.gram import Remarks
from graphprune.calibration.stream import HELD_OUT, flat_batch
from graphprune.errors import UnsupportedError
from graphprune.ir.program import Program
from graphprune.passes.budget.blocks import Blocks, block_sites
from graphprune.passes.budget.candidates import (
    Candidates,
    GroupStatistics,
    errors_and_sensitivities,
    statistics,
)
from graphprune.passes.budget.cut import Cutter
from graphprune.passes.budget.items import Level
from graphprune.passes.budget.sized import sized_for
from graphprune.passes.budget.table import RESOURCES, Table, flops_of, measured_table
from graphprune.passes.solvers.knapsack import solve_levels
from graphprune.passes.solvers.output_loss import output_loss
from graphprune.passes.solvers.spdy import Found, Levels, Sensitivities, search
from graphprune.passes.structural.records import Cuts
from graphprune.passes.structural.statistics import in_execution_order
from graphprune.pipeline.base import Context, PassResult
from graphprune.pipeline.device import Cost
from graphprune.report.budget import BudgetReport, Candidate, Choice

if TYPE_CHECKING:
    from graphprune.passes.budget.budget import Budget

log = logging.getLogger(__name__)

CLOSE = 0.02  # a choice whose cost is further from the table's is solved again
ROUNDING = 1e-6  # of a limit: a solver may be over it by so much
CORRECTIONS = 3
OFF = 0.05  # of the milliseconds: a larger difference is a warning
MOST = 64.0  # times faster, that is tried for max_drop
SHOWN = 5  # runners-up in the report
ANSWERS = 2**28  # bytes of the dense model's answers, after which no batch more is searched on
APART = 8  # of so many batches or more, an eighth is searched on, another for the result


@final
@dataclass(frozen=True, slots=True)
class Reached:
    """A model within a budget: what was cut, ids of branches that went, how it was found."""

    program: Program
    cuts: Cuts
    dropped: tuple[str, ...]
    report: BudgetReport


@final
@dataclass(frozen=True, slots=True)
class _Samples:
    """Batches, in a context, to calibrate on, others to search on, others to see the result on."""

    used: Context
    searched: list[Any]
    fresh: list[Any]


@final
class Work:
    """State that all budgets of a model share: its table, its statistics, what was tried.

    Attributes:
        program: the dense one.
        ctx: of the pass.
        dense_ms: of the dense float model, which a speed-up is of.
        warnings: for the report, whatever is asked.
    """

    def __init__(self, options: Budget, program: Program, ctx: Context) -> None:
        self.options, self.program, self.ctx = options, program, ctx
        self.sized = sized_for(options, program, ctx.quantization)
        self.items = self.sized.items
        self.device = ctx.device(options.device, options.threads)
        self.table = measured_table(self.sized, self.device)
        self.dense_ms = self.table.dense_ms
        self.warnings: list[str] = []
        self._begin()

    def _begin(self) -> None:
        """Nothing has been tried for a budget."""
        self.taken: dict[str, float] = {}  # by resource, of the last choice, as measured
        self.checks: list[tuple[float, float]] = []  # times faster, predicted and measured
        self.tried: set[Levels] = set()
        self.corrections = 0
        self.remarks: list[str] = []  # warnings of this budget alone

    def reach(self, asked: Mapping[str, float]) -> PassResult:
        """The result of a budget."""
        if self._within(self._dense, self.limits(asked)):
            return self.unchanged(asked, ["the model is within the budget as it is"])
        return self.result(self.choose(asked))

    def result(self, reached: Reached, more: Sequence[str] = ()) -> PassResult:
        """Make the pass's result of a model."""
        report = {
            **reached.cuts.to_json(),
            "dropped": list(reached.dropped),
            **reached.report.to_json(),
        }
        return PassResult(
            reached.program, True, {**report, **({"tried": list(more)} if more else {})}
        )

    def unchanged(self, asked: Mapping[str, float], notes: Sequence[str]) -> PassResult:
        """Make the pass's result where the model stays as it is."""
        self._begin()
        self.warnings += notes
        report = self._report(asked, self._dense, None, None)
        return PassResult(self.program, False, report.to_json())

    def fastest(self) -> float:
        """The largest speed-up to try, by the table.

        Where layers follow each other without branches, one layer's time is saved by the units of
        both its sides, and counts twice: the table then promises too much.
        """
        return self.dense_ms / max(self.table.least("ms"), self.dense_ms / MOST)

    def choose(self, asked: Mapping[str, float]) -> Reached:
        """Search, measure, correct, and cut.

        Raises:
            UnsupportedError: the budget cannot be reached.
        """
        self._begin()
        self.check_reachable(asked)
        errors, prior = self._prior
        found = self._search(asked, errors, prior, self.options.evaluations)
        while (table := self._checked(asked, found.levels)) and self.corrections < CORRECTIONS:
            self.table = table
            self.corrections += 1
            self.check_reachable(asked)
            found = self._search(
                asked, errors, found.sensitivities, -(-self.options.evaluations // 4)
            )
        self._warn_if_off(asked)
        chosen = [item.levels[j] for item, j in zip(self.items, found.levels, strict=True)]
        used = self._samples.used
        cutter = Cutter(
            self.options, self.program, self.items, self._seen, self.sized.pattern, used
        )
        program, cuts, dropped, warnings = cutter.cut(chosen)
        self.remarks += warnings
        report = self._report(asked, found.levels, found, self._fresh_loss(program))
        return Reached(program, cuts, dropped, report)

    def limits(self, asked: Mapping[str, float]) -> dict[str, float]:
        """The limit of each resource."""
        found: dict[str, float] = {}
        times = [asked["ms"]] if "ms" in asked else []
        if "speedup" in asked:
            times.append(self.dense_ms / asked["speedup"])
        if times:
            found["ms"] = min(times)
        if "size_mb" in asked:
            found["bytes"] = asked["size_mb"] * 1e6
        if "flops" in asked:
            found["flops"] = asked["flops"] * self.table.whole["flops"]
        return found

    def check_reachable(self, asked: Mapping[str, float]) -> None:
        """Refuse, before the search, what cannot be reached.

        Raises:
            UnsupportedError: the least of a resource is above its limit; both are named.
        """
        for resource, limit in self.limits(asked).items():
            least, whole = self.table.least(resource), self.table.whole[resource]
            if least > limit:
                fixed = self.table.fixed(resource)
                raise UnsupportedError(
                    f"{self._text(resource, limit)} cannot be reached: with all gone that may go, "
                    f"{self._text(resource, least)} of {self._text(resource, whole)} are left, of "
                    f"which {self._text(resource, fixed)} are outside of what can be removed "
                    "(tables, norms between branches, heads of the model); ask for less"
                    + ("" if self.options.drop else ", or let branches go with drop=True")
                )
        nothing = [[0.0] * len(item.levels) for item in self.items]
        self._solved(asked, nothing)

    def _text(self, resource: str, amount: float) -> str:
        return amount_text(resource, amount, self.dense_ms)

    @property
    def _dense(self) -> Levels:
        return tuple(item.dense for item in self.items)

    def _within(self, levels: Levels, limits: Mapping[str, float]) -> bool:
        return all(self.table.total(r, levels) <= limit for r, limit in limits.items())

    @cached_property
    def _seen(self) -> dict[str, GroupStatistics]:
        """Statistics of every group, on the dense model."""
        groups = self.sized.groups
        every = [group for item in self.items for group in item.groups]
        few = Remarks()
        found = statistics(
            self.program,
            groups,
            in_execution_order(groups, every),
            self._samples.used,
            self.options.damping,
            few,
        )
        self.warnings += few.warn(log)
        return found

    @cached_property
    def _samples(self) -> _Samples:
        """What to calibrate and to search on, and what to look at the result on."""
        batches = list(self.ctx.batches())
        order = torch.randperm(len(batches), generator=self.ctx.generator).tolist()

        at_most = max(1, len(batches) // APART)
        answers = output_loss(self.program)

        def take() -> list[Any]:
            taken: list[Any] = []
            samples = size = 0
            while order and samples < self.options.samples and size < ANSWERS:
                if len(taken) == at_most and len(batches) >= APART:
                    break
                batch = batches[order.pop()]
                flat = flat_batch(self.program.forward, batch, 0)
                taken.append(batch)
                samples, size = samples + len(flat[0]), size + answers.nbytes(flat)
            return taken

        fresh: list[Any] = []
        if len(batches) >= APART:
            fresh = take()
        else:
            sentence = (
                f"calibration has {len(batches)} batches: with {APART} or more, some are left out "
                "to search on, and some to look at the result"
            )
            if self.options.target == "stream" and len(batches) < HELD_OUT:
                sentence += f"; with {HELD_OUT} or more, the dense model's stream is followed"
            self.warnings.append(sentence)
            log.warning("%s", sentence)
        searched = take()
        used = copy.copy(self.ctx)
        used.calibration = [batches[i] for i in sorted(order)] if fresh else batches
        return _Samples(used, searched, fresh)

    @cached_property
    def _blocks(self) -> Blocks | None:
        pattern, groups = self.sized.pattern, self.sized.groups
        if pattern is None:
            return None
        sites = {i.id: block_sites(groups, i.sparse, pattern) for i in self.items if i.sparse}
        batches = list(self._samples.used.batches())
        return Blocks.collect(self.program, batches, sites, pattern, self.options.damping)

    def _on(self, batches: Sequence[Any]) -> Candidates:
        groups = self.sized.groups
        return Candidates(self.program, groups, self.items, self._seen, batches, self._blocks)

    @cached_property
    def _candidates(self) -> Candidates:
        return self._on(self._samples.searched)

    def _fresh_loss(self, program: Program) -> float | None:
        """The loss of a model on samples that neither calibrated it nor chose it."""
        return self._fresh.difference(program) if self._samples.fresh else None

    @cached_property
    def _fresh(self) -> Candidates:
        return self._on(self._samples.fresh)

    @cached_property
    def _prior(self) -> tuple[list[list[float]], list[float]]:
        return errors_and_sensitivities(self._candidates, self.ctx)

    def _search(
        self,
        asked: Mapping[str, float],
        errors: Sequence[Sequence[float]],
        prior: Sequence[float] | Sensitivities,
        at_most: int,
    ) -> Found:
        seed = int(torch.randint(2**31, (1,), generator=self.ctx.generator))
        found = search(
            lambda sensitivities: self._solved(
                asked,
                [[float(s) * e for e in row] for s, row in zip(sensitivities, errors, strict=True)],
            ),
            self._candidates.loss,
            prior,
            np.random.default_rng(seed),
            at_most,
            lambda done, total: self.ctx.progress(done, total, "models"),
        )
        self.tried |= set(found.losses)
        return found

    def _solved(self, asked: Mapping[str, float], errors: Sequence[Sequence[float]]) -> Levels:
        """The levels of the least error that keep the limits.

        Raises:
            UnsupportedError: there are none.
        """
        limits = self.limits(asked)
        amounts = [self.table.amounts[resource] for resource in limits]
        room = [limit - self.table.fixed(resource) for resource, limit in limits.items()]
        levels = solve_levels(errors, amounts, room)
        if levels is None:
            raise UnsupportedError(
                "these budgets cannot be kept together, though each of them alone can: ask for less"
            )
        return tuple(levels)

    def correct(self, asked: Mapping[str, float]) -> None:
        """Correct the table at levels that keep this budget, with one fraction for all items."""
        limits = self.limits(asked)
        if "ms" in limits and not self._within(self._dense, limits):
            self.table = self._checked(asked, self._alike(limits)) or self.table

    def _alike(self, limits: Mapping[str, float]) -> Levels:
        """The most of every item, by the same fraction, that is within the limits; or the least."""
        for step in range(100, 0, -1):
            levels = tuple(
                next(
                    j
                    for j in item.whole
                    if 100 * _units(item.levels[j]) >= step * _units(item.levels[item.dense])
                )
                for item in self.items
            )
            if self._within(levels, limits):
                return levels
        return levels

    def _checked(self, asked: Mapping[str, float], levels: Levels) -> Table | None:
        """Measure a choice beside the dense model; a corrected table where it is off, else None."""
        limits, dense_ms, program = self.limits(asked), self.dense_ms, self.sized.at(levels)
        predicted = {resource: self.table.total(resource, levels) for resource in RESOURCES}
        self.taken = found = {"flops": flops_of(program, self.sized.inputs(program))}
        if self.device.can_measure:
            cost = self.beside(program)
            found |= {"ms": cost.ms, "bytes": float(cost.bytes)}
            self.checks.append((dense_ms / predicted["ms"], self.dense_ms / cost.ms))
        off = {
            r: found[r]
            for r in found.keys() & limits.keys()
            if abs(found[r] / predicted[r] - 1) > CLOSE
            or (r != "ms" and found[r] > limits[r] * (1 + ROUNDING))
        }
        # The limit itself moves where the dense float model took another time than in the table.
        moved = "ms" in limits and abs(self.limits(asked)["ms"] / limits["ms"] - 1) > CLOSE
        return self.table.corrected(levels, off) if off or moved else None

    def _warn_if_off(self, asked: Mapping[str, float]) -> None:
        for resource, limit in self.limits(asked).items():
            found = self.taken.get(resource, 0.0)
            if found > limit * (1 + (OFF if resource == "ms" else ROUNDING)):
                sentence = (
                    f"{self._text(resource, found)} where {self._text(resource, limit)} were asked "
                    f"for, {found / limit - 1:.2%} more, after {self.corrections} corrections of "
                    "the table: "
                    + ("the machine may be busy" if resource == "ms" else "ask for a little less")
                )
                log.warning("%s", sentence)
                self.remarks.append(sentence)

    def beside(self, program: Program) -> Cost:
        """Measure a smaller model beside the dense one, in milliseconds of the table's run."""
        whole = self.sized.program
        models = {"dense": whole, "chosen": replace(program, quantization=whole.quantization)}
        if whole.quantization is not None:
            models["float"] = self.sized.in_float()
        inputs = {name: self.sized.inputs(model) for name, model in models.items()}
        found = self.device.measure(models, inputs=inputs, fresh=True)
        times = {name: cost.ms for name, cost in found.items()}
        # Ratios of one run: in another the machine has another speed.
        to_table = self.table.whole["ms"] / times["dense"]
        self.dense_ms = times.get("float", times["dense"]) * to_table
        return replace(found["chosen"], ms=times["chosen"] * to_table)

    def _report(
        self,
        asked: Mapping[str, float],
        levels: Levels,
        found: Found | None,
        fresh_loss: float | None,
    ) -> BudgetReport:
        mark = self.sized.program.quantization
        runners_up = [] if found is None else found.ranked(SHOWN + 1)[1:]
        return BudgetReport(
            asked=dict(asked),
            dense_ms=self.dense_ms,
            predicted_ms=self.table.total("ms", levels),
            measured_ms=self.taken.get("ms"),
            dense_mb=self.table.whole["bytes"] / 1e6,
            mb=self.taken.get("bytes", self.table.total("bytes", levels)) / 1e6,
            device=self.device.name,
            threads=self.options.threads,
            batch="x".join(map(str, self.sized.sizes())),
            scheme=None if mark is None else mark.scheme,
            choices=tuple(self._choice(i, j) for i, j in enumerate(levels)),
            runners_up=tuple(
                Candidate(
                    found.losses[other],
                    self.table.total("ms", other),
                    tuple(_units(i.levels[j]) for i, j in zip(self.items, other, strict=True)),
                    tuple(_zeros(i.levels[j]) for i, j in zip(self.items, other, strict=True)),
                )
                for other in runners_up
                if found is not None
            ),
            evaluations=len(self.tried),
            samples=self._candidates.samples if self.tried else 0,
            losses=() if found is None else found.curve,
            fresh_loss=fresh_loss,
            corrections=self.corrections,
            checks=tuple(self.checks),
            warnings=(*self.warnings, *self.remarks),
        )

    def _choice(self, i: int, j: int) -> Choice:
        item, times = self.items[i], self.table.amounts["ms"][i]
        return Choice(
            item.id,
            item.kind,
            _units(item.levels[j]),
            sum(group.size for group in item.groups),
            item.levels[j] is None,
            times[j],
            times[item.dense],
            _zeros(item.levels[j]),
        )


def amount_text(resource: str, amount: float, dense_ms: float) -> str:
    """An amount of a resource in words: "5 ms (3x)"."""
    if resource == "ms":
        return f"{amount:.3g} ms ({dense_ms / max(amount, 1e-9):.3g}x)"
    if resource == "bytes":
        return f"{amount / 1e6:.3g} MB"
    return f"{amount / 1e9:.3g} GFLOPs"


def _units(level: Level) -> int:
    return 0 if level is None else sum(level.units)


def _zeros(level: Level) -> float:
    return 0.0 if level is None else level.zeros
