"""Repeat: run some passes until they find nothing more to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from graphprune.errors import RecipeError
from graphprune.ir.program import Program
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.events import JSON
from graphprune.pipeline.pipeline import run_pass
from graphprune.pipeline.registry import register
from graphprune.verify.equivalence import combined


@register
@final
@dataclass(frozen=True, slots=True)
class Repeat(Pass):
    """Run passes in order, again and again, until a whole round modifies nothing.

    1. Each inner pass is verified like any other.
    2. Reaching `at_most` rounds is no error; the report says that it did not settle.

    Attributes:
        passes: what a round does, in order.
        at_most: the largest number of rounds.
    """

    name: ClassVar[str] = "repeat"
    # What the inner passes preserve is checked on each of them.
    preserves: ClassVar[Invariant] = Invariant.NONE

    passes: tuple[Pass, ...]
    at_most: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", inner_passes(self.name, self.passes))
        if not self.passes:
            raise RecipeError("repeat needs at least one pass")
        if not isinstance(self.at_most, int) or self.at_most < 1:
            raise RecipeError(f"at_most must be at least 1, got {self.at_most!r}")

    @property
    def inner(self) -> tuple[Pass, ...]:
        return self.passes

    @property
    def needs_calibration(self) -> bool:
        return any(step.needs_calibration for step in self.passes)

    @property
    def needs_training(self) -> bool:
        return any(step.needs_training for step in self.passes)

    def run(self, program: Program, ctx: Context) -> PassResult:
        current, settled = program, False
        rounds: list[list[dict[str, JSON]]] = []
        while len(rounds) < self.at_most and not settled:
            ctx.running = self.name  # a round leaves the name of its last pass
            ctx.progress(len(rounds), self.at_most, "repeats")
            current, reports = run_round(self.passes, current, ctx)
            settled = not any(report["modified"] for report in reports)
            rounds.append(reports)
        report = {
            "summary": f"{len(rounds)} rounds" + ("" if settled else ", not settled"),
            "rounds": rounds,
            "settled": settled,
            "verification": inner_verification(
                [report for reports in rounds for report in reports], ctx
            ),
        }
        return PassResult(current, current is not program, report)


def inner_passes(name: str, passes: Any) -> tuple[Pass, ...]:
    """The passes that another one runs, as a tuple.

    Raises:
        RecipeError: it is no list of passes.
    """
    listed = isinstance(passes, Iterable)
    steps = tuple(passes) if listed else ()
    if not listed or not all(isinstance(step, Pass) for step in steps):
        raise RecipeError(f"{name} takes a list of passes, got {passes!r}")
    return steps


def run_round(
    passes: Sequence[Pass], program: Program, ctx: Context
) -> tuple[Program, list[dict[str, JSON]]]:
    """Run passes inside another one, each verified like any other; return their reports too."""
    reports: list[dict[str, JSON]] = []
    for index, step in enumerate(passes):
        program, finished = run_pass(step, program, ctx, passes, index, record=False)
        reports.append({**finished.report, "pass": step.name, "modified": finished.modified})
    return program, reports


def inner_verification(reports: Sequence[Mapping[str, JSON]], ctx: Context) -> dict[str, JSON]:
    """Combine the verification of inner passes, from their reports."""
    if not ctx.verify:
        return {"skipped": "verification was switched off"}
    checks = [report.get("verification", {}) for report in reports]
    return {"checked": "after each inner pass", **combined(checks)}
