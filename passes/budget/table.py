"""Table of costs: time, bytes and FLOPs of every level of every item, and what is outside of them.

A branch is measured alone, at each of its levels; its lowest, where it is gone, takes nothing.
Items without a branch of their own are measured in the whole model, and count from their lowest
level. What is left of the whole model is fixed:

    fixed = whole - Σ dense items        cost of a choice = fixed + Σ items at their levels

Branches alone take longer than in the model where other programs empty the caches between them. The
fixed time would be negative then, and a small model's prediction too fast; one factor makes it 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
from torch import Tensor

from graphprune.ir.cost import flops
from graphprune.ir.program import Program
from graphprune.passes.budget.items import Item
from graphprune.passes.budget.sized import FLOAT, WHOLE, Sized, few, name_of, named_models
from graphprune.pipeline.device import Device

RESOURCES = ("ms", "bytes", "flops")
_MOST = 1000.0  # times faster than dense, that is ever predicted


@final
@dataclass(frozen=True, slots=True)
class Table:
    """Costs of levels.

    Attributes:
        amounts: by resource, of each item the levels' costs.
        whole: by resource, of the dense model, quantized where the result will be.
        dense_ms: of the dense float model, which a speed-up is of.
    """

    amounts: Mapping[str, tuple[tuple[float, ...], ...]]
    whole: Mapping[str, float]
    dense_ms: float

    def fixed(self, resource: str) -> float:
        """The cost outside of all items."""
        return self.whole[resource] - sum(row[-1] for row in self.amounts[resource])

    def bounded(self) -> Table:
        """The table whose items take no more time than the whole model, by one factor for all."""
        items = self.whole["ms"] - self.fixed("ms")
        if items <= self.whole["ms"]:
            return self
        return self._scaled("ms", self.whole["ms"] / items)

    def total(self, resource: str, levels: Sequence[int]) -> float:
        """The cost of the model at these levels."""
        rows = self.amounts[resource]
        amount = self.fixed(resource) + sum(row[j] for row, j in zip(rows, levels, strict=True))
        # Savings of items that share weights do not add up; no model takes no time.
        return max(amount, self.whole["ms"] / _MOST) if resource == "ms" else amount

    def least(self, resource: str) -> float:
        """The cost of the model with every item at its cheapest level."""
        return self.fixed(resource) + sum(min(row) for row in self.amounts[resource])

    def corrected(self, levels: Sequence[int], measured: Mapping[str, float]) -> Table:
        """The table by which these levels cost what was measured, by resource.

        One factor corrects all items; the cost of the whole model stays.
        """
        table = self
        for resource, cost in measured.items():
            whole, predicted = self.whole[resource], self.total(resource, levels)
            if predicted < whole:
                table = table._scaled(resource, (whole - cost) / (whole - predicted))
        return table

    def _scaled(self, resource: str, factor: float) -> Table:
        rows = tuple(tuple(factor * x for x in row) for row in self.amounts[resource])
        return replace(self, amounts={**self.amounts, resource: rows})


def measured_table(sized: Sized, device: Device) -> Table:
    """Measure every level of every item.

    Args:
        sized: the program and the items.
        device: measures, or looks up what was measured.
    """
    models, inputs = named_models(sized)
    found = device.measure(models, inputs=inputs)
    alike = {id(model): (model, inputs.get(name)) for name, model in models.items()}
    counted = {key: flops_of(model, given) for key, (model, given) in alike.items()}
    costs = {
        name: {
            "ms": found[name].ms,
            "bytes": float(found[name].bytes),
            "flops": counted[id(model)],
        }
        for name, model in models.items()
    }
    table = Table(
        {
            resource: tuple(_row(item, resource, costs) for item in sized.items)
            for resource in RESOURCES
        },
        costs[WHOLE],
        costs[FLOAT]["ms"],
    )
    return table.bounded()


def flops_of(program: Program, inputs: tuple[Tensor, ...] | None) -> float:
    """FLOPs of the deployed entry on flat inputs; the example's without any."""
    name = program.deployed
    if inputs is not None:
        entries = {**program.entries, name: replace(program.entries[name], example=inputs)}
        program = replace(program, entries=entries)
    return float(flops(program, name))


def _row(item: Item, resource: str, costs: Mapping[str, Mapping[str, float]]) -> tuple[float, ...]:
    """Costs of an item's levels: noise makes none dearer than one with more units."""
    if item.branch is not None:
        row = [
            0.0 if level is None else costs[name_of((item.id, level))][resource]
            for level in item.levels
        ]
    else:
        known = few(item.levels)
        at = [item.levels.index(level) for level in known]
        values = [costs[name_of((item.id, level))][resource] for level in known]
        row = list(np.interp(range(len(item.levels)), at, values) - min(values))
    found = np.asarray(row)
    for zeros in {level.zeros for level in item.levels if level is not None}:
        mine = [j for j, level in enumerate(item.levels) if level is None or level.zeros == zeros]
        found[mine] = np.maximum.accumulate(found[mine])
    return tuple(found.tolist())
