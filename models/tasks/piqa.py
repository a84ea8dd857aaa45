"""PIQA: which of two ways to reach a goal does a language model think likelier?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from graphprune.errors import GraphPruneError
from graphprune.models.tasks.base import Progress, Task, TaskResult, silent
from graphprune.models.tasks.language import continuations, fraction, read_rows
from graphprune.training.outcome import MeanOutcome


def piqa(
    model: Any,
    tokenizer_dir: Path,
    data: Path | None = None,
    *,
    limit: int = 0,
    batch: int = 8,
    progress: Progress = silent,
) -> TaskResult:
    """Zero-shot accuracy on PIQA (Bisk et al. 2019), by the protocol of lm-evaluation-harness.

    The log-probability of each solution after "Question: {goal}\\nAnswer:". The figure is acc_norm:
    the solution with the higher log-probability a character wins. `more` has acc, without the
    division. Chance is 0.5.

    Args:
        model: a torch module, a Program or a session that gives logits [batch, tokens, vocabulary].
        tokenizer_dir: where the tokenizer's files are.
        data: valid.jsonl (goal, sol1, sol2, label: 0 or 1) or its folder; else $GRAPHPRUNE_DATA's.
        limit: so many questions from the start of the file; 0 for all.
        batch: rows that run together; the result does not depend on it.
        progress: called with (done, total) batches.

    Raises:
        GraphPruneError: the file is missing or broken, the tokenizer does not fit the model, or the
            model's logits are NaN or no logits.
    """
    file = TASK.find_data(data)
    rows, part = read_rows(file, ("goal", "sol1", "sol2", "label"), limit)
    for row in rows:
        if row["label"] not in (0, 1) or not (row["sol1"] and row["sol2"]):
            raise GraphPruneError(
                f"{str(file)!r}: the question {str(row['goal'])[:60]!r} needs two solutions and a "
                f"label that is 0 or 1, its label is {row['label']!r}"
            )
    texts = [
        (f"Question: {row['goal']}\nAnswer:", f" {row[solution]}")
        for row in rows
        for solution in ("sol1", "sol2")
    ]
    scored = continuations(model, tokenizer_dir, texts, batch=batch, progress=progress)
    plain, normalized = [], []
    for i, row in enumerate(rows):
        first, second = (s.log_probability for s in scored[2 * i : 2 * i + 2])
        plain.append((second > first) == bool(row["label"]))
        first, second = first / len(row["sol1"]), second / len(row["sol2"])
        normalized.append((second > first) == bool(row["label"]))
    return TASK.result(
        MeanOutcome(torch.tensor(normalized)),
        standard_error=fraction(normalized)[1],
        details=part,
        more={"accuracy, log-probability (acc)": fraction(plain)[0]},
    )


TASK = Task(
    name="piqa",
    purpose="zero-shot accuracy of a language model on PIQA (needs --data)",
    metric="accuracy, log-probability a character (acc_norm)",
    run=lambda r: piqa(r.model, r.tokenizer_dir, r.data, progress=r.progress, **r.options),
    file="piqa/valid.jsonl",
    source="PIQA",
    options=("limit",),
)
