"""Tasks: how good is a model? Each evaluates any callable: a torch program or an ORT session."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from graphprune.errors import GraphPruneError
from graphprune.models.data.overlap import overlap
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
from graphprune.models.tasks.base import (
    Progress,
    Request,
    Task,
    TaskResult,
    Watched,
    runner,
    silent,
)
from graphprune.training.outcome import Outcome

__all__ = [
    "TASKS",
    "TRAINABLE",
    "Task",
    "TaskResult",
    "check",
    "evaluate",
    "find_data",
    "runner",
    "task_evaluation",
    "unknown_task",
]

_log = logging.getLogger(__name__)

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
    task: str | Task,
    model: Any,
    *,
    tokenizer_dir: Path | None = None,
    dense: Any = None,
    data: Path | None = None,
    schema: Schema | None = None,
    progress: Progress = silent,
    **options: int,
) -> TaskResult:
    """Evaluate a model by a task.

    Args:
        task: a name from TASKS, or a record like those.
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
    record = _checked(task, options, tokenizer_dir, dense)
    return record.run(
        Request(
            model=model,
            tokenizer_dir=tokenizer_dir or Path(),
            dense=dense,
            data=data,
            schema=schema or Schema(record.name),
            progress=progress,
            options=options,
        )
    )


def task_evaluation(
    task: str | Task,
    tokenizer_dir: Path | None = None,
    data: Path | None = None,
    *,
    calibration: Sequence[Mapping[str, Tensor]] = (),
    **given: Any,
) -> Callable[[Any], Outcome]:
    """A function from a model to what it does on each item of a task, for `Budget(task=...)`.

    Args:
        task: a name from TASKS, or a record like those.
        tokenizer_dir: where the model's tokenizer is, for text.
        data: the task's file or folder; also found through $GRAPHPRUNE_DATA.
        calibration: batches that the task's data should have nothing of: when the first model is
            evaluated, a warning is logged that says how many of its inputs they have.
        given: "dense", "schema", "progress" and the task's options, as `evaluate` takes them.

    Raises:
        GraphPruneError: as `evaluate`, and before any model runs where something is missing.
    """
    own = {name: v for name, v in given.items() if name not in ("dense", "schema", "progress")}
    record = _checked(task, own, tokenizer_dir, given.get("dense"))
    if record.file:
        record.find_data(data)
    unchecked = [calibration] if calibration else []

    def outcome(model: Any) -> Outcome:
        watched = Watched(model) if unchecked else model
        found = evaluate(record, watched, tokenizer_dir=tokenizer_dir, data=data, **given)
        if unchecked and (shared := overlap(unchecked.pop(), watched.fed)):
            _log.warning(
                "%d inputs of the task %r are in the calibration data too: what a model that was "
                "calibrated on them loses on others may be more; evaluate on other data",
                shared,
                record.name,
            )
        return found.outcome

    return outcome


def _checked(
    task: str | Task, options: Iterable[str], tokenizer_dir: Path | None, dense: Any
) -> Task:
    """The record of a task, once it is clear that it can run."""
    if isinstance(task, str):
        check(task, options)
    record = TASKS[task] if isinstance(task, str) else task
    if record.reads_text and tokenizer_dir is None:
        raise GraphPruneError(
            f"the task {record.name!r} needs the model's tokenizer, and none was found"
        )
    if record.compares and dense is None:
        raise GraphPruneError(
            f"the task {record.name!r} compares with the dense model, and none was given"
        )
    return record


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
