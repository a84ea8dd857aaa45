"""The tasks "classification" and "regression": their arithmetic, for every kind of model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graphprune as gp
from graphprune.errors import GraphPruneError
from graphprune.models.data.tables import Schema
from graphprune.models.loading.loaded import LoadedModel
from graphprune.models.tasks import evaluate
from graphprune.models.zoo.heads import with_head
from graphprune.models.zoo.tiny import tiny

LETTERS = Schema("classification", ("text",), "label", ("a", "b", "c"))


def first_token(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Says class i of a text that begins with wi; [batch, 3]."""
    return torch.nn.functional.one_hot(input_ids[:, 0] - 2, 3).float()


def count(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """How many tokens; [batch, 1]."""
    return attention_mask.sum(1, keepdim=True).float()


def _file(folder: Path, *rows: str, header: str = "text\tlabel") -> Path:
    file = folder / "test.tsv"
    file.write_text("\n".join((header, *rows)) + "\n", "utf-8")
    return file


def test_accuracy_counts_right_answers_with_its_standard_error(words: Path, tmp_path: Path) -> None:
    # Three of four: the second is wrong. Lengths differ, so batches are not in the file's order.
    file = _file(tmp_path, "w0 w9 w9\ta", "w1\tc", "w1 w5\tb", "w2 w7 w7 w7\tc")
    found = evaluate("classification", first_token, tokenizer_dir=words, data=file, schema=LETTERS)
    assert (found.metric, found.value, found.count) == ("accuracy", 0.75, 4)
    assert found.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert found.higher_is_better


def test_classes_without_names_are_the_integers(words: Path, tmp_path: Path) -> None:
    file = _file(tmp_path, "w0\t0", "w1\t1", "w1\t2")
    found = evaluate("classification", first_token, tokenizer_dir=words, data=file)
    assert found.value == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("label", "schema", "says"),
    [
        ("d", LETTERS, r"line 2: the label 'd' is none of the model's 3 classes"),
        ("b", None, r"line 2: the label 'b' is a word"),
        ("3", None, r"label '3' is outside the head's range.*\[1, 3\]"),
    ],
)
def test_labels_that_the_head_does_not_know(
    words: Path, tmp_path: Path, label: str, schema: Schema | None, says: str
) -> None:
    file = _file(tmp_path, f"w0\t{label}")
    with pytest.raises(GraphPruneError, match=says):
        evaluate("classification", first_token, tokenizer_dir=words, data=file, schema=schema)


def test_regression_is_spearman_and_more_is_pearson(words: Path, tmp_path: Path) -> None:
    stats = pytest.importorskip("scipy.stats")
    lengths, scores = [5, 1, 3, 3, 2, 9], [2.5, 1.0, 1.0, 4.0, 0.5, 8.0]
    rows = [f"{'w1 ' * n}\t{s}" for n, s in zip(lengths, scores, strict=True)]
    file = _file(tmp_path, *rows, header="text\tscore")
    found = evaluate("regression", count, tokenizer_dir=words, data=file)
    assert found.metric == "Spearman"
    assert found.value == pytest.approx(float(stats.spearmanr(lengths, scores).statistic))
    assert found.more["Pearson"] == pytest.approx(float(stats.pearsonr(lengths, scores).statistic))
    with pytest.raises(GraphPruneError, match="one score a text"):
        evaluate("regression", first_token, tokenizer_dir=words, data=file)


@pytest.mark.parametrize("what", ["scores", "labels"])
def test_constant_scores_or_labels_correlate_with_nothing(
    what: str, words: Path, tmp_path: Path
) -> None:
    """The mean of thirty tenths need not be a tenth."""
    rows = [f"{'w1 ' * (1 + i % 4)}\t{0.1 if what == 'labels' else i}" for i in range(30)]

    def scores(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found = count(input_ids, attention_mask)
        return found * 0 + 0.1 if what == "scores" else found

    file = _file(tmp_path, *rows, header="text\tscore")
    found = evaluate("regression", scores, tokenizer_dir=words, data=file)
    assert (found.value, found.more["Pearson"]) == (0, 0)


@pytest.mark.parametrize(
    ("task", "model"), [("classification", first_token), ("regression", count)]
)
def test_scores_that_are_nan_are_refused(
    task: str, model: Any, words: Path, tmp_path: Path
) -> None:
    def broken(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return model(input_ids, attention_mask) * math.nan

    file = _file(tmp_path, "w0\t0", "w1\t1")
    with pytest.raises(GraphPruneError, match="scores are NaN or infinite"):
        evaluate(task, broken, tokenizer_dir=words, data=file)


@pytest.mark.parametrize(
    "task", ["classification", pytest.param("regression", marks=pytest.mark.slow)]
)
def test_module_program_and_session_are_judged_alike(
    task: str, words: Path, tmp_path: Path
) -> None:
    model, inputs = tiny("tiny-bert")
    names = ("input_ids", "attention_mask")
    loaded = LoadedModel(model, {n: inputs[n] for n in names}, "mine", tokenizer_dir=words)
    pair = ("sentence1", "sentence2")
    schema = Schema(task, pair, "label", ("a", "b", "c") if task == "classification" else ())
    made = with_head(loaded, schema)
    rows = []
    for _ in range(40):
        texts = [" ".join(f"w{_draw(90)}" for _ in range(1 + _draw(12))) for _ in pair]
        rows.append("\t".join([*texts, "abc"[_draw(3)] if schema.classes else str(_draw(100))]))
    file = _file(tmp_path, *rows, header="sentence1\tsentence2\tlabel")
    compiled = gp.compile(made.module, [], example_inputs=dict(made.example_inputs))
    session = compiled.export(tmp_path / "out", baseline=False).session(1)
    common: dict[str, Any] = {"tokenizer_dir": words, "data": file, "schema": schema}
    wanted = evaluate(task, made.module, **common)
    assert 0 < abs(wanted.value) < 1
    for other in (compiled.program, compiled.module, session):
        found = evaluate(task, other, **common)
        assert found.value == pytest.approx(wanted.value, abs=1e-3 if wanted.more else 0)


def test_long_texts_are_cut_as_the_model_needs_it(words: Path, tmp_path: Path) -> None:
    model, inputs = tiny("tiny-bert")
    loaded = LoadedModel(
        model, {n: inputs[n] for n in ("input_ids", "attention_mask")}, "mine", tokenizer_dir=words
    )
    made = with_head(loaded, LETTERS)
    texts = [" ".join(f"w{_draw(90)}" for _ in range(40 + _draw(60))) for _ in range(40)]
    labels = ["abc"[_draw(3)] for _ in texts]
    values = []
    for length in (100, 64):
        rows = [
            f"{' '.join(text.split()[:length])}\t{label}"
            for text, label in zip(texts, labels, strict=True)
        ]
        common: dict[str, Any] = {"data": _file(tmp_path, *rows), "schema": LETTERS}
        values.append(evaluate("classification", made.module, tokenizer_dir=words, **common).value)
    assert values[0] == values[1]


def _draw(n: int) -> int:
    return int(torch.randint(n, ()))
