"""GradualStructure: remove heads, their dims and neurons by gradients while the model trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from graphprune.axes import axis_groups, frozen_parameters
from graphprune.axes.branches import branches
from graphprune.errors import RecipeError, UnsupportedError, VerificationError
from graphprune.ir.history import kept_indices
from graphprune.ir.program import JSON, Program
from graphprune.ir.quantization import refuse_quantized
from graphprune.passes.budget.budget import Budget
from graphprune.passes.structural.selection import Selector, select
from graphprune.passes.training.prices import Account, Budgeted, check_budget
from graphprune.passes.training.schedule import scheduled
from graphprune.passes.training.training_pass import GradualPass, trained_report
from graphprune.passes.training.units import DIMS, HEADS, Ledger, Units, find_units, position_sums
from graphprune.passes.training.zeros import compare_zeroed
from graphprune.pipeline.base import Context, Invariant, Keep, PassResult
from graphprune.pipeline.registry import register
from graphprune.rewrite.mask import mask
from graphprune.suggest import suggest
from graphprune.training.loop import Fitted, Hooks, fit
from graphprune.validate import check_number

TRAINED_ROLES = (*HEADS, "neuron", *DIMS)
SCORES = ("grain", "taylor")
DENSITY = 0.25


@register
@final
@dataclass(frozen=True, slots=True)
class GradualStructure(GradualPass):
    """Train, and remove heads, dims of heads and neurons on the way by their gradients.

    Units of all kinds compete in one ranking, score for cost (GRAIN, arXiv 2212.07634):

    1. A unit's slope is Σ g·w over what reads it, the derivative of the loss by a gate on it; g is
       the gradient of labels and teacher's outputs, without the hidden states' (GRAIN's separation
       of gradients). Its score is the mean of |slope| over the steps, or with "taylor" of slope².
       Squares add up over the parts of a unit; of absolute values a large unit's is small for its
       cost, because its parts cancel.
    2. Value dims count the less, the fewer are left in their head: times tanh(left / regularize).
    3. A head whose dims compete too counts as the sum of its dims: else by its own slope.
    4. Before each step those with the lowest score for the parameters that go with them are
       zeroed, as many as the schedule's density allows. What is gone does not come back; the last
       unit of an axis stays. A parameter of two units counts once. A unit that costs too much is
       waited for; the last time cheaper ones go instead, as long as one fits.
    5. Every head of a layer loses equally many dims, each its own weakest ones, where no tensor is
       shared between heads; else (rotary tables) all heads lose the same ones.
    6. At the end of the epoch in which the schedule ends, zeroed units are cut, verified, and the
       epochs after it train the small model.
    7. With a budget a unit costs the time that its parameters take on the device, and a residual
       branch competes as a whole: by the score of all its units for what it still costs, with what
       goes only when all of it goes. It is zeroed, and removed for good when training is over.
       Near the budget the model is measured as it is cut so far, and the rest goes by that.

    Attributes:
        density: fraction of the parameters of all competing units that is left in the end; without
            a budget.
        score: "grain" (mean of |slope|) or "taylor" (of slope²); a slope is the loss's by a gate.
        smoothing: weight of the past in the running mean of scores, in [0, 1).
        regularize: fraction of a head's value dims below which those left count less; 0 for off.
        roles: what competes: some of "head", "kv_group", "neuron", "qk_dim", "v_dim".
        budget: what to reach instead of a density: speedup, ms or flops of a `Budget`, whose batch,
            threads, device, drop, round_to, targets and ignore count too.
    """

    name: ClassVar[str] = "gradual-structure"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE

    density: float = DENSITY
    score: str = "grain"
    smoothing: float = 0.998
    regularize: float = 0.3
    schedule: str = "cubic"
    roles: tuple[str, ...] = TRAINED_ROLES
    _: KW_ONLY
    begin: float = 0.2
    end: float = 0.4
    distill: bool = True
    epochs: int = 5
    budget: Budget | None = None

    def __post_init__(self) -> None:
        GradualPass.__post_init__(self)
        check_number("density", self.density, "a fraction above 0, at most 1", low=0, high=1,
                     open_low=True)  # fmt: skip
        if self.score not in SCORES:
            raise RecipeError(
                f"there is no score {self.score!r}; {suggest(str(self.score), SCORES)}"
            )
        check_number("smoothing", self.smoothing, "at least 0 and below 1", low=0, high=1)
        if self.smoothing == 1:
            raise RecipeError("smoothing must be below 1: with 1 no step would count")
        check_number("regularize", self.regularize, "0 (off) or more", low=0)
        if isinstance(self.roles, str) or not self.roles:
            raise RecipeError(
                f"roles is a list of some of {list(TRAINED_ROLES)}, got {self.roles!r}"
            )
        for role in self.roles:
            if role not in TRAINED_ROLES:
                raise RecipeError(
                    f"there is no role {role!r} here; {suggest(str(role), TRAINED_ROLES)}"
                )
        if len(set(self.roles)) < len(self.roles):
            raise RecipeError(f"roles names one twice: {list(self.roles)}; give each once")
        if self.budget is not None:
            check_budget(self.budget)
            if self.density != DENSITY:
                raise RecipeError("density and budget both say how much is left: give one of them")

    def check(self, program: Program) -> None:
        if self.budget is not None:
            self.budget.check(program)

    def run(self, program: Program, ctx: Context) -> PassResult:
        refuse_quantized(program, ctx.running)
        units, skipped = self._units(program, ctx)
        ledger, least = Ledger(program, units), Ledger(program, units).drain()
        if self.budget is None and self.density < least.density:
            raise RecipeError(
                f"pass {ctx.running!r} cannot reach density {self.density!r}: one unit of each of "
                f"{len(units)} axes stays, which is {least.density:.3g} of their parameters; give "
                "at least that"
            )
        if ctx.verify:
            _check_zeros(program, least, ctx)
        budgeted = None
        if self.budget is not None:
            budgeted = Budgeted(self.budget, program, units, ctx)
            ledger = budgeted.ledger()
            skipped |= budgeted.skipped
        state = _State(self, ledger, ctx, budgeted)
        fitted = fit(
            program,
            ctx.training,
            ctx,
            self.plan(),
            Hooks(masking=state, after_epoch=state.after_epoch, arrange=state.arranged),
            distillation=self.distillation(),
            settings={
                **self._goal(),
                "ranking": [self.score, self.smoothing, self.regularize],
                "pruning": [self.schedule, self.begin, self.end],
                "units": [unit.id for unit in units],
            },
        )
        if state.ledger.dropped:
            fitted = _dropped(fitted, state.ledger.dropped, ctx)
        return PassResult(fitted.program, True, self._report(program, fitted, state, skipped, ctx))

    def _goal(self) -> dict[str, JSON]:
        """The goal, as a checkpoint notes it."""
        budget = self.budget
        if budget is None:
            return {"density": self.density}
        where = [list(budget.batch), budget.threads, budget.device]
        more = [budget.drop, budget.round_to, list(budget.targets), list(budget.ignore)]
        return {"budget": [dict(budget.asked), *where, *more]}

    def _report(
        self,
        program: Program,
        fitted: Fitted,
        state: _State,
        skipped: Mapping[str, str],
        ctx: Context,
    ) -> dict[str, JSON]:
        ledger, trained = state.ledger, trained_report(fitted)
        summary = f"density {ledger.density:.1%} of {len(ledger.units)} axes"
        reached: dict[str, JSON] = {}
        if state.budgeted is not None:
            reached = state.budgeted.report(fitted.program, ledger)
            reached["dropped"] = [name for name in ledger.sublayers if name in ledger.dropped]
            reached["factor"] = state.budgeted.account.factor
            summary = reached.pop("summary")
        return {
            **trained,
            **reached,
            "summary": f"{summary}, {trained['summary']}",
            "epochs": [
                {**record, "density": density}
                for record, density in zip(trained["epochs"], state.reached, strict=True)
            ],
            "density": ledger.density,
            "groups": [
                {"id": u.id, "role": u.role, "before": u.size, "after": ledger.left(u)}
                for u in ledger.units.values()
            ],
            # Not of dims that each head has its own of.
            "kept": kept_indices(fitted.program.history[len(program.history) :]),
            "scores": state.summary(),
            "skipped": {**trained.get("skipped", {}), **skipped},
            "frozen": [f.to_json() for f in frozen_parameters(ctx.get(axis_groups, program))],
            "parameters_before": program.num_parameters(),
            "parameters_after": fitted.program.num_parameters(),
        }

    def _units(self, program: Program, ctx: Context) -> tuple[list[Units], dict[str, str]]:
        """Find the units that compete, and why other groups of these roles do not.

        Raises:
            UnsupportedError: nothing does.
        """
        groups = ctx.get(axis_groups, program)
        budget = self.budget
        names = () if budget is None else (budget.targets, budget.ignore)
        selection = select(program, groups, Selector(self.roles, (), *names))
        skipped = {group.id: reason for group, reason in selection.skipped}
        units = []
        for group in selection.groups:
            found = find_units(groups, group)
            if isinstance(found, str):
                skipped[group.id] = found
            else:
                units.append(found)
        if not units:
            name, reason = next(iter(skipped.items()))
            raise UnsupportedError(
                f"pass {ctx.running!r} cannot remove units of {name!r}: {reason}"
            )
        return units, skipped


@final
@dataclass(slots=True)
class _State:
    """The state of a run: running means of scores, and what is gone."""

    options: GradualStructure
    ledger: Ledger
    ctx: Context
    budgeted: Budgeted | None = None
    scored: Sequence[str] | None = ("labels", "outputs")
    steps: int = 0
    finished: bool = False
    cut: bool = False
    means: dict[str, Tensor] = field(default_factory=dict)
    reached: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.means = {name: torch.zeros(g.shape).double() for name, g in self.ledger.gone.items()}

    def choose(
        self, parameters: Mapping[str, nn.Parameter], step: int, total: int
    ) -> Mapping[str, Tensor] | None:
        if self.finished:
            return None
        self.observe(parameters)
        options = self.options
        progress = (step + 1) / total
        if self.settled(step + 1, total):
            self._finish()
        if self.budgeted is not None and self.budgeted.due(self.ledger):
            self.ledger = self.budgeted.corrected(self.ledger)
        ledger, scores = self.ledger, self.scores()
        last = options.density if self.budgeted is None else 1 - ledger.limit / ledger.total
        density = scheduled(progress, options.begin, options.end, 1.0, last, options.schedule)
        # A product that rounds down must not keep what exactly fits.
        slack = 1e-6 if self.budgeted is None else 1e-9 * ledger.total
        removed = ledger.remove(scores, (1 - density) * ledger.total + slack, fill=self.finished)
        if self.budgeted is not None and self.finished:
            # A density stays above what was asked for, a time below.
            removed |= ledger.meet(scores, ledger.limit - slack)
        return ledger.masks(parameters) if removed else None

    def arranged(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.ledger.arranged(tensors)

    def settled(self, step: int, total: int) -> bool:
        return step / total >= self.options.end

    def observe(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the gradients of a step into the running means."""
        units = self.ledger.units
        sums = position_sums(list(units.values()), parameters)
        beta = self.options.smoothing
        self.steps += 1
        for name, unit in units.items():
            score = unit.slopes(sums).abs()
            if unit.values and self.options.regularize:
                left = (~self.ledger.gone[name]).double().mean(1, keepdim=True)
                score = score * torch.tanh(left / self.options.regularize)
            if self.options.score == "taylor":
                score = score.square()
            self.means[name] = beta * self.means[name] + (1 - beta) * score

    def scores(self) -> dict[str, Tensor]:
        """The score of each unit now, [rows, size] by group id."""
        # Means began at zero: the weights of all steps so far add up to this.
        weight = 1 - self.options.smoothing**self.steps
        found = {name: mean / weight for name, mean in self.means.items()}
        for name in found:
            inner = [u for u in self.ledger.units.values() if u.heads == name]
            if inner:
                alive = [found[u.id].masked_fill(self.ledger.gone[u.id], 0).sum(1) for u in inner]
                found[name] = torch.stack(alive).sum(0)[None, :]
        return found

    def after_epoch(self, program: Program, epoch: int) -> tuple[Program, Keep | None]:
        self.reached.append(self.ledger.density)
        if self.cut or not self.finished:
            return program, None
        self.cut = True
        # What is gone with a branch stays zero until the branch goes.
        if self.ledger.dropped:
            program = replace(program, zeroed=program.zeroed | self.ledger.emptied)
        keep = self.ledger.keep()
        if not keep:
            return program, None
        arranged = program.with_tensors(self.ledger.arranged(program.tensors))
        if self.ctx.verify:
            compare_zeroed(program, mask(arranged, keep))
        # Which dims a head has kept is its own matter: the record of the cut cannot say it.
        moved = [name for name in keep if self.ledger.units[name].heads is not None]
        return arranged.record({"rearranged": moved}) if moved else arranged, keep

    def state(self) -> Mapping[str, Tensor]:
        more = {}
        if self.budgeted is not None:
            dropped = [name in self.ledger.dropped for name in self.ledger.sublayers]
            more = {
                "account": self.budgeted.account.to_tensor(),
                "dropped": torch.tensor(dropped, dtype=torch.bool),
            }
        return {
            **more,
            "place": torch.tensor([self.steps, self.finished, self.cut]),
            "reached": torch.tensor(self.reached, dtype=torch.float64),
            **{f"mean/{name}": mean for name, mean in self.means.items()},
            **{f"gone/{name}": gone for name, gone in self.ledger.gone.items()},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        steps, finished, cut = state["place"].tolist()
        self.steps, self.cut = steps, bool(cut)
        if finished:
            self._finish()
        self.reached = state["reached"].tolist()
        self.means = {name: state[f"mean/{name}"].cpu() for name in self.means}
        gone = {name: state[f"gone/{name}"] for name in self.means}
        if self.budgeted is None:
            self.ledger.load(gone)
            return
        # Another machine, or another hour, has other prices.
        self.budgeted.account = Account.of(state["account"])
        self.ledger = self.budgeted.ledger()
        names = list(self.ledger.sublayers)
        dropped = [name for name, is_gone in zip(names, state["dropped"], strict=True) if is_gone]
        self.ledger.load(gone, dropped)

    def _finish(self) -> None:
        # Later steps need no gradients of their own for scores.
        self.finished, self.scored = True, None

    def summary(self) -> dict[str, JSON]:
        """Scores of the units that are left, when the last one went."""
        found = {}
        for name, scores in self.scores().items():
            unit = self.ledger.units[name]
            if not self.ledger.left(unit):
                continue
            rows = self.ledger.living_rows(unit)
            left = scores[rows][~self.ledger.gone[name][rows]].sort().values
            middle = float(left[(len(left) - 1) // 2])
            found[name] = {"lowest": float(left[0]), "median": middle, "highest": float(left[-1])}
        return found


def _dropped(fitted: Fitted, names: Sequence[str], ctx: Context) -> Fitted:
    """Remove the branches that were zeroed from the trained program."""
    found = {branch.id: branch for branch in ctx.get(branches, fitted.program)}
    program, check = ctx.drop(fitted.program, [found[name] for name in found if name in names])
    if ctx.verify:
        compare_zeroed(fitted.program, program)
    record = replace(fitted.record, cuts=[*fitted.record.cuts, check])
    return Fitted(program, record)


def _check_zeros(program: Program, least: Ledger, ctx: Context) -> None:
    """Raise UnsupportedError where a unit gives something even when all its weights are zero."""
    dead = program.with_tensors(
        {
            name: program.tensors[name].masked_fill(~living, 0)
            for name, living in least.masks(program.tensors).items()
        }
    )
    try:
        compare_zeroed(dead, mask(dead.with_tensors(least.arranged(dead.tensors)), least.keep()))
    except VerificationError as e:
        raise UnsupportedError(
            f"pass {ctx.running!r} removes units by zeroing their weights, and in this model such "
            f"units still give something: {e}; use prune-heads, prune-neurons or prune-axis"
        ) from e
