"""light-embed takes the folder, and pools as 1_Pooling/config.json says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphprune.exporters import Artifact
from tests.consumers.conftest import TEXTS, Vectors

pytest.importorskip("light_embed", reason="light-embed is not installed: pip install .[consumers]")


@pytest.mark.parametrize(
    "described",
    [
        {"pooling_config_path": "1_Pooling"},
        {"onnx_output_map": {"sentence_embedding": "sentence_embedding"}, "normalize": False},
    ],
    ids=["pools", "pooled"],
)
def test_text_embedding(
    artifact: Artifact, expected: dict[str, Vectors], described: dict[str, Any]
) -> None:
    from light_embed import TextEmbedding

    model = TextEmbedding(
        str(artifact.path), model_config={"onnx_file": "onnx/model.onnx", **described}
    )
    found = model.encode(TEXTS, normalize_embeddings=False)
    assert np.abs(found - expected["sentence_embedding"]).max() < 1e-5
