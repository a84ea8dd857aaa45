"""What the exporter leaves out of a file, each rewrite switched off alone.

all-MiniLM-L6-v2 in int8, dense and with a sixteenth of its neurons and two of twelve heads left,
which spends most of its time beside its products. "slower without" is the time of the file without
a rewrite over the time of the file with all of them, interleaved, CPU time of one thread. Structure
is chosen by magnitude: time does not depend on which units go.

    python -m benchmarks.exporter_rewrites [--quick] [--json FILE]
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import graphprune
from benchmarks.common import Row, Settings, main
from benchmarks.minilm_structured import TOKENS, _inputs
from graphprune.exporters import Artifact
from graphprune.exporters.onnx import masks, simplify
from graphprune.exporters.quantize.layers import Editor
from graphprune.models import load_model
from graphprune.passes import PruneHeads, PruneNeurons, Quantize

CUTS = {
    "dense": (),
    "neurons 1/16, 2 of 12 heads": (PruneNeurons(15 / 16), PruneHeads(10 / 12)),
}


def _unmerged(self: Editor, products: Any) -> list[str]:
    return [node.name for node in products]


OFF: dict[str, Callable[[], Any]] = {
    "nothing": nullcontext,
    "query, key and value as one product": lambda: patch.object(Editor, "_merge_all", _unmerged),
    "a mask as what it broadcasts from": lambda: patch.object(masks, "narrowed", lambda mask: mask),
    "pooling as one product": lambda: patch.object(simplify, "_sum", lambda node: None),
    "operands without their broadcast": lambda: patch.object(
        simplify, "_broadcast", lambda node: None
    ),
}


def measure(settings: Settings) -> Iterator[Row]:
    """A row for each model, length and rewrite."""
    loaded = load_model("minilm")
    dense = graphprune.compile(loaded.module, [], example_inputs=dict(loaded.example_inputs))
    for cut, passes in list(CUTS.items())[-1:] if settings.quick else CUTS.items():
        low = graphprune.compile(dense, [*passes, Quantize("int8-dynamic")])
        with tempfile.TemporaryDirectory() as folder:
            files: dict[str, Artifact] = {}
            for name, off in OFF.items():
                with off():
                    files[name] = low.export(Path(folder) / str(len(files)), baseline=False)
            for length in (TOKENS,) if settings.quick else (TOKENS, 32):
                batch = {name: x[:, :length] for name, x in _inputs(1).items()}
                for name, artifact in list(files.items())[1:]:
                    found = artifact.benchmark(
                        batch, files["nothing"], threads=1, repeats=settings.repeats, clock="cpu"
                    )
                    yield {
                        "kept": cut,
                        "input": f"1x{length}",
                        "without": name,
                        "ms": found.against.ms,
                        "slower without": 1 / found.ratio,
                        "spread": f"{1 / found.ratio_high:.2f}-{1 / found.ratio_low:.2f}",
                    }


if __name__ == "__main__":
    main("exporter_rewrites", measure)
