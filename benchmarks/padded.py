"""What session options change where inputs are padded: denormals in the attention over padding.

MiniLM-L6 at 8 x 128 tokens on one thread, with every token real, and with 7 of the 8 texts half as
long. The options are ONNX Runtime's own, and ours: denormals as zero, no SkipLayerNormalization.
Both run in turns, in processes of their own, by CPU time.

    python -m benchmarks.padded [--quick] [--json FILE]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import graphprune
from benchmarks.common import Row, Settings, main
from benchmarks.minilm_structured import TOKENS, _inputs
from graphprune.models import load_model
from graphprune.passes import PruneHeads, PruneNeurons

BATCH = 8


def measure(settings: Settings) -> Iterator[Row]:
    """One row for each mask and model."""
    loaded = load_model("minilm")
    compiled = graphprune.compile(
        loaded.module,
        [PruneHeads(4 / 12), PruneNeurons(0.5)],
        example_inputs=dict(loaded.example_inputs),
    )
    with tempfile.TemporaryDirectory() as folder:
        artifact = compiled.export(Path(folder) / "out")
        for mask in ("no padding", "7 of 8 half padded"):
            inputs = _inputs(BATCH)
            if mask != "no padding":
                inputs["attention_mask"][1:, TOKENS // 2 :] = 0
            found = artifact.benchmark(inputs, repeats=settings.repeats)
            assert found.default is not None
            for name, ours, plain in (
                ("dense", found.against, found.default.against),
                ("FFN 50 %, 8 of 12 heads", found.model, found.default.model),
            ):
                yield {
                    "mask": mask,
                    "model": name,
                    "input": f"{BATCH}x{TOKENS}",
                    "ms, default": plain.ms,
                    "default spread": f"{plain.low:.1f}-{plain.high:.1f}",
                    "ms, tuned": ours.ms,
                    "tuned spread": f"{ours.low:.1f}-{ours.high:.1f}",
                    "faster": plain.ms / ours.ms,
                    "rounds": found.rounds,
                }


if __name__ == "__main__":
    main("padded", measure)
