"""sentence-transformers pools what the file computes, as the folder says.

Its own ONNX backend cannot be installed beside transformers 5, so ONNX Runtime computes here.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from graphprune.exporters import Artifact
from tests.consumers.conftest import Vectors

pytest.importorskip(
    "sentence_transformers",
    reason="sentence-transformers is not installed: pip install .[consumers]",
)


def test_modules_and_pooling(
    artifact: Artifact, batch: dict[str, NDArray[np.int64]], expected: dict[str, Vectors]
) -> None:
    from sentence_transformers.util import import_from_string

    modules = json.loads((artifact.path / "modules.json").read_text())
    transformer, pool, normalize = (import_from_string(module["type"]) for module in modules)
    assert transformer.__name__ == "Transformer"
    pooling = pool.load(str(artifact.path), subfolder=modules[1]["path"])
    assert pooling.get_embedding_dimension() == 32
    features = {
        "token_embeddings": torch.from_numpy(expected["last_hidden_state"]),
        "attention_mask": torch.from_numpy(batch["attention_mask"]),
    }
    found = normalize()(pooling(features))["sentence_embedding"].numpy()
    assert np.abs(found - expected["sentence_embedding"]).max() < 1e-5
