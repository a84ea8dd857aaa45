"""OpenVINO reads what is exported: encoders, images, decoders without and with a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import graphprune
from graphprune.exporters import Artifact
from graphprune.exporters.onnx.convert import to_onnx
from graphprune.exporters.onnx.files import save_onnx
from graphprune.exporters.onnx.names import input_names
from graphprune.exporters.runtime.session import feeds_of, open_session
from graphprune.ir.program import Program
from graphprune.models.zoo.tiny import tiny
from graphprune.passes import PruneAxis, PruneNeurons
from tests.consumers.conftest import Vectors

openvino = pytest.importorskip(
    "openvino", reason="OpenVINO is not installed: pip install .[consumers]"
)


def run(path: Path, feeds: dict[str, Any]) -> list[Any]:
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    found = openvino.Core().compile_model(str(path), "CPU", options)(feeds)
    return [found[i] for i in range(len(found))]


def agrees(path: Path, feeds: dict[str, Any]) -> bool:
    expected = open_session(path, 1).run(None, feeds)
    pairs = zip(run(path, feeds), expected, strict=True)
    return all(a.shape == b.shape and np.abs(a - b).max(initial=0) < 1e-5 for a, b in pairs)


def test_encoder(
    artifact: Artifact, batch: dict[str, NDArray[np.int64]], expected: dict[str, Vectors]
) -> None:
    """What need not be fed is no input there: it is a constant."""
    found = run(artifact.model_path, {n: batch[n] for n in ("input_ids", "attention_mask")})
    for vectors, mine in zip(found, expected.values(), strict=True):
        assert np.abs(vectors - mine).max() < 1e-5


def test_images_in_a_flat_folder(tmp_path: Path) -> None:
    model, inputs = tiny("tiny-cnn")
    compiled = graphprune.compile(
        model, [PruneAxis(0.5, targets=("inner.*",))], example_inputs=inputs
    )
    made = compiled.export(tmp_path / "cnn")
    assert agrees(made.path / "model.onnx", made.feeds(inputs))


@pytest.mark.parametrize("opset", [20, 23])
def test_vision_transformer(captured: Callable[[str], Program], tmp_path: Path, opset: int) -> None:
    checked(captured("tiny-vit"), "forward", tmp_path, opset)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_decoder(name: str, tmp_path: Path) -> None:
    """With as many key heads as query heads, and with half as many."""
    model, inputs = tiny(name)
    compiled = graphprune.compile(model, [PruneNeurons(0.5)], example_inputs=inputs, cache=True)
    for entry in ("forward", "decode"):
        checked(compiled.program, entry, tmp_path)


def checked(program: Program, entry: str, folder: Path, opset: int | None = None) -> None:
    path, spec = folder / f"{entry}.onnx", program.entries[entry]
    save_onnx(to_onnx(program, entry, opset=opset), path)
    assert agrees(path, feeds_of(spec.example, input_names(spec)))
