"""Where the time of a run goes: by operator type, as ONNX Runtime's profiler has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from graphprune.exporters.runtime.child import child
from graphprune.exporters.runtime.kv_cache import Feeds
from graphprune.exporters.runtime.session import TUNED

RUNS = 10  # a few are enough for the shares, and profiling slows small operators


def operator_times(
    files: Mapping[str, Path], feeds: Feeds, *, threads: int = 1, runs: int = RUNS
) -> dict[str, dict[str, float]]:
    """Milliseconds of a run by operator type, the longest first; by the names of the files.

    Times are of the wall clock, the median over runs, in a process of their own. Fused operators
    have ONNX Runtime's names, and what is between operators is in none of them.

    Args:
        files: ONNX files by name.
        feeds: inputs for all of them; of a decoder's cache, each has its own.
        threads: ORT's threads within operators.
        runs: that are profiled, interleaved.

    Raises:
        GraphPruneError: a file does not load or run.
    """
    with child(list(files.values()), threads, TUNED, profile=True) as process:
        process.warm_up(feeds)
        for _ in range(runs):
            process.round(1, "wall")
        return dict(zip(files, process.operators(), strict=True))
