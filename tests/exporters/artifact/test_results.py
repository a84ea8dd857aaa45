"""Results are noted in the manifest and drawn on the page, and hashes stay true."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import graphprune as gp
from graphprune.errors import ArtifactError
from graphprune.exporters import Artifact, export, open_artifact
from graphprune.exporters.artifact.results import add_results, write_reports
from graphprune.ir.program import Program
from graphprune.passes import PruneNeurons
from graphprune.report.report import ModelSize, Report

Captured = Callable[[str], Program]
SIZE = ModelSize(12, 48, 96)
REPORT = Report("Net", SIZE, SIZE)


@pytest.mark.parametrize("value", [math.nan, object()])
def test_results_that_cannot_be_noted_leave_the_artifact(
    captured: Captured, tmp_path: Path, value: Any
) -> None:
    compiled = gp.compile(captured("tiny-mlp"), [PruneNeurons(0.5)])
    artifact = compiled.export(tmp_path / "out", baseline=False)
    page = (tmp_path / "out" / "report.html").read_bytes()
    with pytest.raises(ArtifactError, match="results cannot be noted in"):
        add_results(artifact, compiled.report, {"other": {"value": value}})
    assert (tmp_path / "out" / "report.html").read_bytes() == page
    assert open_artifact(tmp_path / "out").manifest == artifact.manifest


@pytest.fixture
def artifact(program_of: Callable[..., Program], tmp_path: Path) -> Artifact:
    """An artifact of one operator, without a page."""

    def write(graph: fx.Graph, node: dict[str, fx.Node]) -> tuple[fx.Node, ...]:
        return (graph.call_function(torch.ops.aten.mul.Tensor, (node["x"], node["w"])),)

    program = program_of({"w": torch.randn(3)}, {"x": torch.randn(2, 3)}, write)
    return export(program, tmp_path / "out")


def quality(value: float) -> dict[str, Any]:
    return {"pruned": {"task": "sts", "metric": "Spearman", "value": value, "count": 9}}


def test_results_of_one_name_replace_earlier_ones_and_others_stay(artifact: Artifact) -> None:
    once = add_results(artifact, REPORT, {"quality": quality(0.5), "other": 1})
    again = add_results(once, REPORT, {"quality": quality(0.75)})
    assert again.manifest["results"] == {"quality": quality(0.75), "other": 1}
    assert json.loads((artifact.path / "manifest.json").read_text()) == again.manifest
    page = (artifact.path / "report.html").read_bytes()
    assert b"0.7500" in page
    assert b"0.5000" not in page
    markdown = (artifact.path / "report.md").read_text()
    assert "0.7500" in markdown
    assert "0.5000" not in markdown
    assert again.manifest["sha256"]["report.html"] == hashlib.sha256(page).hexdigest()
    assert open_artifact(artifact.path).manifest == again.manifest
    assert list(artifact.path.glob(".*")) == []
    # What was given is a value: neither manifest nor hashes of it were written to.
    assert "results" not in artifact.manifest
    assert "report.html" not in artifact.manifest["sha256"]


def test_reports_are_written_with_their_hashes(tmp_path: Path) -> None:
    manifest: dict[str, Any] = {"sha256": {"other": "1"}}
    write_reports(REPORT, manifest, tmp_path)
    names = ["report.html", "report.md"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    hashes = {n: hashlib.sha256((tmp_path / n).read_bytes()).hexdigest() for n in names}
    assert manifest["sha256"] == {"other": "1", **hashes}
