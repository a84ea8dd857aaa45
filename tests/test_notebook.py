"""What a notebook and a Python prompt show of the objects that people hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import graphprune
from graphprune import notebook
from graphprune.exporters.artifact.artifact import Artifact
from graphprune.models.zoo.tiny import tiny
from graphprune.passes import PruneNeurons


def test_html_is_escaped_and_well_formed() -> None:
    found = notebook.block(
        "a < b",
        notebook.paragraph("<script>"),
        notebook.paragraph(""),
        notebook.table(("<x>", "n"), [("&", 1)]),
        notebook.folded("why", ["<1>"]),
        notebook.folded("none", []),
    )
    assert "<script>" not in found
    root = ElementTree.fromstring(found)
    assert [node.text for node in root.iter("p")] == ["<script>"]
    assert [cell.text for cell in root.iter("td")] == ["&", "1"]
    assert [node.text for node in root.iter("li")] == ["<1>"]


def shown(value: Any) -> str:
    """The text of what a notebook shows."""
    return "".join(ElementTree.fromstring(value._repr_html_()).itertext())


def test_what_people_hold_is_shown_in_a_line_and_in_a_notebook(tmp_path: Path) -> None:
    model, inputs = tiny("tiny-mlp")
    compiled = graphprune.compile(model, [PruneNeurons(0.5)], example_inputs=inputs)
    groups = graphprune.inspect(model, example_inputs=inputs)
    text = "(Mlp: prune-neurons; 1,333 -> 477 parameters, -64.2 %)"
    assert repr(compiled) == f"Compiled{text}"
    assert repr(compiled.report) == f"Report{text}"
    assert (
        repr(compiled.report.passes[0]) == "PassReport(prune-neurons: 28 of 56 neurons in 2 groups)"
    )
    assert repr(groups) == "AxisGroups(4 axis groups, 2 free, 2 frozen; 1,333 parameters)"
    assert "-64.2 %" in shown(compiled)
    assert "Verification: removing the units equals masking them" in shown(compiled.report)
    assert "neuron" in shown(groups)
    assert "frozen" in shown(groups)

    artifact = compiled.export(tmp_path / "out")
    assert repr(artifact) == f"Artifact({str(tmp_path / 'out')!r}, {', '.join(artifact._sizes())})"
    assert "model.onnx 0.0" in repr(artifact)
    assert "baseline.onnx 0.0" in repr(artifact)
    assert "batch" in shown(artifact)
    timing = {"pruned_ms": 1.5, "batch": "1x8", "threads": 1, "speedup": 2.0, "against": "dense"}
    quality = {"pruned": {"metric": "accuracy", "value": 0.5}}
    measured = {**artifact.manifest, "results": {"timing": timing, "quality": quality}}
    text = shown(Artifact(artifact.path, measured))
    assert "1.50 ms, batch 1x8, 1 thread: 2.00x as fast as dense" in text
    assert "accuracy of pruned: 0.5000" in text
