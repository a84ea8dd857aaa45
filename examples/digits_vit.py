"""Prune a vision transformer hard, train it for some seconds, and export what was trained.

    python examples/digits_vit.py [FOLDER]

The transformer is trained on scikit-learn's digits the first time (about half a minute).
"""

from __future__ import annotations

import sys
from pathlib import Path

import graphprune as gp
from graphprune.models import load_model
from graphprune.models.tasks import evaluate
from graphprune.models.zoo.digits import train
from graphprune.passes import PruneHeads, PruneNeurons


def main(folder: Path) -> None:
    loaded = load_model("digits-vit")
    print(f"dense:                {evaluate('digits', loaded.module).value:.3f} accuracy")

    compiled = gp.compile(
        loaded.module,
        [PruneHeads(0.5), PruneNeurons(0.75)],
        example_inputs=dict(loaded.example_inputs),
    )
    print(f"pruned:               {evaluate('digits', compiled.module).value:.3f} accuracy")

    # compiled.module is an ordinary module: any training loop works on it.
    train(compiled.module, epochs=5, learning_rate=1e-3)
    print(f"pruned and trained:   {evaluate('digits', compiled.module).value:.3f} accuracy")

    artifact = compiled.export(folder)  # exports the trained weights
    print(f"in ONNX Runtime:      {evaluate('digits', artifact.session()).value:.3f} accuracy")
    print(f"\n{compiled.report}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "digits-vit"))
