"""LAMBADA: does a language model predict the last word of a passage?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from graphprune.errors import GraphPruneError
from graphprune.models.tasks.base import Progress, Task, TaskResult, silent
from graphprune.models.tasks.language import continuations, fraction, read_rows
from graphprune.training.outcome import MeanOutcome


def lambada(
    model: Any,
    tokenizer_dir: Path,
    data: Path | None = None,
    *,
    limit: int = 0,
    batch: int = 8,
    progress: Progress = silent,
) -> TaskResult:
    """Last-word accuracy on LAMBADA (Paperno et al. 2016), as lm-evaluation-harness has it.

    A word is right when each of its tokens is the likeliest after the passage and the word's
    earlier tokens. `more` has the perplexity a word: exp of the mean negative log-likelihood of the
    last word, all its tokens together.

    Args:
        model: a torch module, a Program or a session that gives logits [batch, tokens, vocabulary].
        tokenizer_dir: where the tokenizer's files are.
        data: test.jsonl (text; what follows its last white space is the word) or its folder;
            else $GRAPHPRUNE_DATA's.
        limit: so many passages from the start of the file; 0 for all.
        batch: rows that run together; the result does not depend on it.
        progress: called with (done, total) batches.

    Raises:
        GraphPruneError: the file is missing or broken, the tokenizer does not fit the model, or the
            model's logits are NaN or no logits.
    """
    file = TASK.find_data(data)
    rows, part = read_rows(file, ("text",), limit)
    texts = []
    for row in rows:
        parts = re.fullmatch(r"(.*\S)(\s+\S+)\s*", str(row["text"]), flags=re.DOTALL)
        if parts is None:
            raise GraphPruneError(
                f"{str(file)!r}: the passage {str(row['text'])[:60]!r} has no word before its last"
            )
        texts.append((parts[1], parts[2]))
    scored = continuations(model, tokenizer_dir, texts, batch=batch, progress=progress)
    right = [s.greedy for s in scored]
    mean = -sum(s.log_probability for s in scored) / len(scored)
    return TASK.result(
        MeanOutcome(torch.tensor(right)),
        standard_error=fraction(right)[1],
        details=part,
        more={"perplexity of the last word": torch.tensor(mean, dtype=torch.float64).exp().item()},
    )


TASK = Task(
    name="lambada",
    purpose="last-word accuracy of a language model on LAMBADA (needs --data)",
    metric="accuracy of the last word",
    run=lambda r: lambada(r.model, r.tokenizer_dir, r.data, progress=r.progress, **r.options),
    file="lambada/test.jsonl",
    source="LAMBADA",
    options=("limit",),
)
