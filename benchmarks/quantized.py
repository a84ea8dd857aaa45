"""MiniLM-L6 quantized, with and without structure removed first, against dense float.

Every model runs interleaved with the dense float one; the clock is the CPU time of the one thread,
so that other programs do not count. Ratios are medians over rounds, their spread the quartiles.
Structure is chosen by magnitude: time does not depend on which units go.

    python -m benchmarks.quantized [--quick] [--json FILE]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import graphprune
from benchmarks.common import Row, Settings, main
from benchmarks.minilm_structured import TOKENS, _inputs
from graphprune.exporters import Artifact, Comparison, export
from graphprune.models import load_model
from graphprune.passes import PruneHeads, PruneNeurons, Quantize
from graphprune.pipeline.base import Pass

CUTS: Mapping[str, tuple[Pass, ...]] = {
    "dense": (),
    "FFN 25 %, 6 of 12 heads": (PruneNeurons(0.75), PruneHeads(0.5)),
}
SCHEMES = ("int8-dynamic", "int8-static", "int8-weights", "int4-weights")
GOALS = {("FFN 25 %, 6 of 12 heads", "int8-dynamic"): 5.0}


def measure(settings: Settings) -> Iterator[Row]:
    """One row for each cut and scheme; `ratio` is dense float's time over its own."""
    loaded = load_model("minilm")
    dense = graphprune.compile(loaded.module, [], example_inputs=dict(loaded.example_inputs))
    batches = [_inputs(1)]
    schemes = SCHEMES[:1] if settings.quick else SCHEMES
    artifacts: dict[tuple[str, str], Artifact] = {}
    with tempfile.TemporaryDirectory() as folder:
        for cut, passes in CUTS.items():
            for scheme in ("float32", *schemes):
                low_bit = () if scheme == "float32" else (Quantize(scheme),)
                made = graphprune.compile(dense, [*passes, *low_bit], calibration=batches)
                path = Path(folder) / str(len(artifacts))
                baseline = None if artifacts else dense.program
                artifacts[cut, scheme] = export(
                    made.program, path, baseline=baseline, calibration=batches
                )
        yield from _rows(artifacts, settings)


def _rows(artifacts: Mapping[tuple[str, str], Artifact], settings: Settings) -> Iterator[Row]:
    first = artifacts["dense", "float32"]
    for (cut, scheme), artifact in artifacts.items():
        result = artifact.benchmark(
            _inputs(1), first, threads=1, repeats=settings.repeats, clock="cpu"
        )
        notes = artifact.manifest["quantization"].get(artifact.model_path.name, {})
        yield {
            "kept": cut,
            "scheme": scheme,
            "input": f"1x{TOKENS}",
            **_times(result),
            "file MB": artifact.manifest["sizes"][artifact.model_path.name] / 1e6,
            "dense file MB": first.manifest["sizes"][first.model_path.name] / 1e6,
            "cosine": min((d["cosine"] for d in notes.get("drift", ())), default=None),
            "to reach": GOALS.get((cut, scheme)),
        }


def _times(result: Comparison) -> dict[str, Any]:
    return {
        "threads": result.threads,
        "clock": result.clock,
        "ms": result.model.ms,
        "dense ms": result.against.ms,
        "ratio": result.ratio,
        "spread": f"{result.ratio_low:.2f}-{result.ratio_high:.2f}",
        "rounds": result.rounds,
    }


if __name__ == "__main__":
    main("quantized", measure)
