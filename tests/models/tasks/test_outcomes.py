"""Outcomes of tasks: one of all items is the task's figure, and models are compared by them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graphprune.errors import GraphPruneError
from graphprune.models.data.calibration import text_batches
from graphprune.models.tasks import TASKS, evaluate, task_evaluation
from graphprune.models.tasks.base import Watched, runner
from graphprune.training.outcome import paired_drop

ROWS = [f"{'w1 ' * (i % 7)}w{i} w{i + 1}" for i in range(40)]
Model = Callable[..., Tensor]


def embedder(noise: float) -> Model:
    """Embeds words at random, and the place of a word with some noise."""
    table = torch.randn(92, 8, generator=torch.Generator().manual_seed(0))
    table += noise * torch.randn(92, 8, generator=torch.Generator().manual_seed(1))

    def embed(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return table[input_ids] * attention_mask.unsqueeze(2)

    return embed


def tagger(noise: float) -> Model:
    """Two scores of a text."""
    embed = embedder(noise)
    return lambda input_ids, attention_mask: embed(input_ids, attention_mask).sum(1)[:, :2]


def scorer(noise: float) -> Model:
    """One score of a text."""
    tag = tagger(noise)
    return lambda input_ids, attention_mask: tag(input_ids, attention_mask)[:, :1]


def language(noise: float) -> Model:
    """Logits from the last word alone, high ones for the next number."""
    table = torch.randn(92, 92, generator=torch.Generator().manual_seed(0))
    table += torch.full((91,), 3.0).diag(1)
    table += noise * torch.randn(92, 92, generator=torch.Generator().manual_seed(1))
    return lambda input_ids: table[input_ids]


def pixels(noise: float) -> Model:
    """Ten scores of an image."""
    table = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    table += noise * torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
    return lambda pixel_values: pixel_values.flatten(1) @ table


MODELS: Mapping[str, Callable[[float], Model]] = {
    "sts": embedder,
    "neighbors": embedder,
    "classification": tagger,
    "regression": scorer,
    "perplexity": language,
    "piqa": language,
    "lambada": language,
    "digits": pixels,
}


def data_of(task: str, folder: Path) -> Path | None:
    """A file of forty items."""
    if task in ("neighbors", "digits"):
        return None
    if task in ("piqa", "lambada"):
        rows: list[dict[str, Any]] = [
            {"text": row, "goal": row, "sol1": "w3 w4", "sol2": f"w{i}", "label": i % 2}
            for i, row in enumerate(ROWS)
        ]
        content = "".join(json.dumps(row) + "\n" for row in rows)
    elif task == "perplexity":
        content = "\n".join(ROWS)
    else:
        columns = {"sts": ["sentence1", "sentence2", "score"]}.get(task, ["text", "label"])
        rows_of_text = [[*[row] * (len(columns) - 1), str(i % 2)] for i, row in enumerate(ROWS)]
        content = "\n".join("\t".join(row) for row in [columns, *rows_of_text])
    file = folder / "data.tsv"
    file.write_text(content, "utf-8")
    return file


def options_of(task: str) -> dict[str, Any]:
    if task == "perplexity":
        return {"window": 5}
    return {"dense": embedder(0.0)} if TASKS[task].compares else {}


@pytest.mark.parametrize("task", list(TASKS))
def test_all_items_of_an_outcome_are_the_figure(task: str, words: Path, tmp_path: Path) -> None:
    if task == "digits":
        pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    common = {"tokenizer_dir": words, "data": data_of(task, tmp_path), **options_of(task)}
    model = MODELS[task](1.0)
    found = evaluate(task, model, **common)
    outcome = found.outcome
    assert outcome.value() == found.value
    assert outcome.higher_is_better == found.higher_is_better == TASKS[task].higher_is_better
    assert outcome.count == (found.count if task != "perplexity" else found.count / 4)
    # An item has the same place in every run, and what is drawn matters.
    again = task_evaluation(task, **common)(model)
    some, others = torch.split(torch.arange(outcome.count), [13, outcome.count - 13])
    assert outcome.value(some) == again.value(some)
    assert outcome.value(some) != outcome.value(others)
    assert "outcome" not in json.dumps(found.to_json())
    assert found.to_json()["value"] == found.value


def test_two_models_are_compared_by_their_outcomes(words: Path, tmp_path: Path) -> None:
    measure = task_evaluation(TASKS["perplexity"], words, data_of("perplexity", tmp_path), window=5)
    dense, pruned = measure(language(0.0)), measure(language(1.0))
    drop = paired_drop(dense, pruned)
    assert drop.observed == pytest.approx(pruned.value() / dense.value() - 1)
    assert drop.lower < drop.observed < drop.upper
    assert drop.items == dense.count > 30


def test_what_is_missing_is_said_before_a_model_runs(tmp_path: Path, words: Path) -> None:
    with pytest.raises(GraphPruneError, match="there is no file"):
        task_evaluation("sts", words, tmp_path / "none.tsv")
    with pytest.raises(GraphPruneError, match="needs the model's tokenizer"):
        task_evaluation("sts")
    with pytest.raises(GraphPruneError, match="compares with the dense model"):
        task_evaluation("neighbors", words)
    with pytest.raises(GraphPruneError, match="no option --limit"):
        task_evaluation("sts", words, limit=3)
    with pytest.raises(GraphPruneError, match="there is no task"):
        task_evaluation("st", words)


def test_calibration_on_the_tasks_data_is_warned_of_once(
    words: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = data_of("sts", tmp_path)
    names = ("input_ids", "attention_mask")
    shared, apart = (
        text_batches(texts, names, words) for texts in ([*ROWS[:3], "w9"], ["w9 w8 w7"])
    )
    with caplog.at_level(logging.WARNING):
        task_evaluation("sts", words, file, calibration=apart)(embedder(0.0))
        assert not caplog.records
        measure = task_evaluation("sts", words, file, calibration=shared)
        assert measure(embedder(0.0)).value() == measure(embedder(0.0)).value()
    assert len(caplog.records) == 1
    assert "3 inputs of the task 'sts' are in the calibration data" in caplog.text


def test_a_watched_model_keeps_what_it_is_fed_and_no_trials() -> None:
    watched = Watched(lambda x: x + 1)
    assert torch.equal(runner(watched)({"x": torch.zeros(1)}), torch.ones(1))
    runner(watched, quiet=True)({"x": torch.ones(1)})
    assert [batch["x"].item() for batch in watched.fed] == [0]
