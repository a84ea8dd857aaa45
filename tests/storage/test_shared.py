"""Tensors that lie in the weights of an ONNX file are not saved twice, and come back equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import graphprune as gp
from graphprune.errors import ArtifactError
from graphprune.exporters import export
from graphprune.ir.program import Program
from graphprune.storage.folders import sha256
from graphprune.storage.shared import Weights, read_shared, shared_in

Captured = Callable[[str], Program]


def test_tensors_and_transposes_are_found_by_their_bytes(tmp_path: Path) -> None:
    plain, turned, other = torch.randn(20, 30), torch.randn(16, 32), torch.randn(20, 30)
    content = b"x" * 64 + plain.numpy().tobytes() + turned.t().contiguous().numpy().tobytes()
    (tmp_path / "data").write_bytes(content)
    weights = Weights(tmp_path, "data", ((64, plain.nbytes), (64 + plain.nbytes, turned.nbytes)))
    tensors = {
        "plain": plain,
        "turned": turned,
        "other": other,
        "double": plain.double(),
        "small": plain[:2, :3],
        "tied": plain,
    }
    found = shared_in(tensors, weights)
    assert found == {
        "plain": {"offset": 64, "shape": [20, 30], "transposed": False},
        "turned": {"offset": 64 + plain.nbytes, "shape": [32, 16], "transposed": True},
        "tied": {"offset": 64, "shape": [20, 30], "transposed": False},
    }
    read = read_shared(tmp_path, {"file": "data", "tensors": found})
    assert all(torch.equal(read[name], tensors[name]) for name in found)
    assert read["turned"].is_contiguous()
    found["plain"]["offset"] += len(content)
    with pytest.raises(ArtifactError, match="'plain' lies beyond the end of 'data'"):
        read_shared(tmp_path, {"file": "data", "tensors": found})


@pytest.mark.parametrize("name", ["tiny-mlp", "tiny-bert", "tiny-cnn"])
def test_a_program_beside_its_weights_comes_back_equal(
    name: str, captured: Captured, tmp_path: Path
) -> None:
    program = captured(name)
    export(program, tmp_path / "inside", weights="inside")
    export(program, tmp_path / "beside", weights="beside")
    for folder in ("inside", "beside"):
        loaded = gp.load(tmp_path / folder).program
        assert loaded.tensors.keys() == program.tensors.keys()
        assert all(torch.equal(loaded.tensors[n], t) for n, t in program.tensors.items())
    inside, beside = (
        (tmp_path / folder / "program" / "tensors.safetensors").stat().st_size
        for folder in ("inside", "beside")
    )
    # Batch norms are folded into convolutions, which then have other weights.
    assert beside < 0.3 * inside or name == "tiny-cnn"


def test_weights_that_another_wrote_are_refused(captured: Captured, tmp_path: Path) -> None:
    export(captured("tiny-mlp"), tmp_path / "out", weights="beside")
    data = tmp_path / "out" / "model.onnx_data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match=r"model\.onnx_data' is not the file"):
        gp.load(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"model\.onnx_data' is not the file"):
        gp.open(tmp_path / "out")
    data.unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx_data' is missing"):
        gp.load(tmp_path / "out")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_a_program_reads_no_weights_outside_of_its_folder(
    name: str, captured: Captured, tmp_path: Path
) -> None:
    export(captured("tiny-mlp"), tmp_path / "out", weights="beside")
    (tmp_path / "secret").write_bytes(b"0" * 100_000)
    file = tmp_path / "out" / "program" / "program.json"
    data = json.loads(file.read_text())
    data["shared"] |= {"file": name, "sha256": sha256(tmp_path / "secret")}
    file.write_text(json.dumps(data))
    manifest = tmp_path / "out" / "manifest.json"
    data = json.loads(manifest.read_text())
    data["sha256"]["program/program.json"] = sha256(file)
    manifest.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="outside the artifact"):
        gp.load(tmp_path / "out")
