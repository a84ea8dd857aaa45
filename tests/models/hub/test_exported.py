"""export.json says what transformers asks of it; tests/consumers loads a folder by it."""

from __future__ import annotations

import json
from typing import Any

from graphprune.models.hub.exported import exported

IDS = {"name": "input_ids", "type": "int64", "shape": ["batch_size", "sequence_length"]}
MANIFEST: dict[str, Any] = {
    "entry": "forward",
    "files": {"model": "onnx/model_quantized.onnx", "float": "onnx/model.onnx"},
    "versions": {"torch": "2", "onnx": "1", "onnxruntime": "1"},
    "inputs": [IDS, {**IDS, "name": "scale", "type": "float"}, {**IDS, "name": "types"}],
    "outputs": [{"name": "logits"}],
}
MANIFEST["inputs"][2]["optional"] = True


def test_the_deployed_file_with_the_inputs_that_are_required() -> None:
    files = exported(MANIFEST, {"architectures": ["OneModel"]})
    assert files.pop("onnx/model_quantized.onnx.data") == b""
    content = json.loads(files.pop("export.json"))
    assert not files
    model = content["components"]["model"]
    assert model["file"] == "onnx/model_quantized.onnx"
    assert model["metadata"]["architecture"] == "OneModel"
    inputs = model["metadata"]["kwargs"]
    assert {n: (i["rank"], i["dtype"]) for n, i in inputs.items()} == {
        "input_ids": (2, "int64"),
        "scale": (2, "float32"),
    }


def test_decoders_with_a_cache_get_none() -> None:
    assert exported({**MANIFEST, "entry": "decode"}, {}) == {}
