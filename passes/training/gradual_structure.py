"""GradualStructure: remove heads, their dims and neurons by gradients while the model trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from graphprune.axes import axis_groups, frozen_parameters
from graphprune.errors import RecipeError, UnsupportedError, VerificationError
from graphprune.ir.history import kept_indices
from graphprune.ir.program import JSON, Program
from graphprune.ir.quantization import refuse_quantized
from graphprune.passes.structural.selection import Selector, select
from graphprune.passes.training.schedule import scheduled
from graphprune.passes.training.training_pass import GradualPass, trained_report
from graphprune.passes.training.units import DIMS, HEADS, Ledger, Units, find_units, position_sums
from graphprune.pipeline.base import Context, Invariant, Keep, PassResult
from graphprune.pipeline.registry import register
from graphprune.rewrite.mask import mask
from graphprune.suggest import suggest
from graphprune.training.loop import Hooks, fit
from graphprune.validate import check_number
from graphprune.verify.equivalence import verify_rewrite

TRAINED_ROLES = (*HEADS, "neuron", *DIMS)
SCORES = ("grain", "taylor")


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

    Attributes:
        density: part of the parameters of all competing units that is left in the end.
        score: "grain" (mean of |slope|) or "taylor" (of slope²); a slope is the loss's by a gate.
        smoothing: weight of the past in the running mean of scores, in [0, 1).
        regularize: part of a head's value dims below which those left count less; 0 for off.
        roles: what competes: some of "head", "kv_group", "neuron", "qk_dim", "v_dim".
    """

    name: ClassVar[str] = "gradual-structure"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE

    density: float = 0.25
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

    def __post_init__(self) -> None:
        GradualPass.__post_init__(self)
        check_number("density", self.density, "a part above 0, at most 1", low=0, high=1,
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

    def run(self, program: Program, ctx: Context) -> PassResult:
        refuse_quantized(program, ctx.running)
        units, skipped = self._units(program, ctx)
        ledger, least = Ledger(program, units), Ledger(program, units).drain()
        if self.density < least.density:
            raise RecipeError(
                f"pass {ctx.running!r} cannot reach density {self.density!r}: one unit of each of "
                f"{len(units)} axes stays, which is {least.density:.3g} of their parameters; give "
                "at least that"
            )
        state = _State(self, ledger, ctx)
        if ctx.verify:
            _check_zeros(program, least, ctx)
        fitted = fit(
            program,
            ctx.training,
            ctx,
            self.plan(),
            Hooks(masking=state, after_epoch=state.after_epoch, arrange=ledger.arranged),
            distillation=self.distillation(),
            settings={
                "density": self.density,
                "ranking": [self.score, self.smoothing, self.regularize],
                "pruning": [self.schedule, self.begin, self.end],
                "units": [unit.id for unit in units],
            },
        )
        told = trained_report(fitted)
        report = {
            **told,
            "summary": f"density {ledger.density:.1%} of {len(units)} axes, {told['summary']}",
            "epochs": [
                {**record, "density": density}
                for record, density in zip(told["epochs"], state.reached, strict=True)
            ],
            "density": ledger.density,
            "groups": [
                {"id": u.id, "role": u.role, "before": u.size, "after": ledger.left(u)}
                for u in units
            ],
            # Not of dims that each head has its own of.
            "kept": kept_indices(fitted.program.history[len(program.history) :]),
            "scores": state.summary(),
            "skipped": {**told.get("skipped", {}), **skipped},
            "frozen": [f.to_json() for f in frozen_parameters(ctx.get(axis_groups, program))],
            "parameters_before": program.num_parameters(),
            "parameters_after": fitted.program.num_parameters(),
        }
        return PassResult(fitted.program, True, report)

    def _units(self, program: Program, ctx: Context) -> tuple[list[Units], dict[str, str]]:
        """What competes, and why other groups of these roles do not.

        Raises:
            UnsupportedError: nothing does.
        """
        groups = ctx.get(axis_groups, program)
        selection = select(program, groups, Selector(self.roles))
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
    """What changes while the pass runs: running means of scores, and what is gone."""

    options: GradualStructure
    ledger: Ledger
    ctx: Context
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
        density = scheduled(
            progress, options.begin, options.end, 1.0, options.density, options.schedule
        )
        # A product that rounds down must not keep what exactly fits.
        budget = (1 - density) * self.ledger.total + 1e-6
        if not self.ledger.remove(self.scores(), budget, fill=self.finished):
            return None
        return self.ledger.masks(parameters)

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
        keep = self.ledger.keep()
        if not keep:
            return program, None
        arranged = program.with_tensors(self.ledger.arranged(program.tensors))
        if self.ctx.verify:
            _compare(program, mask(arranged, keep))
        # Which dims a head has kept is its own matter: the record of the cut cannot say it.
        moved = [name for name in keep if self.ledger.units[name].heads is not None]
        return arranged.record({"rearranged": moved}) if moved else arranged, keep

    def state(self) -> Mapping[str, Tensor]:
        return {
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
        self.ledger.load({name: state[f"gone/{name}"] for name in self.means})

    def _finish(self) -> None:
        # Later steps need no gradients of their own for scores.
        self.finished, self.scored = True, None

    def summary(self) -> dict[str, JSON]:
        """Scores of the units that are left, when the last one went."""
        found = {}
        for name, scores in self.scores().items():
            unit = self.ledger.units[name]
            rows = self.ledger.living_rows(unit)
            left = scores[rows][~self.ledger.gone[name][rows]].sort().values
            middle = float(left[(len(left) - 1) // 2])
            found[name] = {"lowest": float(left[0]), "median": middle, "highest": float(left[-1])}
        return found


def _check_zeros(program: Program, least: Ledger, ctx: Context) -> None:
    """Raise UnsupportedError where a unit gives something even when all its weights are zero."""
    dead = program.with_tensors(
        {
            name: program.tensors[name].masked_fill(~living, 0)
            for name, living in least.masks(program.tensors).items()
        }
    )
    try:
        _compare(dead, mask(dead.with_tensors(least.arranged(dead.tensors)), least.keep()))
    except VerificationError as e:
        raise UnsupportedError(
            f"pass {ctx.running!r} removes units by zeroing their weights, and in this model such "
            f"units still give something: {e}; use prune-heads, prune-neurons or prune-axis"
        ) from e


def _compare(dead: Program, masked: Program) -> None:
    """Prove that zeroed weights are masked units, in whatever order the masked program has them."""
    # Only `forward`: the example of a cache is in the old order.
    dead, masked = (replace(p, entries={"forward": p.forward}) for p in (dead, masked))
    verify_rewrite(dead, masked, nodes=False)
