"""Tasks: their arithmetic, and what they say when something is missing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import graphprune as gp
from graphprune.errors import GraphPruneError
from graphprune.models.tasks import TASKS, evaluate, find_data, runner
from graphprune.models.tasks.base import embed, longest
from graphprune.models.tasks.neighbors import common_neighbors, python_sentences
from graphprune.models.tasks.sts import read_pairs
from graphprune.models.zoo.tiny import tiny

HEADER = "genre\tscore\tsentence1\tsentence2"


def test_agreement_is_one_for_equal_embeddings_and_half_when_half_the_neighbors_agree() -> None:
    embeddings = torch.nn.functional.normalize(torch.randn(30, 8, generator=_seeded()), dim=1)
    assert common_neighbors(embeddings, embeddings.clone(), 5).mean() == 1.0
    angles = torch.tensor([0.0, 0.1, 0.3, 3.0])
    line = torch.stack([angles.cos(), angles.sin()], dim=1)
    # Points 0, 1, 2 are near each other; swapping 2 and 3 changes one of two neighbors.
    assert 0 < common_neighbors(line, line[[0, 1, 3, 2]], 2).mean() < 1


def test_python_sentences_are_many_distinct_and_always_the_same() -> None:
    sentences = python_sentences(400)
    assert len(set(sentences)) == 400
    assert list(sentences) == list(python_sentences(400))
    assert all(40 <= len(s) <= 300 for s in sentences)


def test_pairs_are_read_without_quoting(tmp_path: Path) -> None:
    file = tmp_path / "test.tsv"
    file.write_text(HEADER + '\nnews\t2.5\tHe said "no.\tHe refused.\n', "utf-8")
    assert read_pairs(find_data("sts", tmp_path)) == (['He said "no.'], ["He refused."], [2.5])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a\tb\n1\t2\n", "lacks the columns"),
        (HEADER + "\nnews\tmany\ta\tb\n", "line 2"),
        (HEADER + "\nnews\t1.0\ta\n", "line 2"),
        ("", "header line"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text(text, "utf-8")
    with pytest.raises(GraphPruneError, match=says):
        read_pairs(file)


def test_sts_without_data_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAPHPRUNE_DATA", raising=False)
    with pytest.raises(GraphPruneError, match="--data FILE"):
        find_data("sts", None)


def test_a_task_without_an_option_says_who_has_it() -> None:
    with pytest.raises(GraphPruneError, match="'sts' has no option --limit; it is for piqa and la"):
        evaluate("sts", None, limit=3)


def test_an_unknown_task_names_a_near_one() -> None:
    with pytest.raises(GraphPruneError, match="did you mean 'neighbors'"):
        evaluate("neighbours", None)


def test_text_tasks_need_a_tokenizer_and_neighbors_a_dense_model(tmp_path: Path) -> None:
    with pytest.raises(GraphPruneError, match="tokenizer"):
        evaluate("neighbors", None)
    with pytest.raises(GraphPruneError, match="dense"):
        evaluate("neighbors", None, tokenizer_dir=tmp_path)
    with pytest.raises(GraphPruneError, match="tokenizer"):
        evaluate("classification", None)
    language = {"perplexity", "piqa", "lambada"}
    assert set(TASKS) == {"neighbors", "sts", "digits", "classification", "regression"} | language


def test_a_runner_gives_a_session_only_the_inputs_that_it_has() -> None:
    class Input:
        name = "x"

    class Session:
        def get_inputs(self) -> list[Input]:
            return [Input()]

        def get_outputs(self) -> list[Input]:
            return [Input()]

        def run(self, names: list[str], feeds: dict[str, object]) -> list[object]:
            assert set(feeds) == {"x"}
            return [feeds["x"]]

    x = torch.ones(2)
    assert torch.equal(runner(Session())({"x": x, "mask": x}), x)


@pytest.mark.parametrize(
    # 64 positions; the second counts them from 2, the third has none to learn.
    ("name", "positions"),
    [("tiny-bert", 64), ("tiny-roberta", 62), ("tiny-llama", 128)],
)
@pytest.mark.slow
def test_a_text_is_as_long_as_the_model_takes(
    name: str, positions: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, inputs = tiny(name)
    compiled = gp.compile(model, [], example_inputs=dict(inputs))
    session = compiled.export(tmp_path / "out", baseline=False).session(1)
    capfd.readouterr()
    for form in (model, compiled.program, session):
        assert longest(form) == positions
        assert longest(form, 61) == 61
    # ONNX Runtime prints its errors, unless they are switched off.
    assert not any(capfd.readouterr())


def test_what_fails_at_every_length_is_no_shorter() -> None:
    def broken(input_ids: Tensor) -> Tensor:
        raise RuntimeError

    assert longest(broken) == 128


def test_embeddings_are_of_as_much_of_a_sentence_as_the_model_takes(words: Path) -> None:
    model, _ = tiny("tiny-bert")
    sentences = [" ".join(f"w{(7 * i) % 90}" for i in range(n)) for n in (100, 3, 64)]
    cut = [" ".join(s.split()[:64]) for s in sentences]
    found = embed(model, words, sentences)
    torch.testing.assert_close(found, embed(model, words, cut))
    assert (found[0] - embed(model, words, [" ".join(cut[0].split()[:32])])[0]).abs().max() > 1e-3


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_embeddings_that_say_nothing_are_judged_so(
    value: float, words: Path, tmp_path: Path
) -> None:
    file = tmp_path / "test.tsv"
    file.write_text(HEADER + "\nnews\t2.5\tw1\tw2\nnews\t1\tw3\tw4\n", "utf-8")

    def model(input_ids: Tensor) -> Tensor:
        return torch.full((len(input_ids), 3), value)

    if math.isfinite(value):
        assert evaluate("sts", model, tokenizer_dir=words, data=file).value == 0
        return
    with pytest.raises(GraphPruneError, match="embeddings hold NaN"):
        evaluate("sts", model, tokenizer_dir=words, data=file)


def test_digits_judge_any_classifier() -> None:
    pytest.importorskip("sklearn")

    def nine(pixel_values: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.full((len(pixel_values),), 9), 10)

    result = evaluate("digits", nine)
    assert result.count == 360
    assert result.value == pytest.approx(0.1, abs=0.01)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
