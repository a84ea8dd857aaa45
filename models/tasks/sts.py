"""STS Benchmark: do cosine similarities follow human scores?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from graphprune.models.data.tables import read_table
from graphprune.models.tasks.base import Progress, Task, TaskResult, embed, silent
from graphprune.training.outcome import RankOutcome


def spearman_of_cosine(
    model: Any,
    tokenizer_dir: Path,
    data: Path | None = None,
    progress: Progress = silent,
) -> TaskResult:
    """Spearman's rank correlation between the pairs' cosine and their human score."""
    first, second, scores = read_pairs(TASK.find_data(data))
    # A sentence that occurs in several pairs is embedded once.
    unique = {sentence: i for i, sentence in enumerate(dict.fromkeys(first + second))}
    embeddings = embed(model, tokenizer_dir, list(unique), progress=progress)
    left = embeddings[[unique[s] for s in first]]
    right = embeddings[[unique[s] for s in second]]
    return TASK.result(RankOutcome((left * right).sum(dim=1), torch.tensor(scores)), guess=0.0)


def read_pairs(file: Path) -> tuple[list[str], list[str], list[float]]:
    """First sentences, second sentences and scores from a TAB-separated file with a header line.

    Raises:
        GraphPruneError: a column is missing or a row is broken; the line is named.
    """
    table = read_table(file, "regression", ("sentence1", "sentence2"), "score")
    first, second = (list(part) for part in zip(*table.texts, strict=True))
    return first, second, table.scores()


TASK = Task(
    name="sts",
    purpose="Spearman of cosine similarity and human scores (STS Benchmark; needs --data)",
    metric="Spearman",
    meaning="how well the order of the cosine similarities follows the order of human scores: 1 is "
    "the same order, 0 is chance",
    items="sentence pairs",
    run=lambda r: spearman_of_cosine(r.model, r.tokenizer_dir, r.data, r.progress),
    file="stsb/test.tsv",
    source="the STS Benchmark",
)
