"""Neighbors: does the pruned encoder find the same nearest sentences as the dense one?

Needs no data: the sentences are those of Python's own help topics, which every installation has.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import GraphPruneError
from graphprune.models.tasks.base import Progress, Task, TaskResult, embed, silent
from graphprune.training.outcome import MeanOutcome

SENTENCES = 400
NEIGHBORS = 10


def agreement(
    model: Any,
    dense: Any,
    tokenizer_dir: Path,
    count: int = SENTENCES,
    progress: Progress = silent,
) -> TaskResult:
    """Mean fraction of each sentence's ten nearest neighbors that both models name."""
    sentences = python_sentences(count)
    ours = embed(
        model, tokenizer_dir, sentences, progress=lambda done, total: progress(done, 2 * total)
    )
    theirs = embed(
        dense,
        tokenizer_dir,
        sentences,
        progress=lambda done, total: progress(total + done, 2 * total),
    )
    return TASK.result(MeanOutcome(common_neighbors(ours, theirs, NEIGHBORS)))


def common_neighbors(ours: Tensor, theirs: Tensor, neighbors: int) -> Tensor:
    """Fraction of each row's nearest neighbors that two embeddings [n, width] share; [n]."""
    lists = []
    for embeddings in (ours, theirs):
        similarity = embeddings @ embeddings.T
        similarity.fill_diagonal_(-torch.inf)
        lists.append(similarity.topk(neighbors, dim=1).indices)
    same = (lists[0].unsqueeze(2) == lists[1].unsqueeze(1)).any(dim=2)
    return same.double().mean(dim=1)


def python_sentences(count: int) -> Sequence[str]:
    """Sentences of 40 to 300 characters from Python's help topics, drawn with a fixed seed.

    Raises:
        GraphPruneError: this Python was installed without its help topics.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as e:
        raise GraphPruneError(
            "this Python has no help topics (the module pydoc_data), which the task 'neighbors' "
            "reads; install the whole standard library, or use --task sts"
        ) from e
    found: dict[str, None] = {}
    for _, text in sorted(topics.items()):
        for paragraph in text.split("\n\n"):
            # Indented paragraphs are grammar and code.
            if paragraph.startswith("   "):
                continue
            flat = re.sub(r'[*"`]|\(\*note.*?\)', "", re.sub(r"\s+", " ", paragraph)).strip()
            for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", flat):
                if 40 <= len(sentence) <= 300 and sentence[-1] in ".!?":
                    found.setdefault(sentence)
    return random.Random(0).sample(list(found), min(count, len(found)))


TASK = Task(
    name="neighbors",
    purpose="fraction of nearest neighbors that dense and pruned models agree on",
    metric=f"agreement of {NEIGHBORS} nearest",
    run=lambda r: agreement(r.model, r.dense, r.tokenizer_dir, progress=r.progress),
    compares=True,
)
