"""A model and a metric of the user's own, by the name of a Python file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import graphprune
from graphprune.models import load_model
from graphprune.models.tasks import evaluate
from graphprune.models.tasks.own import own_task

Run = Callable[..., Result]
Sentence = Callable[[Result], str]

OWN = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    return net, {"input": torch.randn(4, 6)}

def batch():
    return torch.randn(64, 6, generator=torch.Generator().manual_seed(1))

def agreement(model):
    made = make()[0](batch()).argmax(-1)
    return (model({"input": batch()}).argmax(-1) == made).float()

def number(model):
    return float(model({"input": batch()}).abs().mean())

def nothing(model):
    return None

def infinite(model):
    return float("inf")

def broken(model):
    raise KeyError("labels")
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, beside which commands run."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path / "cache"))


def test_a_model_is_evaluated_by_a_metric_and_compiled_with_it(run: Run) -> None:
    dense = run("eval", "own.py:make", "--metric", "own.py:agreement", "--json")
    assert dense.exit_code == 0, dense.stderr
    found = json.loads(dense.stdout)["dense"]
    assert (found["metric"], found["value"], found["count"]) == ("agreement", 1.0, 64)
    made = run(
        "compile", "own.py:make", "--neurons", "0.5", "--metric", "own.py:agreement",
        "--no-measure", "-o", "out", "--json",
    )  # fmt: skip
    assert made.exit_code == 0, made.stderr
    quality = json.loads(made.stdout)["quality"]
    assert quality["dense"]["value"] == 1.0
    assert 0.0 < quality["pruned"]["value"] < 1.0
    # The same function runs the ONNX files of the folder.
    folder = run("eval", "out", "--metric", "own.py:number", "--json")
    assert folder.exit_code == 0, folder.stderr
    figures = json.loads(folder.stdout)
    assert figures["pruned"]["value"] != figures["dense"]["value"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("eval", "own.py:make", "--metric", "own.py:nothing"), "returned None: return a number"),
        (("eval", "own.py:make", "--metric", "own.py:infinite"), "returned inf: there is nothing"),
        (("eval", "own.py:make", "--metric", "own.py:broken"), "failed: KeyError: 'labels' at"),
        (("eval", "own.py:make", "--metric", "own.py:agrement"), "did you mean 'agreement'"),
        (("eval", "own.py:make", "--metric", "own.py:number", "--task", "sts"), "not both"),
        (("eval", "own.py:make", "--metric", "own.py:number", "--limit", "3"), "is for --task"),
        (("inspect", "own.py:mak"), "did you mean 'make'"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_sentence(
    run: Run, sentence: Sentence, arguments: tuple[str, ...], says: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert says in sentence(result)


@pytest.mark.slow
def test_a_drop_is_bounded_by_a_metric(run: Run, tmp_path: Path) -> None:
    import numpy as np

    x = np.random.default_rng(0).normal(size=(128, 6)).astype(np.float32)
    np.savez(tmp_path / "samples.npz", input=x)
    found = run(
        "compile", "own.py:make", "--max-drop", "0.5", "--metric", "own.py:agreement",
        "--calibration", "samples.npz", "--no-measure", "-o", "out", "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.stderr
    details = json.loads(found.stdout)["report"]["passes"][0]["details"]
    assert details["budget"]["asked"] == {"max_drop": 0.5}


def test_a_metric_calls_module_and_program_by_the_same_names(run: Run) -> None:
    made = load_model("own.py:make")
    compiled = graphprune.compile(made.module, [], example_inputs=made.example_inputs)
    task = own_task("own.py:agreement")
    for model in (made.module, compiled.program, compiled.module):
        assert evaluate(task, model).value == 1.0
