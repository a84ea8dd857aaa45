"""Spans: whole texts with their labels, and runs of their words with none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import GraphPruneError
from graphprune.models.data.spans import Spans
from graphprune.models.data.tables import Schema, Table

SCHEMA = Schema("classification", classes=("0", "1"))
Row = tuple[tuple[int, ...], int]


def made(
    texts: Sequence[tuple[str, ...]], folder: Path, count: int, schema: Schema = SCHEMA
) -> Spans:
    table = Table(Path("x.tsv"), ("a", "b")[: len(texts[0])], "label", tuple(texts),
                  tuple(str(i % 2) for i in range(len(texts))))  # fmt: skip
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    return Spans(table, schema, inputs, folder, count, size=4)


def read(spans: Spans) -> list[Row]:
    """Token ids and label of every row of one reading."""
    return [
        (tuple(ids[mask.bool()].tolist()), int(label))
        for batch in spans
        for ids, mask, label in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        )
    ]


@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=7), count=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_texts_keep_their_labels_and_spans_have_none(
    lengths: list[int], count: int, words: Path
) -> None:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    each = [range(s, s + n) for s, n in zip(starts, lengths, strict=True)]  # no word twice
    spans = made([(" ".join(f"w{i}" for i in run),) for run in each], words, count)
    rows = read(spans)
    assert len(rows) == len(lengths) * (1 + count)
    assert len(list(spans)) == len(spans)
    whole = sorted(row for row in rows if row[1] >= 0)
    assert whole == [(tuple(i + 2 for i in run), k % 2) for k, run in enumerate(each)]
    found = dict.fromkeys(range(len(each)), 0)
    for ids, label in rows:
        if label >= 0:
            continue
        assert label == -100
        (owner,) = (k for k, run in enumerate(each) if ids[0] - 2 in run)
        assert ids == tuple(range(ids[0], ids[0] + len(ids)))
        assert ids[-1] - 2 in each[owner]
        assert min(3, lengths[owner]) <= len(ids)
        found[owner] += 1
    assert set(found.values()) == {count}


def test_every_reading_has_other_spans_and_the_seed_gives_them(words: Path) -> None:
    texts = [(" ".join(f"w{i}" for i in range(40)),), (" ".join(f"w{i}" for i in range(40, 80)),)]
    spans = made(texts, words, 8)
    torch.manual_seed(3)
    first, second = read(spans), read(spans)
    assert {ids for ids, label in first if label < 0} != {ids for ids, label in second if label < 0}
    torch.manual_seed(3)
    assert read(spans) == first
    lengths = {len(ids) for _ in range(20) for ids, label in read(spans) if label < 0}
    assert {3, 40} < lengths


def test_of_a_pair_each_text_is_cut_independently(words: Path) -> None:
    pair = (" ".join(f"w{i}" for i in range(20)), " ".join(f"w{i}" for i in range(20, 40)))
    spans = made([pair, pair], words, 10)
    lengths = set()
    for batch in spans:
        for ids, mask, types in zip(
            batch["input_ids"], batch["attention_mask"], batch["token_type_ids"], strict=True
        ):
            second = (ids >= 22)[mask.bool()]
            assert torch.equal(second, types[mask.bool()].bool())
            lengths.add((int((~second).sum()), int(second.sum())))
    assert all(3 <= length <= 20 for both in lengths for length in both)
    assert len({a for a, _ in lengths}) > 3
    assert len({b for _, b in lengths}) > 3
    assert any(a != b for a, b in lengths)


def test_calibration_is_whole_texts(words: Path) -> None:
    spans = made([("w0 w1 w2 w3",), ("w4 w5 w6 w7",)], words, 5)
    (batch,) = spans.unlabeled(100)
    assert batch["input_ids"].shape == (2, 4)
    assert "labels" not in batch


def test_scores_are_refused(words: Path) -> None:
    with pytest.raises(GraphPruneError, match="for classification, and the task is regression"):
        made([("w0",), ("w1",)], words, 2, Schema("regression"))
    with pytest.raises(GraphPruneError, match="count must be a whole number of at least 1, got 0"):
        made([("w0",), ("w1",)], words, 0)
