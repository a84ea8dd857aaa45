"""What would keep others from loading a folder, as a table, as JSON and by the exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from onnx import TensorProto, helper
from typer.testing import Result

from graphprune.models.hub import consumer_names

Run = Callable[..., Result]
Sentence = Callable[[Result], str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An ONNX file and nothing else."""
    shape = ("batch_size", "sequence_length")
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, shape)
    out = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, (*shape, 4))
    node = helper.make_node("Identity", ["input_ids"], ["last_hidden_state"])
    model = helper.make_model(
        helper.make_graph([node], "tiny", [ids], [out]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    made = tmp_path / "made"
    made.mkdir()
    (made / "model.onnx").write_bytes(model.SerializeToString())
    return made


def test_all_consumers_are_listed_and_nothing_fails(run: Run, folder: Path) -> None:
    result = run("check", str(folder))
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line[1:2].isalpha()]
    shown = {row[0]: row[1] for row in rows[1:]}
    assert list(shown) == consumer_names()
    assert shown["onnxruntime"] == "yes"
    assert shown["tei"] == "no"
    assert "tokenizer.json is missing" in " ".join(result.stdout.split())


def test_help_names_every_consumer(run: Run) -> None:
    shown = " ".join(run("check", "--help").stdout.replace("│", " ").split())
    assert all(f"{name}," in shown or f"{name} or" in shown for name in consumer_names()[:-1])
    assert f"or {consumer_names()[-1]};" in shown


def test_a_named_consumer_decides_the_exit_code(run: Run, folder: Path) -> None:
    assert run("check", str(folder), "--for", "onnxruntime,openvino").exit_code == 0
    result = run("check", str(folder), "--for", "onnxruntime, tei")
    assert result.exit_code == 1
    assert "fastembed" not in result.stdout
    assert result.stderr == ""


def test_json_holds_problems_and_notes(run: Run, folder: Path) -> None:
    result = run("check", str(folder), "--for", "tei,onnxruntime", "--json")
    assert result.exit_code == 1
    tei, runtime = json.loads(result.stdout)
    assert (tei["consumer"], tei["loads"], tei["opens"]) == ("tei", False, ["model.onnx"])
    assert any("config.json is missing" in p for p in tei["problems"])
    assert runtime["loads"]
    assert "1.17" in runtime["notes"][0]


def test_an_artifact_of_graphprune(run: Run, artifact: Path) -> None:
    result = run("check", str(artifact), "--for", "onnxruntime,genai", "--json")
    runtime, genai = json.loads(result.stdout)
    assert runtime["loads"]
    assert runtime["notes"]
    assert not genai["loads"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("made", "--for", "fastembd"), "no consumer 'fastembd' is known; did you mean 'fastembed"),
        (("made", "--for", "tei,word2vec"), "no consumer 'word2vec' is known; there are ["),
        (("made", "--for", ","), "--for names no consumer"),
        (("nowhere",), "'nowhere' is no folder; give the folder of an ONNX model"),
        (("empty",), "'empty' holds no .onnx file"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(
    run: Run,
    sentence: Sentence,
    folder: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    (tmp_path / "empty").mkdir()
    result = run("check", *arguments)
    assert result.exit_code == 2
    assert says in sentence(result)
