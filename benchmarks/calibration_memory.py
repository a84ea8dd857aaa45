"""Peak memory of calibrated pruning: what is alive at a cut plus one block, not model x samples.

SparseGPT on a decoder in float32, a row in a process of its own. Beside the most that the process
ever held stands what it held before the pass, what the batches hold at a cut between two blocks,
and what the inputs of all matrices would hold if they were kept instead of streamed.

    python -m benchmarks.calibration_memory [--quick] [--json FILE]
"""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import Row, Settings, main
from graphprune.axes import axis_groups
from graphprune.axes.sites import is_output_head, linear_sites
from graphprune.calibration.stream import Stream
from graphprune.capture.capture import capture
from graphprune.ir.program import Program
from graphprune.models import load_model
from graphprune.passes import SparseGPT
from graphprune.pipeline.base import Context

LENGTH = 512
BATCH = 4


def measure(settings: Settings) -> Iterator[Row]:
    """A row for every amount of calibration."""
    context = multiprocessing.get_context("spawn")
    for segments in (8,) if settings.quick else (16, 32, 64):
        with context.Pool(1) as pool:
            yield pool.apply(_row, ("tiny-gpt2" if settings.quick else "smollm2", segments))


def _row(name: str, segments: int) -> Row:
    loaded = load_model(name)
    program = capture(loaded.module, loaded.example_inputs)
    inputs = list(loaded.example_inputs)
    top = int(loaded.example_inputs["input_ids"].max())
    del loaded
    length = LENGTH if name == "smollm2" else 16
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, top + 1, (segments, length), generator=generator)
    batches = [
        {key: part if key == "input_ids" else torch.ones_like(part) for key in inputs}
        for part in torch.split(ids, BATCH)
    ]
    before = _resident()
    SparseGPT(0.5).run(program, Context(calibration=batches))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    alive, kept = _sizes(program, batches)
    return {
        "model": name,
        "segments": segments,
        "tokens": segments * length,
        "weights MB": program.nbytes() / 1e6,
        "before MB": before,
        "peak MB": peak,
        "pass MB": peak - before,
        "at a cut MB": alive,
        "all inputs MB": kept,
    }


def _sizes(program: Program, batches: list[dict[str, Tensor]]) -> tuple[float, float]:
    """MB that all batches hold between the first two regions, and that all sites' inputs have."""
    sites = [s for s in linear_sites(axis_groups(program)) if not is_output_head(s, program)]
    stream = Stream(program, batches)
    for region in stream.regions(sites)[:2]:
        stream.collect(program, region, lambda site, rows: None)
    values = [value for state in stream.states for value in state.values()]
    alive = sum(value.nbytes for value in values if isinstance(value, Tensor))
    rows = sum(batch["input_ids"].numel() for batch in batches)
    return alive / 1e6, sum(4 * rows * s.matrix(program).shape[1] for s in sites) / 1e6


def _resident() -> float:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main("calibration_memory", measure)
