"""Runs passes in order, verifies after each, and tells observers.

What is checked after a pass, cheapest first (design.md, "Rewriting and verification"):

1. The pass wrote neither to the graphs nor to the tensors of its input.
2. `modified` tells the truth about object identity.
3. Every graph is well formed (`graph.lint`).
4. Shapes computed anew from the tensors agree with the stored metadata.
5. INTERFACE and SHAPES, where the pass says that it preserves them.
6. NUMERICS where preserved; a pass that resized tensors must have proven masked == shrunk instead.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.errors import GraphPruneError, PassError, RecipeError, VerificationError
from graphprune.ir.graph import copy_graph, describe, node_content, output_node, value_of
from graphprune.ir.program import Entry, Program
from graphprune.ir.propagate import propagate
from graphprune.ir.quantization import KEY, too_late
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult, Run, flat
from graphprune.pipeline.events import (
    JSON,
    Observer,
    PassFinished,
    PassStarted,
    PipelineFinished,
    PipelineStarted,
)
from graphprune.pipeline.recipe import dump, to_data

DUMP = "GRAPHPRUNE_DUMP"
_logger = logging.getLogger(__name__)


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
        ctx = (Context() if ctx is None else ctx).during(run, program)
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
        RecipeError: an option names what the program has not; near names are named.
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
    ctx.begin(step.name, index)
    before = fingerprint(program) if ctx.verify else None
    start = time.perf_counter()
    result = _guarded_run(step, program, ctx, passes, index)
    seconds = time.perf_counter() - start
    # A nested pass has moved the context's name on.
    ctx.running = step.name

    start = time.perf_counter()
    if ctx.verify:
        try:
            report = _verify(step, program, before, result)
        except VerificationError as e:
            _dump(program, result.program, passes or (step,), index)
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
        _dump(program, None, passes or (step,), index)
        raise
    except GraphPruneError:
        raise
    except Exception as e:
        _dump(program, None, passes or (step,), index)
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


# --- verification ------------------------------------------------------------------------------


def _verify(step: Pass, program: Program, before: Hashable, result: PassResult) -> dict[str, JSON]:
    """Check the pass's claims; return its report, with the numeric comparison where we made one."""
    report = dict(result.report)
    if fingerprint(program) != before:
        raise VerificationError(
            "it wrote to its input program; a pass edits copies (Program.fork_graphs) and replaces "
            "tensors (Program.with_tensors)"
        )
    if result.modified is (result.program is program):
        claim = (
            "a modified program but returned its input"
            if result.modified
            else ("nothing modified but returned another program")
        )
        raise VerificationError(f"it reports {claim}; return the very object when nothing changed")
    if not result.modified:
        return report
    for name, entry in result.program.entries.items():
        check_graph(result.program, entry, name)
    if Invariant.INTERFACE in step.preserves:
        _check_interface(program, result.program)
    if Invariant.SHAPES in step.preserves:
        _check_shapes(program, result.program)
    if Invariant.NUMERICS in step.preserves:
        from graphprune.verify.equivalence import verify_rewrite

        start = time.perf_counter()
        nodes = Invariant.NODES in step.preserves
        numbers = dict(verify_rewrite(program, result.program, nodes=nodes))
        numbers["seconds"] = time.perf_counter() - start
        report.setdefault("verification", numbers)
    elif "verification" not in report and _resized(program, result.program):
        raise VerificationError(
            "it resized tensors without a proof; remove units with ctx.shrink and put its report "
            "under 'verification'"
        )
    return report


def fingerprint(program: Program) -> Hashable:
    """Everything about a program that a pass could write to by mistake, cheap to compare.

    A write through `tensor.data` does not raise a tensor's version and stays unseen here.
    """
    tensors = tuple(
        (name, id(t), _version(t), tuple(t.shape)) for name, t in program.tensors.items()
    )
    entries = tuple(
        (name, tuple(node_content(node) for node in entry.graph.nodes))
        for name, entry in program.entries.items()
    )
    return tensors, entries, program.parameters, tuple(sorted(program.aliases.items()))


def _version(tensor: Tensor) -> int:
    # Tensors made under torch.inference_mode have no version counter, and cannot be written to.
    return -1 if tensor.is_inference() else tensor._version


def _at_example(value: Any) -> Hashable:
    """Like `describe`, with symbolic sizes as the plain numbers that they are for the examples."""

    def plain(what: Any) -> Any:
        if isinstance(what, tuple):
            return what[-1] if what[:1] == ("symbolic",) else tuple(plain(w) for w in what)
        return what

    result: Hashable = plain(describe(value))
    return result


