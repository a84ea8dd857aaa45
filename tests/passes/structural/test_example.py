"""The structural pass that CONTRIBUTING shows works as it stands there."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import graphprune as gp
from graphprune.ir.program import Program
from graphprune.passes.structural import scores
from graphprune.pipeline import registry
from graphprune.pipeline.recipe import load

PAGE = Path(__file__).parents[3] / "CONTRIBUTING.md"
LINES = 60


def _example() -> str:
    (found,) = (
        block.partition("```")[0]
        for block in PAGE.read_text(encoding="utf-8").split("```python\n")[1:]
        if "(StructuralPass)" in block.partition("```")[0]
    )
    return found


def test_a_structural_pass_is_one_short_file(
    captured: Callable[[str], Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = _example()
    assert len(text.splitlines()) <= LINES
    # What the module registers is forgotten afterwards.
    monkeypatch.setattr(registry, "_passes", registry.registered())
    monkeypatch.setattr(scores, "SCORES", dict(scores.SCORES))
    file = tmp_path / "quiet.py"
    file.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("quiet", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quiet", module)
    spec.loader.exec_module(module)

    program = captured("tiny-bert")
    recipe = {"passes": [{"prune-quiet-neurons": {"ratio": 0.5, "heads": True}}]}
    (step,) = load(recipe)
    assert all(registry.meanings(type(step)).values())
    compiled = gp.compile(program, recipe)
    details = compiled.report.passes[0].details
    assert {g["role"] for g in details["groups"]} == {"head", "neuron"}
    assert all(g["after"] == g["before"] / 2 for g in details["groups"])
    assert details["verification"]["max_error"] <= 1e-5
    weight = program.tensors["encoder.layer.0.output.dense.weight"]
    largest = weight.abs().amax(0).argsort(descending=True)[: weight.shape[1] // 2]
    kept = next(
        details["kept"][g["id"]]
        for g in details["groups"]
        if g["role"] == "neuron" and "layer.0" in g["id"]
    )
    assert kept == sorted(largest.tolist())
