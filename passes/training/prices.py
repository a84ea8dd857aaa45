"""Prices: what a budget counts in while a model trains, from a table of measured levels.

    cost = outside + Σ price · parameters that live + Σ base of branches that are left

1. What an item costs is a straight line in the units that it keeps (least squares over its levels,
   without the one where it is gone). The line's slope is shared out over the parameters of its
   units: their price, whichever axis they go with. A tensor of several items has the mean.
2. What a branch costs beside its parameters goes only with the whole branch: its base.
3. Once half of what must go is gone, and what is left is within NEAR of the limit, the model is
   measured as it is cut so far; what is left is counted with that factor from then on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import final

import numpy as np
import torch
from torch import Tensor

from graphprune.axes import AxisGroups
from graphprune.axes.branches import Branch
from graphprune.errors import RecipeError, UnsupportedError, VerificationError
from graphprune.ir.program import JSON, Program
from graphprune.passes.budget.budget import Budget
from graphprune.passes.budget.choose import CLOSE, OFF, Work, amount_text
from graphprune.passes.budget.items import Item
from graphprune.passes.budget.sized import Sized, sized_for
from graphprune.passes.budget.table import Table
from graphprune.passes.training.units import Ledger, Sublayer, Units
from graphprune.passes.training.zeros import compare_zeroed
from graphprune.pipeline.base import Context
from graphprune.report.budget import BudgetReport, Choice
from graphprune.rewrite.drop import closed, drop, gated
from graphprune.rewrite.shrink import shrink
from graphprune.training.distributed import Workers
from graphprune.training.loop import required

log = logging.getLogger(__name__)

NEAR = 1.5  # times the limit: near enough to look like the result, with units left to choose from
FURTHEST = 2.0  # a factor beyond it, or its inverse, is a busy machine

OUT_OF_REACH = (
    "the model takes longer than its parts said, and with all gone that may go the budget is out "
    "of reach; ask for less, or let sublayers go with drop=True"
)


@final
@dataclass(frozen=True, slots=True)
class Prices:
    """Prices of a resource.

    Attributes:
        parameter: by tensor, what one of its parameters costs.
        base: by branch, what it costs beside its units' parameters.
    """

    parameter: Mapping[str, float]
    base: Mapping[str, float]


@final
@dataclass(frozen=True, slots=True)
class Account:
    """A budget for a model on a device, in plain numbers, which a checkpoint keeps.

    Attributes:
        resource: what is counted: "ms" or "flops".
        limit: how much of it may be left.
        whole: by resource, what the dense model costs.
        dense_ms: of the dense float model, which a speed-up is of.
        prices: by resource, of milliseconds and of what is counted.
        items: by item, milliseconds of what is dense.
        factor: measured over predicted time, of the model as it was pruned on the way; None before.
    """

    resource: str
    limit: float
    whole: Mapping[str, float]
    dense_ms: float
    prices: Mapping[str, Prices]
    items: Mapping[str, float]
    factor: float | None = None

    def to_tensor(self) -> Tensor:
        """As bytes of JSON, which keeps every bit of a number."""
        return torch.tensor(list(json.dumps(asdict(self)).encode()), dtype=torch.uint8)

    @classmethod
    def of(cls, tensor: Tensor) -> Account:
        """Read it back."""
        data = json.loads(bytes(tensor.tolist()))
        prices = {name: Prices(**part) for name, part in data.pop("prices").items()}
        return cls(**data, prices=prices)


def fitted(table: Table, sized: Sized, resource: str, counts: Mapping[str, int]) -> Prices:
    """Prices by which all that competes costs what the table says.

    Args:
        table: of the sized program.
        resource: "ms" or "flops".
        counts: by tensor, how many of its parameters belong to units that compete.
    """
    rows = list(zip(sized.items, table.amounts[resource], strict=True))
    found: dict[str, list[float]] = {}
    for item, row in rows:
        mine = _parameters(sized.groups, item)
        for name in mine:
            found.setdefault(name, []).append(_slope(item, row) / sum(mine.values()))
    parameter = {name: sum(each) / len(each) for name, each in found.items()}
    base = {}
    for item, row in rows:
        if item.branch is not None:
            names = sorted(item.branch.tensors & counts.keys())
            priced = sum(parameter.get(name, 0.0) * counts[name] for name in names)
            base[item.branch.id] = max(row[-1] - priced, 0.0)
    return Prices(parameter, base)


def _slope(item: Item, row: Sequence[float]) -> float:
    """The cost of all units of an item by the line through its levels."""
    whole = sum(group.size for group in item.groups)
    levels = [
        (sum(level.units) / whole, cost)
        for level, cost in zip(item.levels, row, strict=True)
        if level is not None and whole
    ]
    if len(levels) < 2:
        return 0.0
    kept, costs = np.array(levels).T
    slope = max(float(np.polyfit(kept, costs, 1)[0]), 0.0)
    return slope if item.branch is None else min(slope, row[-1])


def _parameters(groups: AxisGroups, item: Item) -> dict[str, int]:
    """By tensor, how many parameters belong to units of an item."""
    left: dict[str, list[Tensor]] = {}
    for group in item.groups:
        for place in group.occurrences:
            if place.tensor in groups.program.parameters:
                shape = groups.program.tensors[place.tensor].shape
                dims = left.setdefault(
                    place.tensor, [torch.ones(size, dtype=torch.bool) for size in shape]
                )
                dims[place.dim] &= groups.units(group, place.tensor, place.dim) < 0
    rest = {name: np.prod([int(dim.sum()) for dim in dims]) for name, dims in left.items()}
    return {name: groups.program.tensors[name].numel() - int(n) for name, n in rest.items()}


@final
class Budgeted:
    """A budget while a model trains: the account, the sublayers that may go, the report.

    The first of several processes measures, and all count with its numbers.

    Raises:
        UnsupportedError: the budget cannot be reached; the least that can be left is named.

    Attributes:
        account: replaced by the one of a checkpoint that is resumed.
        skipped: by branch, why it stays.
    """

    def __init__(
        self, options: Budget, program: Program, units: Sequence[Units], ctx: Context
    ) -> None:
        self.options, self.program, self.units, self.ctx = options, program, units, ctx
        self._workers = Workers(required(ctx.training, ctx).device)
        self.skipped: dict[str, str] = {}
        self._sized = sized_for(options, program, ctx.quantization)
        self._branches = self._droppable()
        self._work: Work | None = None
        self.account = self._begun = self._workers.run_on_main(self._measured)
        self._check_reachable()

    def _droppable(self) -> list[Branch]:
        """Branches that may go, and give zero once their tensors are."""
        found = [i.branch for i in self._sized.items if i.branch and i.levels[0] is None]
        plain = [Sublayer(branch.id, branch.tensors, 0.0) for branch in found]
        ledger = Ledger(self.program, self.units, {}, plain)
        scored = [b for b, s in zip(found, plain, strict=True) if ledger.counted(s)]
        self.skipped |= {
            b.id: "no unit of it competes, so that it has no score"
            for b in found
            if b not in scored
        }
        if not scored or self._gives_zero(scored):
            return scored
        alone = [branch for branch in scored if self._gives_zero([branch])]
        self.skipped |= {
            b.id: "it gives something even when all its weights are zero"
            for b in scored
            if b not in alone
        }
        return alone

    def _gives_zero(self, found: Sequence[Branch]) -> bool:
        names = sorted(frozenset[str]().union(*(branch.tensors for branch in found)))
        tensors = self.program.tensors
        dead = self.program.with_tensors({n: torch.zeros_like(tensors[n]) for n in names})
        gates_open, gates = gated(self.program, found)
        try:
            compare_zeroed(dead, closed(gates_open, gates.values()))
        except VerificationError:
            return False
        return True

    def _measured(self) -> Account:
        work = self._work = Work(self.options, self.program, self.ctx)
        # What training reaches is not known yet; the prices hold for models of about that size.
        work.correct(self.options.asked)
        ((resource, limit),) = work.limits(self.options.asked).items()
        counts = Ledger(self.program, self.units).counts
        return Account(
            resource,
            limit,
            work.table.whole,
            work.dense_ms,
            {r: fitted(work.table, work.sized, r, counts) for r in dict.fromkeys([resource, "ms"])},
            {
                item.id: row[-1]
                for item, row in zip(work.items, work.table.amounts["ms"], strict=True)
            },
        )

    def _check_reachable(self) -> None:
        """Refuse, before training, what cannot be reached."""
        account, ledger = self.account, self.ledger().drain()
        ledger.load({}, list(ledger.sublayers))
        whole = account.whole[account.resource]
        least = whole - ledger.removed
        if ledger.removed < ledger.limit:
            limit, left, dense = (
                amount_text(account.resource, amount, account.dense_ms)
                for amount in (account.limit, least, whole)
            )
            raise UnsupportedError(
                f"{limit} cannot be reached: with all gone that may go while training, {left} of "
                f"{dense} are left; ask for less"
                + ("" if self.options.drop else ", or let sublayers go with drop=True")
            )

    def due(self, ledger: Ledger) -> bool:
        """Whether it is time to measure the model as pruned so far."""
        account = self.account
        if account.resource != "ms" or account.factor is not None:
            return False
        left = account.whole["ms"] - ledger.removed
        return 2 * ledger.removed >= ledger.limit > 0 and left <= NEAR * account.limit

    def corrected(self, ledger: Ledger) -> Ledger:
        """Measure the model as pruned so far; a ledger with the same units gone, and a new limit.

        Where that is out of reach, the limit is all that may go.
        """
        factor = self._workers.run_on_main(lambda: self._factor(ledger))
        self.account = replace(self.account, factor=factor)
        if self._beyond():
            log.warning("%s", OUT_OF_REACH)
        found = self.ledger()
        found.load(ledger.gone, ledger.dropped)
        return found

    def _factor(self, ledger: Ledger) -> float:
        """Measured over predicted, both of this run: a checkpoint's prices are another one's."""
        assert self._work is not None
        if not self._work.device.can_measure:
            return 1.0
        here = self._ledger_of(self._begun)
        here.load(ledger.gone, ledger.dropped)
        keep, program = ledger.keep(), self.program
        if keep:
            program = shrink(program, keep)
        gone = [branch for branch in self._branches if branch.id in ledger.dropped]
        if gone:
            program = drop(program, gone)
        measured = self._work.beside(program).ms
        predicted = self._begun.whole["ms"] - here.removed
        if predicted * FURTHEST <= measured:  # prices may even add up to more than the whole
            return FURTHEST
        found = max(measured / predicted, 1 / FURTHEST)
        return 1.0 if abs(found - 1) <= CLOSE else found

    def _beyond(self) -> bool:
        """Whether the limit is out of reach by what was measured on the way."""
        account = self.account
        if account.factor is None:
            return False
        least = self.ledger().drain()
        least.load({}, list(least.sublayers))
        return account.whole["ms"] - least.removed > account.limit / account.factor

    def ledger(self, resource: str | None = None) -> Ledger:
        """A new ledger that counts in the account's resource, or another one of it."""
        return self._ledger_of(self.account, resource)

    def _ledger_of(self, account: Account, resource: str | None = None) -> Ledger:
        prices = account.prices[resource or account.resource]
        found = [Sublayer(b.id, b.tensors, prices.base[b.id]) for b in self._branches]
        ledger, least = (
            Ledger(self.program, self.units, prices.parameter, found) for _ in range(2)
        )
        limit = account.limit / (account.factor or 1.0)
        ledger.limit = max(account.whole[account.resource] - limit, 0.0)
        ledger.must = least.drain().required(ledger.limit)
        if account.factor is not None:
            least.load({}, list(least.sublayers))
            ledger.limit = min(ledger.limit, least.removed)
        return ledger

    def report(self, result: Program, ledger: Ledger) -> dict[str, JSON]:
        """Report what was asked, predicted and measured, as a run of Budget does.

        Args:
            result: the trained program.
            ledger: of what is gone.
        """
        return self._workers.run_on_main(lambda: self._report(result, ledger).to_json())

    def _report(self, result: Program, ledger: Ledger) -> BudgetReport:
        assert self._work is not None
        work, account = self._work, self.account
        times = self.ledger("ms")
        times.load(ledger.gone, ledger.dropped)
        predicted = (account.whole["ms"] - times.removed) * (account.factor or 1.0)
        cost = work.beside(result) if work.device.can_measure else None
        # The account of a checkpoint is in milliseconds of another run.
        scale = account.whole["ms"] / work.table.whole["ms"]
        measured = None if cost is None else cost.ms * scale
        limit = work.limits(self.options.asked).get("ms", 0.0) * scale
        dense_bytes = account.whole["bytes"]
        shrunk = dense_bytes * result.nbytes() / self.program.nbytes()
        warnings = []
        if account.limit >= account.whole[account.resource]:
            warnings.append("the model is within the budget as it is")
        elif limit and measured and abs(measured / limit - 1) > OFF:
            advice = (
                "train again with a budget that is corrected by that ratio, or measure again if "
                "the machine was busy"
            )
            warnings.append(
                f"measured {measured:.3g} ms where {limit:.3g} were asked for and {predicted:.3g} "
                f"predicted: {OUT_OF_REACH if self._beyond() else advice}"
            )
            log.warning("%s", warnings[-1])
        return BudgetReport(
            asked=dict(self.options.asked),
            dense_ms=work.dense_ms * scale,
            predicted_ms=predicted,
            measured_ms=measured,
            dense_mb=dense_bytes / 1e6,
            mb=(shrunk if cost is None else cost.bytes) / 1e6,
            device=work.device.name,
            threads=self.options.threads,
            batch="x".join(map(str, self._sized.sizes())),
            scheme=None if self.ctx.quantization is None else self.ctx.quantization.scheme,
            choices=tuple(
                self._choice(item, times, account.factor or 1.0) for item in self._sized.items
            ),
            warnings=tuple(warnings),
        )

    def _choice(self, item: Item, times: Ledger, factor: float) -> Choice:
        dense = self.account.items[item.id]
        dropped = item.id in times.dropped
        left = {unit.id: times.left(unit) for unit in times.units.values()}
        tensors = {name for group in item.groups for name in group.tensors}
        return Choice(
            item.id,
            item.kind,
            0 if dropped else sum(left.get(group.id, group.size) for group in item.groups),
            sum(group.size for group in item.groups),
            dropped,
            0.0 if dropped else factor * max(dense - times.lost(sorted(tensors)), 0.0),
            dense,
        )


def check_budget(budget: object) -> None:
    """Raise RecipeError for what is no budget that training can keep."""
    if not isinstance(budget, Budget):
        raise RecipeError(f"budget is a Budget, such as Budget(speedup=3), got {budget!r}")
    asked = budget.asked
    if other := sorted(asked.keys() - {"speedup", "ms", "flops"}):
        raise RecipeError(
            f"a budget to train to is speedup, ms or flops, and {other[0]} is not: leave it out, "
            "or use the pass budget itself"
        )
    if budget.blocks:
        raise RecipeError(
            "a budget to train to removes structure alone: leave blocks out, and zero blocks after "
            f"it, such as GradualMagnitude(0.5, pattern={budget.blocks!r})"
        )
    if "flops" in asked and len(asked) > 1:
        raise RecipeError(
            "a budget to train to counts in time or in FLOPs: give flops alone, or leave it out"
        )
