"""A budget while a model trains: prices, sublayers that go, and what is reported."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphprune.axes import axis_groups
from graphprune.axes.branches import branches
from graphprune.capture.capture import capture
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.ir.cost import flops
from graphprune.ir.program import Program
from graphprune.passes import Budget, GradualStructure, PruneHeads
from graphprune.passes.budget.choose import Work
from graphprune.passes.training import gradual_structure
from graphprune.passes.training.prices import Account, Prices, fitted
from graphprune.passes.training.units import Ledger, Sublayer, Units, find_units
from graphprune.pipeline.base import Context
from graphprune.pipeline.device import Cost
from graphprune.pipeline.pipeline import Pipeline
from graphprune.pipeline.recipe import dump, loads
from graphprune.report.budget import BudgetReport
from graphprune.training.loop import Fitted
from graphprune.training.losses import logits_of
from graphprune.training.spec import Training

Captured = Callable[[str], Program]


@dataclass
class Machine:
    """A device whose milliseconds are FLOPs, and so many more for each of some branches."""

    extra: Mapping[str, float] = field(default_factory=dict)
    slower: float = 1.0  # the result, than its parts say
    name: str = "a machine"
    threads: int = 1
    can_measure: bool = True

    def measure(
        self,
        models: Mapping[str, Program],
        *,
        inputs: Mapping[str, Sequence[Tensor]] | None = None,
        fresh: bool = False,
    ) -> dict[str, Cost]:
        return {name: self._cost(name, program) for name, program in models.items()}

    def _cost(self, name: str, program: Program) -> Cost:
        ms = flops(program, program.deployed) / 1e6
        ms *= self.slower if name == "chosen" else 1.0
        branch = name.partition(" at ")[0]
        if branch in self.extra:  # branches that are built alike are one program
            ms += self.extra[branch]
        elif not branch.startswith("encoder."):
            ms += sum(
                ms for b, ms in self.extra.items() if f"{b}.output.dense.weight" in program.tensors
            )
        return Cost(ms, program.nbytes(), ms, ms)


def data(program: Program, count: int = 4) -> list[dict[str, Tensor]]:
    batch = dict(zip(program.forward.input_names, program.forward.example, strict=True))
    first = program.forward.input_names[0]
    return [{**batch, first: batch[first].roll(i, -1)} for i in range(count)]


def squares(outputs: Any, batch: Any) -> Tensor:
    return logits_of(outputs).square().mean()


def context(
    program: Program, machine: Machine | None = None, batches: Any = None, **options: Any
) -> Context:
    return Context(
        training=Training(batches or data(program), loss=squares, **options),
        devices=lambda file, threads, progress: machine or Machine(),
    )


def step(budget: Budget, **options: Any) -> GradualStructure:
    plain = {"epochs": 3, "lr": 1e-3, "begin": 0.0, "end": 0.5, "distill": False}
    return GradualStructure(budget=budget, **{**plain, **options})


def run(
    program: Program, wanted: GradualStructure, ctx: Context
) -> tuple[Program, BudgetReport, dict[str, Any]]:
    result = Pipeline([wanted]).run(program, ctx)
    details = dict(result.results[0].report)
    json.dumps(details)
    report = BudgetReport.of(details)
    assert report is not None
    return result.program, report, details


def units_of(program: Program) -> list[Units]:
    groups = axis_groups(program)
    found = [find_units(groups, group) for group in groups.with_role("head", "neuron", "qk_dim")]
    return [unit for unit in found if isinstance(unit, Units)]


# --- prices --------------------------------------------------------------------------------------


def test_prices_add_up_to_the_table(captured: Captured) -> None:
    program = captured("tiny-bert")
    extra = {"encoder.layer.1.attention": 0.3}
    work = Work(Budget(speedup=2), program, context(program, Machine(extra)))
    units = units_of(program)
    counts = Ledger(program, units).counts
    prices = fitted(work.table, work.sized, "ms", counts)
    rows = dict(zip(work.items, work.table.amounts["ms"], strict=True))
    found = [Sublayer(i.id, i.branch.tensors, prices.base[i.id]) for i in work.items if i.branch]
    for item, row in rows.items():
        assert item.branch is not None
        mine = sorted(item.branch.tensors & counts.keys())
        # At every level, not only where all is there: FLOPs are straight lines.
        for level, cost in zip(item.levels[1:], row[1:], strict=True):
            assert level is not None
            part = sum(level.units) / sum(group.size for group in item.groups)
            line = prices.base[item.id] + part * sum(
                prices.parameter[name] * counts[name] for name in mine
            )
            assert line == pytest.approx(cost, rel=1e-6)
    bases = [prices.base[i.id] for i in work.items if i.kind == "attention"]
    assert bases[1] - bases[0] == pytest.approx(0.3)
    ledger = Ledger(program, units, prices.parameter, found)
    assert ledger.total == pytest.approx(sum(row[-1] for row in rows.values()))
    ledger.load({}, list(ledger.sublayers))
    assert ledger.removed == pytest.approx(ledger.total)
    again = Ledger(program, units, prices.parameter, found).drain()
    again.load({}, list(ledger.sublayers)[::-1])
    assert again.removed == ledger.removed


def test_a_matrix_between_two_layers_has_one_price(captured: Captured) -> None:
    """Without branches either side saves it: by FLOPs every matrix costs the same a parameter."""
    program = captured("tiny-mlp")
    work = Work(Budget(flops=0.5), program, context(program))
    counts = Ledger(program, units_of(program)).counts
    prices = fitted(work.table, work.sized, "flops", counts).parameter
    (each,) = {round(prices[name]) for name in counts if name.endswith("weight")}
    assert each > 0


def test_an_account_is_kept_to_the_last_bit() -> None:
    account = Account(
        "ms", 1 / 3, {"ms": 0.1}, 0.7, {"ms": Prices({"a": 1e-9 / 3}, {"b": 2 / 7})}, {"b": 0.1}
    )
    assert Account.of(account.to_tensor()) == account
    measured = replace(account, factor=8 / 9)
    assert Account.of(measured.to_tensor()) == measured


# --- what is asked is met ------------------------------------------------------------------------


@pytest.mark.parametrize("roles", [("head", "neuron"), gradual_structure.TRAINED_ROLES])
def test_the_budget_is_met(roles: tuple[str, ...], captured: Captured) -> None:
    program = captured("tiny-bert")
    result, report, details = run(program, step(Budget(speedup=1.7), roles=roles), context(program))
    limit = report.dense_ms / 1.7
    assert report.predicted_ms <= limit * (1 + 1e-6)
    # A bias has the price of a weight: with dims alone gone, a little more than it costs.
    assert report.predicted_ms == pytest.approx(report.measured_ms, rel=1e-2)
    assert report.predicted_ms > 0.9 * limit
    assert report.asked == {"speedup": 1.7}
    assert not report.warnings
    assert report.mb == pytest.approx(result.nbytes() / 1e6)
    kept = {g["id"]: g["after"] for g in details["groups"]}
    sizes = {g.id: g.size for g in axis_groups(result)}
    # An axis with one unit left is none.
    assert all(sizes.get(name, 1) == count for name, count in kept.items() if count)
    assert sum(c.ms for c in report.choices) == pytest.approx(
        report.predicted_ms - report.dense_ms + sum(c.dense_ms for c in report.choices), rel=1e-3
    )


def test_flops_are_met_too(captured: Captured) -> None:
    program = captured("tiny-bert")
    result, report, _ = run(program, step(Budget(flops=0.5), epochs=1, end=0), context(program))
    assert flops(result) == pytest.approx(0.5 * flops(program), rel=1e-2)
    assert report.predicted_ms == pytest.approx(flops(result) / 1e6, rel=1e-2)


def test_prices_are_corrected_before_training(captured: Captured) -> None:
    class Fast(Machine):
        """Branches alone seem to take less than inside of the model."""

        def _cost(self, name: str, program: Program) -> Cost:
            cost = Machine._cost(self, name, program)
            return replace(cost, ms=cost.ms * 0.7) if " at " in name else cost

    program = captured("tiny-bert")
    ctx = context(program, Fast())
    _, report, _ = run(program, step(Budget(speedup=1.7), roles=("head", "neuron")), ctx)
    assert report.measured_ms == pytest.approx(report.dense_ms / 1.7, rel=0.05)
    assert not report.warnings


@dataclass
class Changing(Machine):
    """Takes so many times what its parts say, from the second look at a smaller model on."""

    then: float = 1.2
    looks: int = 0

    def measure(self, models: Mapping[str, Program], **options: Any) -> dict[str, Cost]:
        found = Machine.measure(self, models, **options)
        if "chosen" in models:
            self.looks += 1
            self.slower = self.then
        return found


@pytest.mark.parametrize("then", [0.85, 1.15])
def test_prices_are_corrected_on_the_way(then: float, captured: Captured) -> None:
    program = captured("tiny-bert")
    machine = Changing({DEAR: 0.5 * flops(program) / 1e6}, then=then)
    wanted = step(Budget(speedup=3), roles=("head", "neuron"))
    _, report, details = run(program, wanted, context(program, machine))
    assert machine.looks == 3  # before, on the way, at the end
    assert details["factor"] == pytest.approx(then)
    assert details["dropped"] == [DEAR]
    assert report.measured_ms == pytest.approx(report.dense_ms / 3, rel=0.04)
    assert report.predicted_ms == pytest.approx(report.measured_ms, rel=0.01)
    assert not report.warnings


def test_the_least_there_is_is_reached(captured: Captured) -> None:
    """What is measured on the way may put the budget out of reach."""
    program = captured("tiny-bert")
    wanted = step(Budget(speedup=5, drop=False), roles=("head", "neuron"))
    _, report, details = run(program, wanted, context(program, Changing(then=1.9)))
    assert all(choice.level == 1 for choice in report.choices)
    assert details["factor"] == pytest.approx(1.9, rel=0.01)
    assert report.predicted_ms == pytest.approx(report.measured_ms, rel=0.05)
    (warning,) = report.warnings
    assert "with all gone that may go the budget is out of reach" in warning


@pytest.mark.parametrize(("then", "factor"), [(9.0, 2.0), (0.1, 0.5)])
def test_a_busy_machine_does_not_undo_the_prices(
    then: float, factor: float, captured: Captured
) -> None:
    program = captured("tiny-bert")
    wanted = step(Budget(speedup=1.5), roles=("head", "neuron"))
    _, _, details = run(program, wanted, context(program, Changing(then=then)))
    assert details["factor"] == factor


def test_a_model_that_was_cut_was_not_within_the_budget(captured: Captured) -> None:
    program = captured("tiny-bert")
    wanted = step(Budget(speedup=1.2), roles=("head", "neuron"))
    _, report, details = run(program, wanted, context(program, Changing(then=0.6)))
    assert details["factor"] == pytest.approx(0.6)  # 1.2 times it is less than the dense model's
    (warning,) = report.warnings
    assert "train again with a budget" in warning


def test_what_is_off_is_said(captured: Captured) -> None:
    program = captured("tiny-bert")
    ctx = context(program, Changing())
    _, report, _ = run(program, step(Budget(speedup=1.5), epochs=1, end=0), ctx)
    assert report.measured_ms == pytest.approx(1.2 * report.predicted_ms, rel=1e-3)
    (warning,) = report.warnings
    assert "train again with a budget" in warning


def test_a_model_within_the_budget_only_trains(captured: Captured) -> None:
    program = captured("tiny-bert")
    result, report, details = run(program, step(Budget(ms=1e6), epochs=1), context(program))
    assert result.num_parameters() == program.num_parameters()
    assert report.warnings == ("the model is within the budget as it is",)
    assert details["dropped"] == []


# --- sublayers -----------------------------------------------------------------------------------

DEAR = "encoder.layer.1.attention"


def test_a_branch_that_costs_much_for_itself_goes_first(captured: Captured) -> None:
    program = captured("tiny-bert")
    dense = flops(program) / 1e6
    machine = Machine({DEAR: 0.5 * dense})
    result, report, details = run(program, step(Budget(speedup=3)), context(program, machine))
    assert details["dropped"] == [DEAR]
    assert report.measured_ms == pytest.approx(report.predicted_ms, rel=1e-2)
    assert [c.id for c in report.choices if c.dropped] == [DEAR]
    (gone,) = (branch for branch in branches(program) if branch.id == DEAR)
    assert result.tensors.keys() == program.tensors.keys() - gone.tensors
    assert result.zeroed == program.zeroed
    assert [b.id for b in branches(result)] == [b.id for b in branches(program) if b.id != DEAR]
    # A budget that leaves branches alone cannot do so.
    with pytest.raises(UnsupportedError, match=r"cannot be reached.*drop=True"):
        run(program, step(Budget(speedup=3, drop=False)), context(program, machine))


def test_dropped_is_zeroed(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a branch that is gone stay zero through cut and training, to the last bit."""
    program = captured("tiny-bert")
    seen: list[Program] = []
    dropped = gradual_structure._dropped

    def noted(before: Fitted, names: Sequence[str], ctx: Context) -> Fitted:
        seen.append(before.program)
        return dropped(before, names, ctx)

    monkeypatch.setattr(gradual_structure, "_dropped", noted)
    machine = Machine({DEAR: 0.5 * flops(program) / 1e6})
    result, _, details = run(program, step(Budget(speedup=3)), context(program, machine))
    assert details["dropped"]
    assert any(0 < g["after"] < g["before"] for g in details["groups"])
    (whole,) = seen
    gone = [b for b in branches(whole) if b.id in details["dropped"]]
    assert all(not whole.tensors[name].any() for branch in gone for name in branch.tensors)
    for before, after in zip(
        whole.run(whole.forward.example), result.run(result.forward.example), strict=True
    ):
        assert torch.equal(before, after)


