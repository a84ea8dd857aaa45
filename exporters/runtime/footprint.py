"""Load time and memory of a model in a new process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from graphprune.errors import GraphPruneError
from graphprune.exporters.runtime.child import child
from graphprune.exporters.runtime.kv_cache import Feeds
from graphprune.exporters.runtime.session import TUNED


@final
@dataclass(frozen=True, slots=True)
class Footprint:
    """Load time and memory of a model in a new process.

    Attributes:
        load_ms: making the session, file cache warm.
        peak_bytes: highest resident memory, Python and ORT included.
        model_bytes: how much of it came with the session and its first runs.
        private_bytes: memory after the first runs that is this process's alone, Python and ORT
            included: a file that is only mapped does not count. None where there is no /proc.
    """

    load_ms: float
    peak_bytes: int
    model_bytes: int
    private_bytes: int | None


def footprint(path: Path, feeds: Feeds, threads: int = 1) -> Footprint:
    """Load and run an ONNX file in a process of its own, and ask what it took.

    Raises:
        GraphPruneError: it does not load or run, or the system does not say what memory it took.
    """
    with child([path], threads, TUNED) as process:
        memory = process.warm_up(feeds)
        before, peak = process.peak_before, memory["peak"]
        if before is None or peak is None:
            raise GraphPruneError("this system does not say how much memory a process took")
        return Footprint(process.load_ms, peak, peak - before, memory["private"])
