"""Tasks: how good is a model? Each judges anything callable, a torch program or an ORT session."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from graphprune.errors import GraphPruneError
from graphprune.models.data.tables import Schema
from graphprune.models.tasks.base import DATA
from graphprune.models.tasks.base import TaskResult as TaskResult
from graphprune.models.tasks.base import find_data as find_data
from graphprune.models.tasks.base import runner as runner

__all__ = [
    "LABELLED",
    "TASKS",
    "TaskResult",
    "check",
    "evaluate",
    "find_data",
    "runner",
    "unknown_task",
]

# name -> one line for the help page
TASKS = {
    "neighbours": "share of nearest neighbours that dense and pruned models agree on",
    "sts": "Spearman of cosine similarity and human scores (STS Benchmark; needs --data)",
    "digits": "accuracy on the 360 held-out handwritten digits of scikit-learn",
    "perplexity": "of a language model on a text, in windows (WikiText-2; needs --data)",
    "piqa": "zero-shot accuracy of a language model on PIQA (needs --data)",
    "lambada": "last-word accuracy of a language model on LAMBADA (needs --data)",
    "classification": "accuracy of a classifier of text on a labelled file (needs --data)",
    "regression": "Spearman of one score a text and the labels of a file (needs --data)",
}

# Their data are files of texts and labels, which can train a model too.
LABELLED = ("classification", "regression")

# task -> its options beside the data
OPTIONS = {
    "perplexity": ("window", "windows"),
    "piqa": ("limit",),
    "lambada": ("limit",),
}


def evaluate(
    task: str,
    model: Any,
    *,
    tokenizer_dir: Path | None = None,
    dense: Any = None,
    data: Path | None = None,
    schema: Schema | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: int,
) -> TaskResult:
    """Judge a model by a task.

    Args:
        task: a name from TASKS.
        model: a torch module, a Program or an onnxruntime session.
        tokenizer_dir: where the model's tokenizer is, for text.
        dense: the unpruned model, for "neighbours".
        data: the task's file or folder; also found through $GRAPHPRUNE_DATA.
        schema: for "classification" and "regression": the columns, and the classes in the order of
            the model's scores. Without it columns are recognised, and classes are 0, 1 and so on.
        progress: called with (done, total) batches.
        options: "window" and "windows" of "perplexity", "limit" of "piqa" and "lambada".

    Raises:
        GraphPruneError: the task is unknown, something that it needs is missing, or it does not
            have an option.
    """
    check(task, options)
    if task == "digits":
        from graphprune.models.tasks.digits import accuracy

        return accuracy(model, progress)
    if tokenizer_dir is None:
        raise GraphPruneError(f"the task {task!r} needs the model's tokenizer, and none was found")
    if task == "sts":
        from graphprune.models.tasks.sts import spearman_of_cosine

        return spearman_of_cosine(model, tokenizer_dir, data, progress)
    if task == "perplexity":
        from graphprune.models.tasks.perplexity import perplexity

        return perplexity(model, tokenizer_dir, data, progress=progress, **options)
    if task == "piqa":
        from graphprune.models.tasks.piqa import piqa

        return piqa(model, tokenizer_dir, data, progress=progress, **options)
    if task == "lambada":
        from graphprune.models.tasks.lambada import lambada

        return lambada(model, tokenizer_dir, data, progress=progress, **options)
    if task in LABELLED:
        from graphprune.models.tasks.labelled import judge

        return judge(model, tokenizer_dir, find_data(task, data), schema or Schema(task), progress)
    if dense is None:
        raise GraphPruneError(
            "the task 'neighbours' compares with the dense model, and none was given"
        )
    from graphprune.models.tasks.neighbours import agreement

    return agreement(model, dense, tokenizer_dir, progress=progress)


def check(task: str, options: Iterable[str]) -> None:
    """Refuse an unknown task, and an option that the task does not have.

    Raises:
        GraphPruneError: so it is.
    """
    if task not in TASKS:
        raise unknown_task(task)
    for name in options:
        if name not in OPTIONS.get(task, ()):
            having = [other for other, names in OPTIONS.items() if name in names]
            raise GraphPruneError(
                f"the task {task!r} has no option --{name}"
                + (f"; it is for {' and '.join(having)}" if having else "")
            )


def needs_data(task: str) -> bool:
    """Whether a task reads a file (`find_data`)."""
    return task in DATA


def unknown_task(task: str) -> GraphPruneError:
    """The error for a task that does not exist; a near match is named."""
    near = difflib.get_close_matches(task, TASKS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return GraphPruneError(f"there is no task {task!r}, only {', '.join(TASKS)}{hint}")
