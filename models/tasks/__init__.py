"""Tasks: how good is a model? Each judges anything callable, a torch program or an ORT session."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from graphprune.errors import GraphPruneError
from graphprune.models.data.tables import Schema
from graphprune.models.tasks import (
    digits,
    labeled,
    lambada,
    neighbors,
    perplexity,
    piqa,
    sts,
)
from graphprune.models.tasks.base import Progress, Request, Task, TaskResult, runner, silent

__all__ = [
    "TASKS",
    "TRAINABLE",
    "Task",
    "TaskResult",
    "check",
    "evaluate",
    "find_data",
    "runner",
    "unknown_task",
]

TASKS = {
    task.name: task
    for task in (
        neighbors.TASK,
        sts.TASK,
        digits.TASK,
        perplexity.TASK,
        piqa.TASK,
        lambada.TASK,
        labeled.CLASSIFICATION,
        labeled.REGRESSION,
    )
}

# Those whose data can train a model too: first those that read the user's file.
TRAINABLE = (
    *(name for name, task in TASKS.items() if task.labeled),
    *(name for name, task in TASKS.items() if task.examples is not None),
)


def evaluate(
    task: str,
    model: Any,
    *,
    tokenizer_dir: Path | None = None,
    dense: Any = None,
    data: Path | None = None,
    schema: Schema | None = None,
    progress: Progress = silent,
    **options: int,
) -> TaskResult:
    """Judge a model by a task.

    Args:
        task: a name from TASKS.
        model: a torch module, a Program or an onnxruntime session.
        tokenizer_dir: where the model's tokenizer is, for text.
        dense: the unpruned model, for "neighbors".
        data: the task's file or folder; also found through $GRAPHPRUNE_DATA.
        schema: for "classification" and "regression": the columns, and the classes in the order of
            the model's scores. Without it columns are recognized, and classes are 0, 1 and so on.
        progress: called with (done, total) batches.
        options: "window" and "windows" of "perplexity", "limit" of "piqa" and "lambada".

    Raises:
        GraphPruneError: the task is unknown, something that it needs is missing, or it does not
            have an option.
    """
    check(task, options)
    record = TASKS[task]
    if record.reads_text and tokenizer_dir is None:
        raise GraphPruneError(f"the task {task!r} needs the model's tokenizer, and none was found")
    if record.compares and dense is None:
        raise GraphPruneError(
            f"the task {task!r} compares with the dense model, and none was given"
        )
    return record.run(
        Request(
            model=model,
            tokenizer_dir=tokenizer_dir or Path(),
            dense=dense,
            data=data,
            schema=schema or Schema(task),
            progress=progress,
            options=options,
        )
    )


def check(task: str, options: Iterable[str]) -> None:
    """Refuse an unknown task, and an option that the task does not have.

    Raises:
        GraphPruneError: the task is not in TASKS, or an option is another task's or none.
    """
    if task not in TASKS:
        raise unknown_task(task)
    for name in options:
        if name not in TASKS[task].options:
            having = [other.name for other in TASKS.values() if name in other.options]
            raise GraphPruneError(
                f"the task {task!r} has no option --{name}"
                + (f"; it is for {' and '.join(having)}" if having else "")
            )


def find_data(task: str, data: Path | None) -> Path:
    """The file of the task of a name (`Task.find_data`)."""
    return TASKS[task].find_data(data)


def unknown_task(task: str) -> GraphPruneError:
    """The error for a task that does not exist; a near match is named."""
    near = difflib.get_close_matches(task, TASKS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return GraphPruneError(f"there is no task {task!r}, only {', '.join(TASKS)}{hint}")
