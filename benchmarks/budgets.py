"""Asked and measured speed: MiniLM-L6 at 1.5 to 6 times, float and int8, and what it costs.

Nothing is trained. Quality is Spearman's rank correlation on the STS Benchmark's test pairs,
calibrated on 1,024 sentences of its training part; $GRAPHPRUNE_DATA names the folder that holds
stsb/. Without it: agreement of ten nearest neighbors with the dense model on sentences of Python's
help topics, calibrated on others of them. Times are CPU time of one thread for one sentence of 128
tokens, the dense float model and the result interleaved. The last row is distilled: eight epochs on
the training part's sentences, without their scores.

    python -m benchmarks.budgets [--quick] [--json FILE] [--only TEXT] [--target output]

--only keeps the rows whose "precision asked" contains TEXT: "int8 3", "distilled". --target is what
weights are fitted to: the dense model's "stream" (the default), or their own former "output".
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import graphprune
from benchmarks.common import Row, Settings, main
from benchmarks.front import INT8, Bench
from graphprune.models.data.calibration import calibration_batches
from graphprune.passes import Budget, Distill
from graphprune.passes.budget.budget import TARGETS
from graphprune.pipeline.base import Pass
from graphprune.report.budget import BudgetReport

ASKED = (1.5, 2.0, 3.0, 4.0, 6.0)
TRAINED = 2.71
BATCH = (1, 128)


def measure(settings: Settings, only: str, target: str) -> Iterator[Row]:
    """The dense forms, each speed-up in float and int8, and one that is distilled."""
    evaluations = 30 if settings.quick else 100
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(settings, Path(folder))
        for precision in ("fp32", "int8"):
            after: list[Pass] = [] if precision == "fp32" else [INT8]
            if only in f"{precision} 1":
                yield bench.row("nothing", bench.compiled(after), asked=1.0, precision=precision)
            for asked in ASKED[1:3] if settings.quick else ASKED:
                if only in f"{precision} {asked:g}":
                    yield _row(bench, asked, precision, after, evaluations, target)
        if only in f"distilled {TRAINED:g}":
            step = Distill(epochs=1 if settings.quick else 8, lr=2e-4)
            yield _row(bench, TRAINED, "distilled", [step], evaluations, target)


def _sentences(bench: Bench) -> list[Any]:
    """All sentences that may calibrate, as batches to train on."""
    if bench.data is None:
        return bench.batches
    names = list(bench.inputs)
    found = calibration_batches(bench.data / "train.tsv", names, bench.tokenizer, 10**6)
    # They come sorted by length.
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[i] for i in order]


def _row(
    bench: Bench, asked: float, precision: str, after: list[Pass], evaluations: int, target: str
) -> Row:
    step = Budget(speedup=asked, batch=BATCH, evaluations=evaluations, target=target)
    training = graphprune.Training(_sentences(bench)) if precision == "distilled" else None
    compiled = graphprune.compile(
        bench.dense, [step, *after], calibration=bench.batches, training=training
    )
    found = BudgetReport.of(compiled.report.passes[0].details)
    assert found is not None
    return bench.row(
        " ".join("-" if c.dropped else str(c.level) for c in found.choices),
        compiled,
        asked=asked,
        precision=precision,
        predicted=found.predicted,
        corrections=found.corrections,
        evaluations=found.evaluations,
        loss=None if found.fresh_loss is None else f"{found.fresh_loss:.4f}",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--target", default="stream", choices=TARGETS)
    options, sys.argv[1:] = parser.parse_known_args()
    main("budgets", partial(measure, only=options.only, target=options.target))