def check_graph(program: Program, entry: Entry, name: str = "forward") -> None:
    """Check that a graph is well formed, fits the tensors, and that its metadata is fresh.

    Raises:
        VerificationError: naming the first node that is wrong.
    """
    try:
        entry.graph.lint()
    except RuntimeError as e:
        raise VerificationError(f"entry {name!r} is not well formed: {e}") from e
    for node in entry.graph.nodes:
        if node.op == "get_attr" and node.target not in program.tensors:
            raise VerificationError(f"entry {name!r} reads tensor {node.target!r}, which is gone")
    computed = copy_graph(entry.graph)
    # At the examples' sizes: ten times faster than symbolic ones, and enough to see a stale shape.
    propagate(computed, program.tensors, entry.example, {})
    for stored, actual in zip(entry.graph.nodes, computed.nodes, strict=True):
        if stored.op == "output":
            continue
        was, now = _at_example(stored.meta.get("val")), _at_example(value_of(actual))
        if was != now:
            raise VerificationError(
                f"entry {name!r}, node {stored.name!r} stores {was} but computes {now}; return "
                "graphs through Program.with_graphs, which refreshes metadata"
            )


def _check_interface(before: Program, after: Program) -> None:
    if before.entries.keys() != after.entries.keys():
        raise VerificationError(
            f"it preserves the interface but entries {sorted(before.entries)} became "
            f"{sorted(after.entries)}"
        )
    for name, entry in before.entries.items():
        other = after.entries[name]
        for what, was, now in (
            ("input names", entry.input_names, other.input_names),
            ("arguments", entry.arguments, other.arguments),
            ("output structure", entry.out_spec, other.out_spec),
            ("dynamic dimensions", _plain_dynamic(entry), _plain_dynamic(other)),
            ("inputs", _kinds(entry.example), _kinds(other.example)),
            ("outputs", _kinds(_outputs(entry)), _kinds(_outputs(other))),
        ):
            if was != now:
                raise VerificationError(
                    f"it preserves the interface but the {what} of entry {name!r} changed from "
                    f"{was!r} to {now!r}"
                )


def _plain_dynamic(entry: Entry) -> dict[str, dict[int, str]]:
    return {name: dict(dims) for name, dims in entry.dynamic.items() if dims}


def _outputs(entry: Entry) -> Sequence[Any]:
    results: Any = output_node(entry.graph).args[0]
    return [value_of(r) if isinstance(r, fx.Node) else r for r in results]


def _kinds(values: Sequence[Any]) -> list[Hashable]:
    """Type, rank and which dimensions are dynamic: what a caller relies on."""
    return [
        (str(v.dtype), tuple(isinstance(s, torch.SymInt) for s in v.shape))
        if isinstance(v, Tensor)
        else type(v).__name__
        for v in values
    ]


def _shapes(program: Program) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in program.tensors.items()}


def _check_shapes(before: Program, after: Program) -> None:
    was, now = _shapes(before), _shapes(after)
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            raise VerificationError(
                f"it preserves shapes but tensor {name!r} went from {was.get(name)} to "
                f"{now.get(name)}"
            )


def _resized(before: Program, after: Program) -> bool:
    was, now = _shapes(before), _shapes(after)
    return any(now[name] != shape for name, shape in was.items() if name in now)


# --- what is kept for a bug report -------------------------------------------------------------


def _dump(before: Program, after: Program | None, passes: Sequence[Pass], index: int) -> None:
    """Write both graphs and the recipe with its position to $GRAPHPRUNE_DUMP, when that is set."""
    folder = os.environ.get(DUMP)
    if not folder:
        return
    try:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for which, program in (("before", before), ("after", after)):
            for name, entry in (program.entries if program else {}).items():
                (target / f"{which}-{name}.txt").write_text(_print(entry.graph), encoding="utf-8")
        position = f"# failed at pass {index + 1} of {len(passes)}: {passes[index].name}\n"
        (target / "recipe.yaml").write_text(position + dump(passes), encoding="utf-8")
    except Exception as e:
        # Whatever it is, the error on its way to the user matters more.
        _logger.warning("cannot write to %s=%s: %s", DUMP, folder, e)


def _print(graph: fx.Graph) -> str:
    lines = [f"{node.format_node()}  {describe(node.meta.get('val'))}" for node in graph.nodes]
    return "\n".join(lines) + "\n"
