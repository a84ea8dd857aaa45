"""Make a sentence encoder smaller and faster, and use the result.

python examples/sentence_encoder.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import graphprune as gp
from graphprune.models import load_model
from graphprune.models.tasks.base import embed
from graphprune.passes import PruneHeads, PruneNeurons

SENTENCES = ["A man is eating food.", "Someone has a meal.", "The stock market fell today."]


def main(folder: Path) -> None:
    loaded = load_model("minilm")  # any nn.Module would do, with example inputs of your own
    assert loaded.tokenizer_dir is not None
    compiled = gp.compile(
        loaded.module,
        [PruneHeads(0.33), PruneNeurons(0.5)],
        example_inputs=dict(loaded.example_inputs),
    )
    print(compiled.report)

    compiled.files |= loaded.files()  # the tokenizer: examples/artifact_alone.py needs no more
    artifact = compiled.export(folder)
    session = artifact.session(threads=1)  # an onnxruntime.InferenceSession
    embeddings = embed(session, loaded.tokenizer_dir, SENTENCES)
    print("\ncosine similarities, by ONNX Runtime:")
    for i, j in ((0, 1), (0, 2)):
        print(f"  {float(embeddings[i] @ embeddings[j]):.3f}  {SENTENCES[i]} | {SENTENCES[j]}")

    timing = artifact.benchmark(dict(loaded.example_inputs), against="dense")
    print(
        f"\n{timing.against.ms:.2f} ms dense, {timing.model.ms:.2f} ms pruned: "
        f"{timing.ratio:.2f} times faster"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "sentence-encoder"))
