"""MiniLM-L6, FFN neurons and heads removed, in ONNX Runtime fp32 against the dense model.

The dense model is the fastest export known here (`python -m benchmarks.attention`). Timed
interleaved; with one thread the clock is that thread's CPU time, so that other programs do not
count, with more it is wall time. The ratio's spread is the quartiles over rounds.

    python -m benchmarks.minilm_structured [--quick] [--json FILE]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import graphprune
from benchmarks.common import Row, Settings, main
from graphprune.exporters import Artifact
from graphprune.exporters.runtime.timing import Clock
from graphprune.models import load_model
from graphprune.passes import PruneHeads, PruneNeurons

TOKENS = 128
# name -> (fraction of the FFN neurons removed, fraction of the 12 heads removed, speed-up to reach)
CUTS = {
    "FFN 50 %, 8 of 12 heads": (0.5, 4 / 12, 1.55),
    "FFN 25 %, 6 of 12 heads": (0.75, 6 / 12, 2.3),
}


def measure(settings: Settings) -> Iterator[Row]:
    """One row for each cut, batch size and thread count."""
    loaded = load_model("minilm")
    dense = graphprune.compile(loaded.module, [], example_inputs=dict(loaded.example_inputs))
    with tempfile.TemporaryDirectory() as folder:
        for name, (neurons, heads, goal) in CUTS.items():
            cut = graphprune.compile(dense, [PruneHeads(heads), PruneNeurons(neurons)])
            artifact = cut.export(Path(folder) / str(neurons))
            for batch in (1,) if settings.quick else (1, 8):
                for threads in (1,) if settings.quick else (1, 2):
                    wanted = goal if batch == threads == 1 else None
                    row = _row(artifact, batch, threads, settings)
                    yield {"kept": name, **row, "to reach": wanted}


def _inputs(batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (batch, TOKENS), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }


def _row(artifact: Artifact, batch: int, threads: int, settings: Settings) -> Row:
    inputs = _inputs(batch)
    clock: Clock = "cpu" if threads == 1 else "wall"
    result = artifact.benchmark(inputs, threads=threads, repeats=settings.repeats, clock=clock)
    small, large = (artifact.footprint(inputs, dense=d, threads=threads) for d in (False, True))
    sizes = artifact.manifest["sizes"]
    return {
        "input": f"{batch}x{TOKENS}",
        "threads": threads,
        "clock": clock,
        "ms": result.model.ms,
        "dense ms": result.against.ms,
        "ratio": result.ratio,
        "spread": f"{result.ratio_low:.2f}-{result.ratio_high:.2f}",
        "rounds": result.rounds,
        "load ms": small.load_ms,
        "dense load ms": large.load_ms,
        "peak MB": small.peak_bytes / 1e6,
        "dense peak MB": large.peak_bytes / 1e6,
        "private MB": _megabytes(small.private_bytes),
        "dense private MB": _megabytes(large.private_bytes),
        "file MB": sizes[artifact.model_path.name] / 1e6,
        "dense file MB": sizes["baseline.onnx"] / 1e6,
    }


def _megabytes(size: int | None) -> float | None:
    return None if size is None else size / 1e6


if __name__ == "__main__":
    main("minilm_structured", measure)
