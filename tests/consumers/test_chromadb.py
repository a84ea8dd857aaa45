"""chromadb's default embedder, from whose folder six of our files take the place of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from graphprune.exporters import Artifact
from tests.consumers.conftest import TEXTS, Vectors

FILES = (
    "config.json",
    "onnx/model.onnx",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.txt",
)


def test_default_embedder(
    artifact: Artifact,
    expected: dict[str, Vectors],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It feeds token_type_ids, which the graph does not ask for, and pads to 256 tokens."""
    module = pytest.importorskip(
        "chromadb.utils.embedding_functions.onnx_mini_lm_l6_v2",
        reason="chromadb is not installed: pip install .[consumers]",
    )
    monkeypatch.setattr(module.ONNXMiniLM_L6_V2, "DOWNLOAD_PATH", tmp_path)
    (tmp_path / "onnx").mkdir()
    for file in FILES:
        shutil.copy(artifact.path / file, tmp_path / "onnx")
    embed = module.ONNXMiniLM_L6_V2(preferred_providers=["CPUExecutionProvider"])
    assert np.abs(np.stack(embed(TEXTS)) - expected["sentence_embedding"]).max() < 1e-5
