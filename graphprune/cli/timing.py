"""`graphprune bench`: times on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
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

if TYPE_CHECKING:
    from graphprune.exporters import Artifact, Comparison
    from graphprune.ir.program import Program
    from graphprune.pipeline.events import JSON


def bench_command(
    model: ArtifactOrModel,
    against: Annotated[
        str,
        typer.Option(
            help="dense (its own twin), int8 (the twin quantized), or another artifact's folder; "
            "several with commas."
        ),
    ] = "dense",
    batch: Batch = "",
    threads: Threads = 1,
    as_json: Json = False,
    allow_pickle: Pickle = False,
) -> None:
    """Measure on ONNX Runtime: interleaved repeats, pinned threads, median and spread.

    Times are CPU time of one thread; with --threads above 1, of the wall clock.
    """
    from graphprune.cli.tables import timing_table

    sizes = parse_batch(batch)
    check_opponents(model, against)
    with opened(model, allow_pickle) as (subject, display), display.step("measure"):
        timing = bench(subject, sizes, threads, against)
    if as_json:
        print_json({"model": model, **timing})
    else:
        stdout_console().print(timing_table(timing))


def bench(subject: Subject, sizes: tuple[int, ...], threads: int, against: str) -> dict[str, JSON]:
    """Time an artifact against its dense twin or another one; or a model as it is.

    Raises:
        GraphPruneError: there is nothing to measure against, or the sizes do not fit.
    """
    subject.check_opponents(against)
    compiled = subject.captured()
    inputs = timed_inputs(compiled.program, sizes)
    with subject.exported(compiled, baseline=True) as artifact:
        timing = timing_of(artifact, compiled.program, inputs, threads, against)
    if subject.compared:
        return timing
    # The two sessions of a model are the same, so one row says it all.
    kept = ("batch", "threads", "clock", "rounds", "dense_ms", "dense_low_ms", "dense_high_ms")
    return {key: timing[key] for key in kept}


def timing_of(
    artifact: Artifact, program: Program, inputs: Mapping[str, Any], threads: int, against: str
) -> dict[str, JSON]:
    """A comparison as one flat row; the ratio is above one where the pruned model is faster."""
    found = artifact.benchmark(dict(inputs), against, threads=threads)
    row = _timing_row(program, inputs, threads, against.partition(",")[0], found)
    others = {
        name: _timing_row(program, inputs, threads, name, other)
        for name, other in found.others.items()
    }
    return {**row, "others": others} if others else row


def _timing_row(
    program: Program, inputs: Mapping[str, Any], threads: int, against: str, found: Comparison
) -> dict[str, JSON]:
    return {
        "batch": batch_text(program, inputs),
        "threads": threads,
        "clock": found.clock,
        "rounds": found.rounds,
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
