"""One run of Budget: table, statistics, search, correction, and the cut itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch

from graphprune.axes import axis_groups, frozen_parameters
from graphprune.axes.branches import branches
from graphprune.calibration.gram import Remarks
from graphprune.calibration.stream import flat_batch
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.ir.program import Program
from graphprune.ir.quantization import Mark
from graphprune.passes.budget.blocks import Blocks, block_sites
from graphprune.passes.budget.candidates import (
    Candidates,
    GroupStatistics,
    errors_and_sensitivities,
    statistics,
)
from graphprune.passes.budget.items import Level, find_items
from graphprune.passes.budget.table import Sized, measured_table, zeros_by_tensor
from graphprune.passes.name_patterns import TensorNames
from graphprune.passes.solvers.knapsack import solve_levels
from graphprune.passes.solvers.spdy import Found, Levels, Sensitivities, search
from graphprune.passes.sparsity.allocation import Share
from graphprune.passes.sparsity.sparsegpt import SparseGPT
from graphprune.passes.sparsity.sparsity_pattern import parse_pattern
from graphprune.passes.sparsity.zeroing import with_zeroed
from graphprune.passes.structural.allocation import others
from graphprune.passes.structural.records import Cuts, group_cuts
from graphprune.passes.structural.scores import score_named
from graphprune.passes.structural.selection import Selector, select
from graphprune.passes.structural.sequential import StreamTarget, cut_groups
from graphprune.passes.structural.statistics import in_execution_order
from graphprune.pipeline.base import Context, PassResult
from graphprune.pipeline.device import Cost
from graphprune.pipeline.events import JSON
from graphprune.report.budget import BudgetReport, Candidate, Choice

if TYPE_CHECKING:
    from graphprune.passes.budget.budget import Budget

log = logging.getLogger(__name__)

ROLES = ("head", "kv_group", "neuron")
CLOSE = 0.02  # a choice whose time is further from the table's is solved again
CORRECTIONS = 3
OFF = 0.05  # of the budget: a larger difference is a warning
MOST = 64.0  # times faster, that is tried for max_drop
SHOWN = 5  # runners-up in the report


@final
@dataclass(frozen=True, slots=True)
class Reached:
    """A model within a budget: what was cut, ids of branches that went, how it was found."""

    program: Program
    cuts: Cuts
    dropped: tuple[str, ...]
    report: BudgetReport


@final
class Work:
    """State that all budgets of a model share: its table, its statistics, what was tried.

    Attributes:
        program: the dense one.
        ctx: of the pass.
        dense_ms: of the dense float model, which a speed-up is of.
        warnings: for the report.
    """

    def __init__(self, options: Budget, program: Program, ctx: Context) -> None:
        self.options, self.program, self.ctx = options, program, ctx
        self.sized = sized_for(options, program, ctx.quantization)
        self.items = self.sized.items
        self.device = ctx.device(options.device, options.threads)
        self.table = measured_table(self.sized, self.device)
        self.dense_ms = self.table.dense_ms
        self.warnings: list[str] = []
        self.corrections = 0
        self.measured: float | None = None

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
        self.corrections, self.measured = 0, None
        self.check_reachable(asked)
        errors, prior = self._prior
        found = self._search(asked, errors, prior, self.options.evaluations)
        while not self._close(asked, found.levels) and self.corrections < CORRECTIONS:
            self.corrections += 1
            self.check_reachable(asked)
            found = self._search(
                asked, errors, found.sensitivities, -(-self.options.evaluations // 4)
            )
        self._warn_if_off(asked)
        program, cuts, dropped = self._cut(found.levels)
        report = self._report(asked, found.levels, found, self._fresh.difference(program))
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
            self.ctx,
            self.options.damping,
            few,
        )
        self.warnings += few.warn(log)
        return found

    @cached_property
    def _samples(self) -> tuple[list[Any], list[Any]]:
        """Batches to search on, and others to look at what was found."""
        batches = list(self.ctx.batches())
        order = torch.randperm(len(batches), generator=self.ctx.generator).tolist()
        halves: list[list[Any]] = []
        for _ in range(2):
            taken, samples = [], 0
            while order and samples < self.options.samples:
                taken.append(batches[order.pop()])
                samples += len(flat_batch(self.program.forward, taken[-1], 0)[0])
            halves.append(taken)
        some, fresh = halves
        if not fresh:
            sentence = (
                "calibration has no samples that the search did not see, so its loss is not "
                "checked on fresh ones; give more batches"
            )
            log.warning("%s", sentence)
            self.warnings.append(sentence)
        return some, fresh or some

    @cached_property
    def _blocks(self) -> Blocks | None:
        pattern, groups = self.sized.pattern, self.sized.groups
        if pattern is None:
            return None
        sites = {i.id: block_sites(groups, i.sparse, pattern) for i in self.items if i.sparse}
        batches = list(self.ctx.batches())
        return Blocks.collect(self.program, batches, sites, pattern, self.options.damping)

    def _on(self, batches: Sequence[Any]) -> Candidates:
        groups = self.sized.groups
        return Candidates(self.program, groups, self.items, self._seen, batches, self._blocks)

    @cached_property
    def _candidates(self) -> Candidates:
        return self._on(self._samples[0])

    @cached_property
    def _fresh(self) -> Candidates:
        return self._on(self._samples[1])

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
        limits = self.limits(asked)
        amounts = [self.table.amounts[resource] for resource in limits]
        room = [limit - self.table.fixed(resource) for resource, limit in limits.items()]

        def solve(sensitivities: Sensitivities) -> Levels:
            weighted = [
                [float(s) * e for e in row] for s, row in zip(sensitivities, errors, strict=True)
            ]
            levels = solve_levels(weighted, amounts, room)
            if levels is None:
                raise UnsupportedError(
                    "these budgets cannot be kept together, though each of them alone can: ask "
                    "for less"
                )
            return tuple(levels)

        seed = int(torch.randint(2**31, (1,), generator=self.ctx.generator))
        return search(
            solve,
            self._candidates.loss,
            prior,
            np.random.default_rng(seed),
            at_most,
            lambda done, total: self.ctx.progress(done, total, "models"),
        )

    def correct(self, asked: Mapping[str, float]) -> None:
        """Correct the table at levels that keep this budget, with one fraction for all items."""
        limits = self.limits(asked)
        if "ms" in limits and not self._within(self._dense, limits):
            self._close(asked, self._alike(limits))

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

    def _close(self, asked: Mapping[str, float], levels: Levels) -> bool:
        """Measure a choice beside the dense model; correct the table where it is off."""
        if not self.device.can_measure:
            return True
        limits = self.limits(asked)
        self.measured = self.beside(self.sized.at(levels)).ms
        predicted = self.table.total("ms", levels)
        if abs(self.measured / predicted - 1) > CLOSE:
            self.table = self.table.corrected(levels, self.measured)
        elif "ms" not in limits or abs(self.limits(asked)["ms"] / limits["ms"] - 1) <= CLOSE:
            return True
        # FLOPs and bytes alone are no matter of time.
        return "ms" not in limits

    def _warn_if_off(self, asked: Mapping[str, float]) -> None:
        limit = self.limits(asked).get("ms")
        if limit and self.measured and self.measured > limit * (1 + OFF):
            sentence = (
                f"measured {self.measured:.3g} ms where {limit:.3g} were asked for, after "
                f"{self.corrections} corrections of the table: the machine may be busy"
            )
            log.warning("%s", sentence)
            self.warnings.append(sentence)

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

    def _cut(self, levels: Levels) -> tuple[Program, Cuts, tuple[str, ...]]:
        """Remove branches, then cut groups one after another on what the others give."""
        chosen = [item.levels[j] for item, j in zip(self.items, levels, strict=True)]
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
        fitted = [groups[name] for name in counts if self._seen[name].weights]
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
            order = torch.tensor(self._seen[name].order, dtype=torch.int64)
            keep[name] = others(groups[name].size, order[: groups[name].size - counts[name]])
        smaller = program
        if keep:
            smaller, verification = self.ctx.shrink(program, keep, done.program)
            verifications.append(verification)
        smaller = self._zeroed(smaller, zeros_by_tensor(self.items, chosen))
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
        return smaller, cuts, tuple(branch.id for branch in gone)

    def _zeroed(self, program: Program, zeros: Mapping[str, float]) -> Program:
        """Zero blocks, each product on what the ones before it give, and fit what stays."""
        pattern = self.sized.pattern
        if not zeros or pattern is None:
            return program
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
        self.warnings += [sentence, *done.remarks.warn(log)]
        return with_zeroed(done.program, sites)

    def _counts(self, chosen: Sequence[Level]) -> dict[str, int]:
        """Group id -> units that stay, of the groups that lose some."""
        return {
            group.id: kept
            for item, level in zip(self.items, chosen, strict=True)
            if level is not None
            for group, kept in zip(item.groups, level.units, strict=True)
            if kept < group.size
        }

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
            measured_ms=self.measured,
            dense_mb=self.table.whole["bytes"] / 1e6,
            mb=self.table.total("bytes", levels) / 1e6,
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
            evaluations=0 if found is None else len(found.losses),
            losses=() if found is None else found.curve,
            fresh_loss=fresh_loss,
            corrections=self.corrections,
            warnings=tuple(self.warnings),
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


def sized_for(options: Budget, program: Program, mark: Mark | None) -> Sized:
    """The program at the sizes that count, with what there is to choose.

    Args:
        options: of the pass.
        program: the dense one.
        mark: how the result will be quantized.

    Raises:
        RecipeError: there are zero blocks to choose, and it will not be quantized for them.
    """
    groups, found = axis_groups(program), branches(program)
    usable = select(program, groups, Selector(ROLES, (), options.targets, options.ignore)).groups
    names = TensorNames(program)

    def reached(tensors: frozenset[str], patterns: tuple[str, ...]) -> bool:
        return any(names.match(tensor, patterns) for tensor in tensors)

    mine = [
        branch
        for branch in found
        if branch.tensors
        and not reached(branch.tensors, options.ignore)
        and (not options.targets or reached(branch.tensors, options.targets))
    ]
    droppable = {branch.id for branch in mine} if options.drop else set()
    if program.entries[program.deployed].cache:
        # A cache of no layers is none.
        droppable -= {next((b.id for b in found if b.kind == "attention"), "")}
    pattern, sparse = None, {}
    if options.blocks:
        if mark is None or mark.scheme != "int8-dynamic":
            raise RecipeError(
                "zero blocks are skipped in int8: put Quantize('int8-dynamic') after the budget, "
                "on the command line --quantize int8-dynamic, or leave blocks out"
            )
        pattern = parse_pattern(options.blocks)
        for branch in mine:
            sites = block_sites(groups, branch.tensors, pattern)
            sparse[branch.id] = [site.tensor for site in sites if mark.takes(site.tensor)]
        mark = replace(mark, blocks=options.blocks)
    items = find_items(
        groups, usable, mine, droppable=droppable, round_to=options.round_to, sparse=sparse
    )
    return Sized(replace(program, quantization=mark), groups, items, options.batch, pattern)


def _units(level: Level) -> int:
    return 0 if level is None else sum(level.units)


def _zeros(level: Level) -> float:
    return 0.0 if level is None else level.zeros


def _joined(verifications: Sequence[Mapping[str, JSON]]) -> dict[str, JSON] | None:
    """One report of several verifications: the last, with the largest error of all.

    None without any: zero blocks alone rewrite no graph.
    """
    if not verifications:
        return None
    errors = [v["max_error"] for v in verifications if "max_error" in v]
    return {**verifications[-1], **({"max_error": max(errors)} if errors else {})}
