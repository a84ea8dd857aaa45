"""`graphprune bench`: times on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphprune.cli.app import (
    ArtifactOrModel,
    Batch,
    Json,
    Pickle,
    Threads,
    print_json,
    stdout_console,
)
from graphprune.cli.sizes import batch_text, parse_batch, timed_inputs
from graphprune.cli.subject import Subject, check_opponents, opened
from graphprune.errors import GraphPruneError

if TYPE_CHECKING:
    from graphprune.exporters import Artifact, Comparison
    from graphprune.ir.program import Program
    from graphprune.pipeline.events import JSON

# Of a model that is not compared: its two sessions are the same, so one row says it all.
_ALONE = ("batch", "threads", "cpu", "clock", "rounds", "dense_ms", "dense_low_ms", "dense_high_ms")


def bench_command(
    model: ArtifactOrModel,
    against: Annotated[
        str,
        typer.Option(
            help="dense (its own baseline), int8 (the baseline quantized), or another artifact's "
            "folder; several with commas."
        ),
    ] = "dense",
    batch: Batch = "",
    threads: Threads = 1,
    note: Annotated[
        bool, typer.Option("--note", help="Write the result into the artifact's reports.")
    ] = False,
    as_json: Json = False,
    allow_pickle: Pickle = False,
) -> None:
    """Time a model on ONNX Runtime: interleaved repeats, pinned threads, median and spread.

    Times are CPU time of one thread; with --threads above 1, of the wall clock. They are taken with
    the session options of docs/deploy.md, and again with ONNX Runtime's default ones.
    """
    from graphprune.cli.tables import choices_table, memory_table, operators_table, timing_table

    sizes = parse_batch(batch)
    check_opponents(model, against)
    check_note(note, against)
    with opened(model, allow_pickle) as (subject, display), display.step("measure"):
        timing = bench(subject, sizes, threads, against, note=note)
    if as_json:
        print_json({"model": model, **timing})
    else:
        console = stdout_console()
        console.print(timing_table(timing))
        console.print(operators_table(timing["operators"]))
        console.print(memory_table(timing["memory"]))
        if timing.get("choices"):
            console.print(choices_table(timing["choices"]))
        if note:
            console.print(f"noted in the reports of {model}", soft_wrap=True, markup=False)


def check_note(note: bool, against: str) -> None:
    """Refuse, before any work, to note a comparison with something else than the dense model.

    Raises:
        GraphPruneError: the first of the names is not the dense model.
    """
    if note and against.partition(",")[0].strip() != "dense":
        raise GraphPruneError(
            "the reports compare with the dense model: with --note, --against begins with dense, "
            f"such as dense,int8, got {against!r}"
        )


def bench(
    subject: Subject,
    sizes: tuple[int, ...],
    threads: int,
    against: str,
    *,
    note: bool = False,
) -> dict[str, JSON]:
    """Time an artifact against its baseline or another one, or a model as it is; with its memory.

    With `note` the times are written into the artifact's manifest and reports.

    Raises:
        GraphPruneError: there is nothing to measure against, the sizes do not fit, or there is no
            artifact to note anything in.
    """
    subject.check_opponents(against)
    if note and not subject.compared:
        raise GraphPruneError("--note writes into an artifact; compile the model first")
    from graphprune.exporters.artifact.results import add_results
    from graphprune.report.measured import Measured

    compiled = subject.captured()
    inputs = timed_inputs(compiled.program, sizes)
    with subject.exported(compiled, baseline=True) as artifact:
        timing = timing_of(artifact, compiled.program, inputs, threads, against)
        forms = (["dense"] if artifact.has_baseline else []) + ["pruned"] * subject.compared
        memory = {
            form: asdict(artifact.footprint(inputs, dense=form == "dense", threads=threads))
            for form in forms
        }
        operators = artifact.operators(inputs, threads=threads)
        choices = Measured(artifact.manifest).quantized.get("choices")
        if note:
            noted = {"timing": timing, "operators": operators}
            add_results(artifact, compiled.report, noted, compiled.described)
    if not subject.compared:
        default = timing["default"]
        timing = {key: value for key, value in timing.items() if key in _ALONE}
        timing["default"] = {key: value for key, value in default.items() if key in _ALONE}
        operators = {"dense": operators["dense"]}
    sparse = {"choices": choices} if choices else {}
    return {**timing, "memory": memory, "operators": operators, **sparse}


def opponents_of(artifact: Artifact) -> str:
    """What a fresh artifact is timed against: dense, and dense in few bits where that is there."""
    scheme = artifact.manifest["precision"]["onnx"].partition("-")[0]
    return "dense" if "baseline_quantized" not in artifact.manifest["files"] else f"dense,{scheme}"


def timing_of(
    artifact: Artifact, program: Program, inputs: Mapping[str, Any], threads: int, against: str
) -> dict[str, JSON]:
    """A comparison as one flat row; the ratio is above one where the pruned model is faster.

    Under "default" the same with ONNX Runtime's default session options.
    """
    from graphprune.exporters.runtime.probe import cpu

    found = artifact.benchmark(dict(inputs), against, threads=threads)
    first = against.partition(",")[0]
    shared = {
        "batch": batch_text(program, inputs),
        "threads": threads,
        "cpu": cpu()["name"],
        "clock": found.clock,
        "rounds": found.rounds,
    }
    row = _timing_row(shared, first, found)
    if found.default is not None:
        row["default"] = _timing_row(shared, first, found.default)
    return row


def _timing_row(shared: Mapping[str, JSON], against: str, found: Comparison) -> dict[str, JSON]:
    row = {
        **shared,
        "against": against,
        "dense_ms": found.against.ms,
        "dense_low_ms": found.against.low,
        "dense_high_ms": found.against.high,
        "pruned_ms": found.model.ms,
        "pruned_low_ms": found.model.low,
        "pruned_high_ms": found.model.high,
        "speedup": found.ratio,
        "speedup_low": found.ratio_low,
        "speedup_high": found.ratio_high,
    }
    others = {name: _timing_row(shared, name, other) for name, other in found.others.items()}
    return {**row, "others": others} if others else row
