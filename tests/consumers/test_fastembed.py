"""fastembed takes the folder as a custom model."""

from __future__ import annotations

import numpy as np
import pytest

from graphprune.exporters import Artifact
from tests.consumers.conftest import TEXTS, Vectors

pytest.importorskip("fastembed", reason="fastembed is not installed: pip install .[consumers]")


@pytest.mark.parametrize("pooling", ["MEAN", "DISABLED"])
def test_custom_model(artifact: Artifact, expected: dict[str, Vectors], pooling: str) -> None:
    """It pools by itself, or takes the output that is pooled already, by its name."""
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    inside = pooling == "DISABLED"
    TextEmbedding.add_custom_model(
        model=f"mine/{pooling}",
        pooling=PoolingType[pooling],
        normalization=not inside,
        sources=ModelSource(hf="mine/encoder"),
        dim=32,
        output_name="sentence_embedding" if inside else None,
    )
    model = TextEmbedding(f"mine/{pooling}", specific_model_path=str(artifact.path), threads=1)
    found = np.stack(list(model.embed(TEXTS)))
    assert np.abs(found - expected["sentence_embedding"]).max() < 1e-5
