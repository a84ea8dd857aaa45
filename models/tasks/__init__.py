"""Tasks: how good is a model? Each judges anything callable, a torch program or an ORT session."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graphprune.errors import GraphPruneError
from graphprune.models.tasks.base import TaskResult as TaskResult
from graphprune.models.tasks.base import runner as runner

__all__ = ["TASKS", "TaskResult", "evaluate", "runner", "unknown_task"]

# name -> one line for the help page
TASKS = {
    "neighbours": "share of nearest neighbours that dense and pruned models agree on",
    "sts": "Spearman of cosine similarity and human scores (STS Benchmark; needs --data)",
    "digits": "accuracy on the 360 held-out handwritten digits of scikit-learn",
}


def evaluate(
    task: str,
    model: Any,
    *,
    tokenizer_dir: Path | None = None,
    dense: Any = None,
    data: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TaskResult:
    """Judge a model by a task.

    Args:
        task: a name from TASKS.
        model: a torch module, a Program or an onnxruntime session.
        tokenizer_dir: where the model's tokenizer is, for text.
        dense: the unpruned model, for "neighbours".
        data: the task's file or folder; for "sts" also found through $GRAPHPRUNE_DATA.
        progress: called with (done, total) batches.

    Raises:
        GraphPruneError: the task is unknown, or something that it needs is missing.
    """
    if task == "digits":
        from graphprune.models.tasks.digits import accuracy

        return accuracy(model, progress)
    if task not in TASKS:
        raise unknown_task(task)
    if tokenizer_dir is None:
        raise GraphPruneError(f"the task {task!r} needs the model's tokenizer, and none was found")
    if task == "sts":
        from graphprune.models.tasks.sts import spearman_of_cosine

        return spearman_of_cosine(model, tokenizer_dir, data, progress)
    if dense is None:
        raise GraphPruneError(
            "the task 'neighbours' compares with the dense model, and none was given"
        )
    from graphprune.models.tasks.neighbours import agreement

    return agreement(model, dense, tokenizer_dir, progress=progress)


def unknown_task(task: str) -> GraphPruneError:
    """The error for a task that does not exist; a near match is named."""
    near = difflib.get_close_matches(task, TASKS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return GraphPruneError(f"there is no task {task!r}, only {', '.join(TASKS)}{hint}")
