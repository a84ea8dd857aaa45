"""Bytes by what they are for, by operators and axes alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import graphprune as gp
from graphprune.exporters.artifact.weights import bytes_by_role, tensor_roles
from graphprune.ir.program import Program
from graphprune.passes import PruneNeurons, Quantize

Captured = Callable[[str], Program]


def test_tensors_of_an_encoder_have_the_roles_of_their_axes(captured: Captured) -> None:
    roles = tensor_roles(captured("tiny-bert"))
    assert roles["embeddings.word_embeddings.weight"] == "embeddings"
    assert roles["encoder.layer.0.attention.self.key.weight"] == "attention"
    assert roles["encoder.layer.1.output.dense.weight"] == "feed-forward"
    assert "embeddings.LayerNorm.weight" not in roles


def test_convolutions_are_no_feed_forward_layers(captured: Captured) -> None:
    assert "convolutions" in tensor_roles(captured("tiny-cnn")).values()


def test_bytes_of_float_and_quantized_files_add_up(captured: Captured, tmp_path: Path) -> None:
    compiled = gp.compile(captured("tiny-bert"), [PruneNeurons(0.5), Quantize("int8-dynamic")])
    manifest = compiled.export(tmp_path / "out", layout="flat").manifest
    for file, sizes in manifest["weights"].items():
        assert sum(sizes.values()) == manifest["sizes"][file]
        assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    dense, pruned = manifest["weights"]["baseline.onnx"], manifest["weights"]["model.onnx"]
    # Half of the units, a quarter of the bytes, and a scale a channel.
    assert pruned["feed-forward"] < dense["feed-forward"] / 4
    assert pruned["embeddings"] < dense["embeddings"] / 3
    roles = tensor_roles(compiled.program)
    assert bytes_by_role(tmp_path / "out" / "model.onnx", roles) == pruned