class Shifted(nn.Module):
    """Two residual branches; the first gives one where its weights are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.two = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.cos(self.one(x))
        return self.out(x + self.two(x))


def test_a_branch_that_outlives_its_weights_stays() -> None:
    program = capture(Shifted(), {"x": torch.randn(3, 8)})
    assert [b.id for b in branches(program)] == ["one", "two"]
    _, _, details = run(program, step(Budget(flops=0.1), epochs=1, end=0), context(program))
    assert "even when all its weights are zero" in details["skipped"]["one"]
    assert details["dropped"] == ["two"]


def test_a_branch_without_competing_units_stays(captured: Captured) -> None:
    program = captured("tiny-bert")
    wanted = step(Budget(speedup=1.2), roles=("neuron",), epochs=1, end=0)
    _, report, details = run(program, wanted, context(program))
    kinds = {c.id: c.kind for c in report.choices}
    stay = {name for name, why in details["skipped"].items() if "no unit of it competes" in why}
    assert {kinds[name] for name in stay} == {"attention"}
    assert {kinds[name] for name in details["dropped"]} <= {"ffn"}


# --- resuming ------------------------------------------------------------------------------------

slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("at", [slow(3), 6, slow(10)], ids=lambda at: f"batch {at}")
def test_what_was_measured_on_the_way_is_kept(
    at: int, captured: Captured, tmp_path: Path, breaks: Any
) -> None:
    program = captured("tiny-bert")
    batches, wanted = data(program), step(Budget(speedup=3), end=0.6, roles=("head", "neuron"))
    whole = run(program, wanted, context(program, Changing(then=0.85), batches))
    assert whole[2]["factor"] == pytest.approx(0.85)
    folder: Any = {"checkpoints": tmp_path / "checkpoints", "every": 1}
    with pytest.raises(Exception, match="crashed with Stops"):
        run(program, wanted, context(program, Changing(then=0.85), breaks(batches, at), **folder))
    ctx = context(program, Changing(then=0.85), batches, **folder, resume=True)
    again = run(program, wanted, ctx)
    assert again[2]["factor"] == whole[2]["factor"]
    assert again[1].predicted_ms == whole[1].predicted_ms
    assert all(t.equal(again[0].tensors[name]) for name, t in whole[0].tensors.items())


@pytest.mark.parametrize("at", [slow(3), 10], ids=lambda at: f"batch {at}")
def test_resumed_is_as_if_never_stopped(
    at: int, captured: Captured, tmp_path: Path, breaks: Any
) -> None:
    """On a machine of other times too: a budget is kept by the prices that it began with."""
    program = captured("tiny-bert")
    batches, extra = data(program), {DEAR: 0.5 * flops(program) / 1e6}
    wanted = step(Budget(speedup=3), end=0.6)
    whole = run(program, wanted, context(program, Machine(extra), batches))
    folder: Any = {"checkpoints": tmp_path / "checkpoints", "every": 1}
    with pytest.raises(Exception, match="crashed with Stops"):
        run(program, wanted, context(program, Machine(extra), breaks(batches, at), **folder))
    other = Machine({"encoder.layer.0.attention": 1.0})
    again = run(program, wanted, context(program, other, batches, **folder, resume=True))
    assert again[0].tensors.keys() == whole[0].tensors.keys()
    assert all(t.equal(again[0].tensors[name]) for name, t in whole[0].tensors.items())
    for key in ("density", "groups", "scores", "dropped"):
        assert again[2][key] == whole[2][key]
    assert again[1].predicted_ms == whole[1].predicted_ms
    assert again[1].choices == whole[1].choices


def test_a_checkpoint_of_another_budget_is_refused(captured: Captured, tmp_path: Path) -> None:
    program = captured("tiny-mlp")
    folder: Any = {"checkpoints": tmp_path / "checkpoints"}
    wanted = step(Budget(flops=0.7), epochs=1)
    run(program, wanted, context(program, **folder))
    other = replace(wanted, budget=Budget(flops=0.6))
    with pytest.raises(Exception, match="was made with budget="):
        run(program, other, context(program, **folder, resume=True))


# --- options -------------------------------------------------------------------------------------


def test_a_budget_in_a_recipe() -> None:
    wanted = [GradualStructure(budget=Budget(speedup=3, batch=(1, 128)), epochs=2)]
    assert loads(dump(wanted)) == wanted
    text = "passes: [gradual-structure: {epochs: 2, budget: {speedup: 3, batch: [1, 128]}}]"
    assert loads(text) == wanted
    assert loads("passes: [gradual-structure: {budget: null}]") == [GradualStructure()]
    for given, says in (
        ("{speedup: 0.5}", "how many times faster, above 1"),
        ("{spedup: 3}", "did you mean 'speedup'"),
        ("3", "must be a pass name"),
        ("fold-constants", "budget is a Budget"),
    ):
        with pytest.raises(RecipeError, match=says):
            loads(f"passes: [gradual-structure: {{budget: {given}}}]")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": Budget(size_mb=1)}, "size_mb is not"),
        ({"budget": Budget(max_drop=0.1, task=print)}, "max_drop is not"),
        ({"budget": Budget(flops=0.5, speedup=2)}, "give flops alone"),
        ({"budget": Budget(speedup=2, blocks="32x4")}, "removes structure alone"),
        ({"budget": Budget(speedup=2), "density": 0.5}, "give one of them"),
        ({"budget": PruneHeads(0.5)}, "budget is a Budget"),
    ],
)
def test_bad_budgets_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        GradualStructure(**options)


def test_what_is_missing_is_said_before_work(captured: Captured) -> None:
    program = captured("tiny-bert")
    wanted = step(Budget(speedup=2))
    assert not wanted.needs_calibration
    assert wanted.inner == ()
    with pytest.raises(RecipeError, match="needs data and a loss"):
        Pipeline([wanted]).run(program)
    with pytest.raises(RecipeError, match="measures time"):
        Pipeline([wanted]).run(program, Context(training=Training(data(program), loss=squares)))
    with pytest.raises(RecipeError, match="nothing-such"):
        Pipeline([step(Budget(speedup=2, ignore=("nothing-such",)))]).run(program, context(program))
