"""The lists of passes, recipes and models."""

from __future__ import annotations

import json
from collections.abc import Callable

from typer.testing import Result

Run = Callable[..., Result]


def test_passes_recipes_and_models_are_listed(run: Run) -> None:
    passes = {p["name"]: p for p in json.loads(run("passes", "--json").stdout)}
    options = {o["option"]: o for o in passes["prune-heads"]["options"]}
    assert options["ratio"]["default"] == "required"
    assert options["score"]["default"] == "magnitude"
    assert all(o["meaning"] for o in options.values())
    assert "prune-heads" in run("passes").stdout
    for name, text in json.loads(run("recipes", "--json").stdout).items():
        assert name in run("recipes").stdout
        assert text
    assert "minilm" in run("models").stdout


def test_recipes_say_what_they_need(run: Run) -> None:
    found = json.loads(run("recipes", "--json").stdout)
    needing = {name for name, row in found.items() if row["needs"]}
    assert needing == {"edge", "edge-int8", "gentle", "neuroprune", "recover", "sparse"}
