"""Asked and measured speed: MiniLM-L6 at 1.5 to 6 times, float and int8, and what it costs.

Nothing is trained. Quality is Spearman's rank correlation on the STS Benchmark's test pairs,
calibrated on 1,024 sentences of its training part; $GRAPHPRUNE_DATA names the folder that holds
stsb/. Without it: agreement of ten nearest neighbors with the dense model on sentences of Python's
help topics, calibrated on others of them. Times are CPU time of one thread for one sentence of 128
tokens, the dense float model and the result interleaved.

    python -m benchmarks.budgets [--quick] [--json FILE]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import Row, Settings, main
from benchmarks.front import INT8, Bench
from graphprune.passes import Budget
from graphprune.pipeline.base import Pass
from graphprune.report.budget import BudgetReport

ASKED = (1.5, 2.0, 3.0, 4.0, 6.0)
BATCH = (1, 128)


def measure(settings: Settings) -> Iterator[Row]:
    """The dense forms, and each speed-up in float and int8."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(settings, Path(folder))
        for precision in ("fp32", "int8"):
            after: list[Pass] = [] if precision == "fp32" else [INT8]
            yield bench.row("nothing", bench.compiled(after), asked=1.0, precision=precision)
            for asked in ASKED[1:3] if settings.quick else ASKED:
                yield _row(bench, asked, precision, after, 30 if settings.quick else 100)


def _row(bench: Bench, asked: float, precision: str, after: list[Pass], evaluations: int) -> Row:
    step = Budget(speedup=asked, batch=BATCH, evaluations=evaluations)
    compiled = bench.compiled([step, *after])
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
    main("budgets", measure)
