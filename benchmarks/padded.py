"""Session options on padded inputs: denormals in the attention over padding.

MiniLM-L6, dense, at 8 x 128 tokens on one thread, with every token real and with 7 of the 8 texts
half as long. Each set of options has a process of its own, and they run interleaved, by CPU time:

- default: ONNX Runtime's own;
- session(): no SkipLayerNormalization, as `Artifact.session` opens files;
- tuned: that, and denormals as zero.

    python -m benchmarks.padded [--quick] [--json FILE]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.common import Row, Settings, main
from benchmarks.minilm_structured import TOKENS, _inputs
from graphprune.capture.capture import capture
from graphprune.exporters.onnx.convert import to_onnx
from graphprune.exporters.onnx.files import save_onnx
from graphprune.exporters.runtime.child import child
from graphprune.exporters.runtime.session import DEFAULT, TUNED, UNFUSED, feeds_of
from graphprune.models import load_model

BATCH = 8
OPTIONS = {"default": DEFAULT, "session()": UNFUSED, "tuned": TUNED}


def measure(settings: Settings) -> Iterator[Row]:
    """One row for each mask and set of options."""
    loaded = load_model("minilm")
    program = capture(loaded.module, dict(loaded.example_inputs))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder) / "model.onnx"
        save_onnx(to_onnx(program, optional=("token_type_ids",)), path)
        processes = [stack.enter_context(child([path], 1, each)) for each in OPTIONS.values()]
        for mask in ("no padding", "7 of 8 half padded"):
            inputs = _inputs(BATCH)
            if mask != "no padding":
                inputs["attention_mask"][1:, TOKENS // 2 :] = 0
            for process in processes:
                process.warm_up(feeds_of(inputs, list(inputs)))
            rounds = [
                [process.round(3, "cpu")[0] for process in processes]
                for _ in range(settings.repeats)
            ]
            for index, name in enumerate(OPTIONS):
                ratios = [times[0] / times[index] for times in rounds]
                yield {
                    "mask": mask,
                    "options": name,
                    "input": f"{BATCH}x{TOKENS}",
                    "ms": median(times[index] for times in rounds),
                    "faster than default": median(ratios),
                    "spread": f"{np.quantile(ratios, 0.25):.2f}-{np.quantile(ratios, 0.75):.2f}",
                    "rounds": len(rounds),
                }


if __name__ == "__main__":
    main("padded", measure)
