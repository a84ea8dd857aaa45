"""Export for ONNX Runtime with kernels: what is refused, what is written, and what it computes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from graphprune import compile
from graphprune.api import Compiled
from graphprune.errors import ExportError, GraphPruneError
from graphprune.exporters import Artifact
from graphprune.exporters.kernels.choose import STOCK, Chooser, Variant
from graphprune.exporters.kernels.library import needs_library
from graphprune.ir.program import Program
from graphprune.passes import Magnitude, Quantize
from graphprune.pipeline.device import Cost
from graphprune.report.measured import Measured

Captured = Callable[[str], Program]
TARGET = "onnxruntime+kernels"


def pruned(program: Program, *more: Any) -> Compiled:
    return compile(program, [Magnitude(0.75, pattern="16x4", indivisible="skip"), *more])


@pytest.fixture(scope="module")
def artifact(captured: Captured, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A model whose products with zeros are all sparse, however fast this machine is."""
    pytest.importorskip("graphprune_kernels", reason="graphprune-kernels is not installed")

    def measured(
        self: Chooser, wanted: Mapping[str, tuple[Any, Variant]], bits: int, mark: Any
    ) -> dict[str, Cost]:
        times = {key: 2.0 if v.name in STOCK else 1.0 for key, (_, v) in wanted.items()}
        return {key: Cost(ms, 1, ms, ms) for key, ms in times.items()}

    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAPHPRUNE_CACHE", str(folder / "cache"))
        patch.setattr(Chooser, "_measured", measured)
        compiled = pruned(captured("tiny-bert"), Quantize("int8-dynamic", reduce_range=True))
        return compiled.export(folder / "out", target=TARGET)


def test_the_manifest_says_what_was_chosen(artifact: Artifact) -> None:
    notes = artifact.manifest["quantization"]["model.onnx"]
    layers = [layer for record in notes["choices"] for layer in record["layers"]]
    assert artifact.manifest["target"] == TARGET
    assert notes["sparse"] == len(layers) > 0
    assert set(artifact.manifest["kernels"]) == {"version", "isa", "bits", "cpu", "threads"}
    assert needs_library(artifact.model_path)
    assert not needs_library(artifact.baseline_path)


def test_reports_have_a_row_for_each_choice(artifact: Artifact) -> None:
    rows = Measured(artifact.manifest).choices()
    assert len(rows) == len(artifact.manifest["quantization"]["model.onnx"]["choices"])
    text = (artifact.path / "report.md").read_text(encoding="utf-8")
    page = (artifact.path / "report.html").read_text(encoding="utf-8")
    for written in (text, page):
        assert "Sparse products" in written
        assert rows[0][0] in written


def test_with_kernels_and_without_it_computes_the_same(
    artifact: Artifact, captured: Captured
) -> None:
    import graphprune_kernels

    entry = captured("tiny-bert").forward
    feeds = artifact.feeds(tuple(entry.example))
    plain = onnxruntime.InferenceSession(str(artifact.model_path)).run(None, feeds)
    own = artifact.session(1).run(None, feeds)
    theirs = graphprune_kernels.session(artifact.path, threads=1).run(None, feeds)
    for a, b, c in zip(own, theirs, plain, strict=True):
        np.testing.assert_array_equal(a, b)
        # Without, activations stay float: their rounding is all that is between the two.
        assert np.linalg.norm(a - c) <= 0.05 * np.linalg.norm(c)


def test_a_float_model_is_refused(captured: Captured, tmp_path: Path) -> None:
    pytest.importorskip("graphprune_kernels", reason="graphprune-kernels is not installed")
    with pytest.raises(ExportError, match=r"add Quantize\('int8-dynamic'\) as the last pass"):
        pruned(captured("tiny-bert")).export(tmp_path / "out", target=TARGET)
    assert not (tmp_path / "out").exists()


def test_a_device_is_refused_where_nothing_is_chosen(captured: Captured, tmp_path: Path) -> None:
    for given in ({"device": tmp_path / "device.json"}, {"batch": (1, 8)}):
        with pytest.raises(ExportError, match="device and batch are for the choice of sparse"):
            compile(captured("tiny-mlp"), []).export(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_other_schemes_are_refused(captured: Captured, tmp_path: Path) -> None:
    pytest.importorskip("graphprune_kernels", reason="graphprune-kernels is not installed")
    with pytest.raises(ExportError, match="no operators for scheme 'int4-weights'"):
        pruned(captured("tiny-bert"), Quantize("int4-weights")).export(
            tmp_path / "out", target=TARGET
        )


def test_the_package_is_asked_for_before_any_work(
    captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "graphprune_kernels", None)
    with pytest.raises(GraphPruneError, match="not installed"):
        pruned(captured("tiny-bert"), Quantize("int8-dynamic")).export(
            tmp_path / "out", target=TARGET
        )
    assert not (tmp_path / "out").exists()
