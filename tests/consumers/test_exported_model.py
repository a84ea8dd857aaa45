"""transformers itself: ExportedModel by export.json, AutoConfig and AutoTokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from graphprune.exporters import Artifact
from graphprune.exporters.onnx.files import save_onnx
from tests.consumers.conftest import TEXTS, Vectors

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.parametrize("weights", ["inside", "beside"])
def test_exported_model(
    artifact: Artifact,
    batch: dict[str, NDArray[np.int64]],
    expected: dict[str, Vectors],
    tmp_path: Path,
    weights: str,
) -> None:
    import onnx_ir as ir

    exporters = pytest.importorskip(
        "transformers.exporters.base", reason="this transformers has no exporters"
    )
    folder = artifact.path
    if weights == "beside":  # above 20 MB by default
        folder = tmp_path / "encoder"
        shutil.copytree(artifact.path, folder)
        save_onnx(ir.load(artifact.model_path), folder / "onnx/model.onnx", weights)
        assert (folder / "onnx/model.onnx_data").is_file()
    model = exporters.ExportedModel.from_pretrained(folder, device="cpu")
    assert model.dtype == torch.float32
    assert model.config.model_type == "bert"
    found = model(**{name: torch.from_numpy(batch[name]) for name in model_inputs(model)})
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert np.abs(found[name].numpy() - values).max() < 1e-5


def model_inputs(model: object) -> list[str]:
    names = list(model.components["model"].metadata.kwargs)  # type: ignore[attr-defined]
    assert names == ["input_ids", "attention_mask"]
    return names


def test_the_configuration_and_tokenizer_load(
    artifact: Artifact, batch: dict[str, NDArray[np.int64]]
) -> None:
    config = transformers.AutoConfig.from_pretrained(artifact.path)
    assert (config.num_attention_heads, config.intermediate_size) == (4, 64)  # the source's
    tokenizer = transformers.AutoTokenizer.from_pretrained(artifact.path)
    made = tokenizer(TEXTS, padding=True, return_tensors="np")
    assert set(made) == set(batch)
    for name, ids in made.items():
        np.testing.assert_array_equal(ids, batch[name])
