"""The library: asked for only where a file needs it, and a sentence where it is not there."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from graphprune.errors import GraphPruneError
from graphprune.exporters.kernels.library import (
    LIBRARY,
    find_library,
    needs_library,
    with_library,
)
from graphprune.exporters.kernels.lower import Form, lower
from graphprune.exporters.quantize.layers import find_layers
from graphprune.exporters.runtime.session import open_session
from tests.exporters.kernels.networks import blocky, network


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """One model dense, and sparse."""
    weight = blocky(np.random.default_rng(0), 32, 16, 32, 0.5)
    dense, sparse = (network([weight], ["relu"], [None]) for _ in range(2))
    lower(sparse, {layer: Form(32, 7) for layer in find_layers(sparse)})
    paths = tmp_path / "dense.onnx", tmp_path / "sparse.onnx"
    for path, model in zip(paths, (dense, sparse), strict=True):
        onnx.save(model, path)
    return paths


def test_a_file_needs_it_that_has_its_operator(files: tuple[Path, Path], tmp_path: Path) -> None:
    dense, sparse = files
    assert not needs_library(dense)
    assert needs_library(sparse)
    assert not needs_library(tmp_path / "missing.onnx")
    (tmp_path / "empty.onnx").touch()
    assert not needs_library(tmp_path / "empty.onnx")


def test_without_it_one_sentence_says_what_to_install(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "graphprune_kernels", None)
    dense, sparse = files
    assert with_library({"a": "b"}, [dense]) == {"a": "b"}
    with pytest.raises(GraphPruneError, match="'graphprune-kernels', which is not installed"):
        open_session(sparse, 1)
    assert open_session(dense, 1) is not None


def test_with_it_the_configuration_names_it(files: tuple[Path, Path]) -> None:
    pytest.importorskip("graphprune_kernels", reason="graphprune-kernels is not installed")
    dense, sparse = files
    assert with_library({}, [dense, sparse]) == {LIBRARY: find_library().path}
    x = np.random.default_rng(0).standard_normal((2, 3, 16)).astype(np.float32)
    (expected,) = open_session(dense, 1).run(None, {"x": x})
    (actual,) = open_session(sparse, 1).run(None, {"x": x})
    np.testing.assert_allclose(actual, expected, atol=0.03 * np.abs(expected).max())
