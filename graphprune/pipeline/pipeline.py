"""Runs passes in order, verifies after each, and tells observers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from graphprune.errors import GraphPruneError, PassError, RecipeError, VerificationError
from graphprune.ir.program import Program
from graphprune.ir.quantization import KEY, Mark, too_late
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult, Run, flat
from graphprune.pipeline.dump import DUMP, dump_graphs
from graphprune.pipeline.events import (
    JSON,
    Observer,
    PassFinished,
    PassStarted,
    PipelineFinished,
    PipelineStarted,
)
from graphprune.pipeline.recipe import to_data
from graphprune.verify.invariants import fingerprint, verify_change


@dataclass(frozen=True, slots=True)
class PipelineResult:
    """The program after all passes, and what each of them reported.

    Attributes:
        program: the last pass's program.
        results: one `PassFinished` a pass, in order: name, modified, seconds, report.
        seconds: the whole run, verification included.
    """

    program: Program
    results: tuple[PassFinished, ...]
    seconds: float

    @property
    def modified(self) -> bool:
        """Whether any pass changed anything."""
        return any(result.modified for result in self.results)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Passes in the order in which they run; the order is the user's, nothing is sorted."""

    passes: tuple[Pass, ...]
    verify: bool = True
    observers: tuple[Observer, ...] = ()

    def __init__(
        self, passes: Sequence[Pass], verify: bool = True, observers: Sequence[Observer] = ()
    ) -> None:
        object.__setattr__(self, "passes", tuple(passes))
        object.__setattr__(self, "verify", verify)
        object.__setattr__(self, "observers", tuple(observers))

    def run(self, program: Program, ctx: Context | None = None) -> PipelineResult:
        """Run every pass; the given program stays as it is.

        Raises:
            RecipeError: an option does not fit the program; raised before any pass runs.
            PassError: a pass crashed; `__cause__` is the crash, the passes already run are named.
            VerificationError: a pass did not do what it claims.
            UnsupportedError: a pass declines this program, with the reason.
        """
        start = time.perf_counter()
        check_steps(self.passes, program)
        run = Run(self.verify, self.observers)
        ctx = (Context() if ctx is None else ctx).during(
            run, program, mark_of(self.passes, program)
        )
        run.emit(PipelineStarted(tuple(step.name for step in self.passes)))
        results: list[PassFinished] = []
        for index, step in enumerate(self.passes):
            run.emit(PassStarted(step.name, index, len(self.passes)))
            program, finished = run_pass(step, program, ctx, self.passes, index)
            results.append(finished)
            run.emit(finished)
        seconds = time.perf_counter() - start
        result = PipelineResult(program, tuple(results), seconds)
        run.emit(PipelineFinished(result.modified, seconds))
        return result


def mark_of(steps: Iterable[Pass], program: Program) -> Mark | None:
    """How the program will be quantized when these have run; None for float."""
    marks = [mark for step in flat(steps) if (mark := step.quantization(program))]
    return next(iter(marks), program.quantization)


def check_order(steps: Iterable[Pass]) -> None:
    """Refuse, before any work, passes of which one would find a marked program and refuse it.

    Raises:
        RecipeError: a pass that changes weights or shapes comes after `quantize`.
    """
    scheme = ""
    for step in flat(steps):
        if step.name == KEY:
            scheme = str(getattr(step, "scheme", KEY))
        elif scheme and step.needs_float:
            raise RecipeError(too_late(step.name, scheme))


def check_steps(steps: Iterable[Pass], program: Program) -> None:
    """Refuse passes whose options do not fit the program, before any of them runs.

    Raises:
        RecipeError: an option names what the program does not have; near names are given.
    """
    for step in flat(steps):
        step.check(program)
        # A pass that adds or removes tensors, as a clean-up may, gives the next ones other names.
        if not (step.inner or step.needs_float or Invariant.SHAPES in step.preserves):
            return


def run_pass(
    step: Pass,
    program: Program,
    ctx: Context,
    passes: Sequence[Pass] = (),
    index: int = 0,
    *,
    record: bool = True,
) -> tuple[Program, PassFinished]:
    """Run one pass, at `index` of `passes`, and verify it (for `Pipeline` and passes that nest).

    With `record`, a pass that modified something adds one line to the program's history.
    """
    ctx.begin(step.name, index, trains=step.trains)
    was = fingerprint(program) if ctx.verify else None
    start = time.perf_counter()
    result = _guarded_run(step, program, ctx, passes, index)
    seconds = time.perf_counter() - start
    # A nested pass has moved the context's name on.
    ctx.running = step.name

    start = time.perf_counter()
    if ctx.verify:
        try:
            report = verify_change(
                program,
                result.program,
                was=was,
                modified=result.modified,
                preserves=step.preserves,
                report=result.report,
            )
        except VerificationError as e:
            dump_graphs(program, result.program, passes or (step,), index)
            raise VerificationError(f"pass {step.name!r}: {e}") from e
    else:
        report = dict(result.report)
    verify_seconds = time.perf_counter() - start

    after = result.program
    if record and result.modified:
        after = _recorded(step, program, after, report)
    finished = PassFinished(
        step.name, index, max(len(passes), 1), result.modified, seconds, verify_seconds, report
    )
    # Else the weights of every step would stay in memory.
    ctx.run.forget(after)
    return after, finished


def _guarded_run(
    step: Pass, program: Program, ctx: Context, passes: Sequence[Pass], index: int
) -> PassResult:
    try:
        return step.run(program, ctx)
    except VerificationError:
        dump_graphs(program, None, passes or (step,), index)
        raise
    except GraphPruneError:
        raise
    except Exception as e:
        dump_graphs(program, None, passes or (step,), index)
        earlier = [done.name for done in passes[:index]]
        where = f"after {', '.join(earlier)}" if earlier else "as the first pass"
        raise PassError(
            f"pass {step.name!r} ({where}) crashed with {type(e).__name__}: {e}; "
            f"this is a bug of the pass, set {DUMP} to a folder to keep the graphs"
        ) from e


def _recorded(step: Pass, before: Program, after: Program, report: dict[str, JSON]) -> Program:
    """The program with one more line of history; what rewrites recorded on the way goes into it."""
    (plain,) = to_data([step])
    record = {
        "pass": plain,
        "parameters_before": before.num_parameters(),
        "parameters_after": after.num_parameters(),
    }
    if "verification" in report:
        record["verification"] = report["verification"]
    if steps := after.history[len(before.history) :]:
        record["steps"] = list(steps)
    return replace(after, history=(*before.history, record))
