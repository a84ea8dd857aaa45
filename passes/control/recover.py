"""PruneRecover: prune a little and recover, round after round, until the asked total is gone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch

from graphprune.errors import RecipeError
from graphprune.ir.module import ProgramModule
from graphprune.ir.program import Program
from graphprune.passes.control.repeat import inner_passes, inner_verification, run_round
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.events import JSON
from graphprune.pipeline.registry import options, register
from graphprune.training.distributed import Workers
from graphprune.training.metrics import Metric
from graphprune.training.objective import inputs_of
from graphprune.training.spec import Training, check_metric, run_eval
from graphprune.validate import check_number, check_whole


@register
@final
@dataclass(frozen=True, slots=True)
class PruneRecover(Pass):
    """Run passes in order, in several rounds, each of which removes an equal fraction of the total.

        PruneRecover((PruneNeurons(0.5), Finetune()), rounds=4)      12.5, 25, 37.5, 50 %

    1. A pass with a `ratio` removes in round r of n what is left until r / n of its ratio is gone,
       counted in units of the dense model; after the last round its ratio is met exactly.
    2. A pass with a `sparsity` zeroes until r / n of it is zero. n:m patterns do not grow.
    3. All other passes run in every round as they are: training, least squares.
    4. With `tolerance`, rounds end as soon as `eval` falls by more than that below the dense
       model's, and the last round within the tolerance is returned; the program unchanged if none.

    Attributes:
        passes: what a round does, in order; each is verified like any other.
        rounds: how many.
        tolerance: how much `eval` of `compile(..., training=...)` may fall; null never stops.
    """

    name: ClassVar[str] = "prune-recover"
    # What the inner passes preserve is checked on each of them.
    preserves: ClassVar[Invariant] = Invariant.NONE

    passes: tuple[Pass, ...]
    rounds: int = 4
    tolerance: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", inner_passes(self.name, self.passes))
        check_whole("rounds", self.rounds)
        if self.tolerance is not None:
            check_number("tolerance", self.tolerance, "0 or more, or null", low=0)
        if all(_scaled(step, 0.5) == step for step in self.passes):
            raise RecipeError(
                "prune-recover splits a ratio or sparsity over rounds, and none of its passes has "
                f"one above 0: {[step.name for step in self.passes]}; to run passes again and "
                "again there is repeat"
            )

    @property
    def inner(self) -> tuple[Pass, ...]:
        return self.passes

    @property
    def needs_calibration(self) -> bool:
        return any(step.needs_calibration for step in self.passes)

    @property
    def needs_training(self) -> bool:
        return self.tolerance is not None or any(step.needs_training for step in self.passes)

    def run(self, program: Program, ctx: Context) -> PassResult:
        training = ctx.training
        if training is not None and training.eval is None:
            training = None
        if self.tolerance is not None and training is None:
            raise RecipeError(
                "prune-recover with a tolerance stops by eval, and there is none: give "
                "compile(..., training=Training(batches, eval=...))"
            )
        dense = None if training is None else _metric(ctx.reference or program, training)
        current = good = program
        rounds: list[dict[str, JSON]] = []
        stopped = False
        while len(rounds) < self.rounds and not stopped:
            ctx.running = self.name  # a round leaves the name of its last pass
            ctx.progress(len(rounds), self.rounds, "repeats")
            part = (len(rounds) + 1) / self.rounds
            current, reports = run_round(
                [_scaled(step, part) for step in self.passes], current, ctx
            )
            record: dict[str, JSON] = {"part": part, "passes": reports}
            if training is not None and dense is not None:
                record["metric"] = metric = _metric(current, training)
                stopped = self.tolerance is not None and metric < dense - self.tolerance
            rounds.append(record)
            good = good if stopped else current
        return PassResult(good, good is not program, self._report(rounds, dense, stopped, ctx))

    def _report(
        self, rounds: list[dict[str, JSON]], dense: float | None, stopped: bool, ctx: Context
    ) -> dict[str, JSON]:
        taken = rounds[:-1] if stopped else rounds
        words = f"{len(taken)} of {self.rounds} rounds"
        if taken and dense is not None:
            words += f", eval {taken[-1]['metric']:.4g} (dense {dense:.4g})"
        return {
            "summary": words,
            "rounds": rounds,
            "taken": len(taken),
            "stopped": stopped,
            "metric_dense": dense,
            "verification": inner_verification(
                [t for record in taken for t in record["passes"]], ctx
            ),
        }


def _scaled(step: Pass, part: float) -> Pass:
    """The pass with a fraction of its total."""
    known: Any = step
    names = {option.name for option in options(type(step))}
    if {"ratio", "of"} <= names:
        return replace(known, ratio=known.ratio * part, of="dense")
    if "sparsity" in names and known.sparsity is not None and _grows(known):
        return replace(known, sparsity=known.sparsity * part)
    return step


def _grows(step: Any) -> bool:
    """Whether the sparsity can vary: an n:m pattern fixes it."""
    return ":" not in getattr(step, "pattern", "")


def _metric(program: Program, training: Training) -> float:
    """Evaluate a program by `eval` in the main process, for all processes."""
    workers = Workers(training.device)

    def measured() -> float:
        if callable(training.eval):
            return run_eval(training.eval, program)
        score = Metric(training.loss)
        module = ProgramModule(program)
        with torch.no_grad():
            for batch in training.eval or ():
                score.add(module(**inputs_of(program, batch)), batch)
        return check_metric(score.value())

    return workers.run_on_main(measured)
