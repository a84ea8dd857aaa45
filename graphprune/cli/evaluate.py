"""`graphprune eval`: how good a model is, by a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphprune.cli.app import (
    ArtifactOrModel,
    Json,
    LabelColumn,
    Metric,
    Pickle,
    TextColumn,
    print_json,
    stdout_console,
)
from graphprune.cli.early import check_exists, check_metric
from graphprune.cli.names import TASKS, complete_task
from graphprune.cli.subject import Subject, opened
from graphprune.errors import GraphPruneError, first_line

if TYPE_CHECKING:
    from graphprune.models.tasks import Task
    from graphprune.pipeline.events import JSON
    from graphprune.progress import Advance

Columns = tuple[tuple[str, ...], str]

NO_COLUMNS: Columns = ((), "")


def eval_command(
    model: ArtifactOrModel,
    task: Annotated[
        str,
        typer.Option(
            help="sts, neighbors, digits, perplexity, piqa, lambada, classification or regression.",
            autocompletion=complete_task,
        ),
    ] = "",
    metric: Metric = "",
    data: Annotated[
        Path | None,
        typer.Option(help="The task's file or folder; default: the one under $GRAPHPRUNE_DATA."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=2, help="perplexity: tokens of a window. Default 512."),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=0, help="perplexity: so many, from the start. Default all.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=0, help="piqa, lambada: so many examples from the start. Default all."),
    ] = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = "",
    as_json: Json = False,
    allow_pickle: Pickle = False,
) -> None:
    """Evaluate a model by a task or a metric of yours; an artifact beside the dense model."""
    given = {"window": window, "windows": windows, "limit": limit}
    options = {name: number for name, number in given.items() if number is not None}
    columns = (tuple(text_column or ()), label_column)
    if bool(task) == bool(metric):
        raise GraphPruneError(
            f"give --task, one of {', '.join(TASKS)}, or --metric FILE.py:FUNCTION, and not both"
        )
    if metric:
        check_metric(metric)
        other: dict[str, object] = {
            "--data": data,
            "--text-column": text_column,
            "--label-column": label_column,
        }
        other |= {f"--{name}": number for name, number in options.items()}
        for name, value in other.items():
            if value:
                raise GraphPruneError(f"{name} is for --task; a metric reads its own data")

    check_exists(data)

    # From here on torch is imported.
    from graphprune.cli.tables import quality_table

    record = own_metric(metric) or checked_task(task, data, options)
    with (
        opened(model, allow_pickle) as (subject, display),
        display.step(f"task {record.name}") as advance,
    ):
        results = evaluate_subject(subject, record, data, advance, options, columns)
    if as_json:
        print_json({"model": model, **results})
    else:
        stdout_console().print(quality_table(results))


def own_metric(metric: str, *, per_item: bool = False) -> Task | None:
    """The task of a function of the user's; None where none was given.

    Args:
        metric: FILE.py:FUNCTION; the file is run.
        per_item: whether a drop is bounded by it.
    """
    from graphprune.models.tasks.own import own_task

    return own_task(metric, per_item=per_item) if metric else None


def checked_task(task: str, data: Path | None, options: Mapping[str, int] | None = None) -> Task:
    """The task, whose options and data were checked before a model is loaded.

    Raises:
        GraphPruneError: there is no such task or option, or the task's data is missing.
    """
    from graphprune.models.tasks import TASKS, check

    check(task, options or {})
    if TASKS[task].file:
        TASKS[task].find_data(data)
    return TASKS[task]


def evaluate_subject(
    subject: Subject,
    task: Task,
    data: Path | None,
    advance: Advance,
    options: Mapping[str, int] | None = None,
    columns: Columns = NO_COLUMNS,
) -> dict[str, JSON]:
    """Task results by "pruned" and "dense"; a model that is no artifact has only the latter.

    Args:
        subject: what is evaluated.
        task: the task, or one made of a metric.
        data: the task's file or folder, or None for the usual place.
        advance: called with the progress, from 0 for each of the two models.
        options: the task's own options.
        columns: a labeled file's columns of text, and of labels; by default those that the subject
            was trained on.

    Raises:
        GraphPruneError: the task needs what the subject does not have.
    """
    common: dict[str, Any] = {"data": data, "tokenizer_dir": subject.tokenizer_dir}
    common |= options or {}
    if task.labeled:
        schema = subject.schema(task.name)
        text, label = columns
        common["schema"] = replace(schema, text=text or schema.text, label=label or schema.label)
    try:
        return _results(subject, task, common, advance)
    except GraphPruneError:
        raise
    except Exception as e:
        # ONNX Runtime's errors have no common class.
        foreign = type(e).__module__.startswith("onnxruntime")
        if not foreign and not isinstance(e, ValueError | TypeError | RuntimeError | IndexError):
            raise
        raise GraphPruneError(
            f"task {task.name!r} cannot feed this model: {first_line(e)}; "
            "`graphprune eval --help` says what each task is for"
        ) from e


def _results(
    subject: Subject, task: Task, common: Mapping[str, Any], advance: Advance
) -> dict[str, JSON]:
    from graphprune.models.tasks import evaluate

    if task.compares:
        models = subject.models(comparing=task.name)
        result = evaluate(task, models["pruned"], dense=models["dense"], progress=advance, **common)
        # The dense model agrees with itself.
        figures = result.to_json()
        return {"pruned": figures, "dense": {**figures, "value": 1.0}}
    return {
        which: evaluate(task, model, progress=advance, **common).to_json()
        for which, model in subject.models().items()
    }
