"""Labeled files: accuracy of a classifier, or rank correlation of a score with the labels."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from graphprune.errors import GraphPruneError
from graphprune.models.data.batches import table_batches
from graphprune.models.data.tables import Schema, Table
from graphprune.models.tasks.base import Progress, Task, TaskResult, longest, scored, silent
from graphprune.training.metrics import pearson
from graphprune.training.outcome import MeanOutcome, RankOutcome

# A model takes those that it has.
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def evaluate_labeled(
    model: Any,
    tokenizer_dir: Path,
    file: Path,
    schema: Schema,
    progress: Progress = silent,
) -> TaskResult:
    """Evaluate scores against a file's labels.

    1. "classification": accuracy, with one standard error sqrt(p (1 - p) / n).
    2. "regression": Spearman's rank correlation; `more` has Pearson's. Both are 0 where the
       scores or the labels are constant.

    Args:
        model: a torch module, a Program or a session whose first output is [batch, scores].
        tokenizer_dir: where the tokenizer's files are.
        file: texts and labels.
        schema: columns and classes; without classes they are the integers from 0.
        progress: called with (done, total) batches.

    Raises:
        GraphPruneError: the file is broken, a label is not the head's, or the model gives something
            else than finite scores.
    """
    table = schema.read(file)
    if schema.task == "classification" and not schema.classes:
        schema = replace(schema, classes=_integers(table))
    batches = table_batches(
        table, schema, _INPUTS, tokenizer_dir, length=longest(model), shuffle=False
    )
    scores, wanted = scored(
        model, batches, progress, lambda scores, labels: _check(scores, labels, schema)
    )
    scores = scores.float()
    if schema.task == "regression":
        scores, wanted = scores.flatten().double(), wanted.double()
        more = {"Pearson": pearson(scores, wanted)}
        return REGRESSION.result(RankOutcome(scores, wanted), more=more)
    outcome = MeanOutcome(scores.argmax(dim=-1) == wanted)
    right = outcome.value()
    error = math.sqrt(right * (1 - right) / outcome.count)
    return CLASSIFICATION.result(outcome, standard_error=error)


def _integers(table: Table) -> tuple[str, ...]:
    """The names 0 to the highest label of a file whose labels are the numbers of the classes."""
    for row, label in enumerate(table.labels):
        if not label.isdecimal():
            raise GraphPruneError(
                f"{table.line(row)}: the label {label!r} is a word, and the model does not say "
                "which of its classes that is; give their numbers, from 0"
            )
    return tuple(map(str, range(max(map(int, table.labels)) + 1)))


def _check(scores: Tensor, labels: Tensor, schema: Schema) -> None:
    """Refuse outputs that are no scores for these labels."""
    if schema.task == "regression":
        if scores.numel() != len(labels):
            raise GraphPruneError(
                f"the model's first output has shape {list(scores.shape)}; a regression has one "
                "score a text"
            )
    elif scores.dim() != 2 or int(labels.max()) >= scores.shape[1]:
        raise GraphPruneError(
            f"label {schema.classes[int(labels.max())]!r} is outside the head's range: the model's "
            f"first output has shape {list(scores.shape)}, [texts, classes] is wanted"
        )
    # A class may be ruled out by -inf, the best one may not.
    best = scores if schema.task == "regression" else scores.amax(-1)
    if not bool(best.isfinite().all()):
        raise GraphPruneError(
            "the model's scores are NaN or infinite for some of the texts, so there is nothing to "
            "evaluate: a layer before overflows, or its weights are broken"
        )


CLASSIFICATION: Task = Task(
    name="classification",
    purpose="accuracy of a classifier of text on a labeled file (needs --data)",
    metric="accuracy",
    run=lambda r: evaluate_labeled(
        r.model, r.tokenizer_dir, CLASSIFICATION.find_data(r.data), r.schema, r.progress
    ),
    file="sst2/test.tsv",
    source="SST-2, or any file of texts and labels",
    labeled=True,
)
REGRESSION: Task = Task(
    name="regression",
    purpose="Spearman of one score a text and the labels of a file (needs --data)",
    metric="Spearman",
    run=lambda r: evaluate_labeled(
        r.model, r.tokenizer_dir, REGRESSION.find_data(r.data), r.schema, r.progress
    ),
    file="stsb/test.tsv",
    source="the STS Benchmark, or any file of texts and scores",
    labeled=True,
)
