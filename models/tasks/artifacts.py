"""Evaluating an artifact: its tokenizer, and what its head answers, are in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graphprune.errors import GraphPruneError
from graphprune.models.data.tables import Schema
from graphprune.models.hub.source import tokenizer_dir
from graphprune.models.loading.loaded import LABELS, SCHEMA
from graphprune.models.tasks import TASKS, TaskResult, evaluate


def evaluate_artifact(
    artifact: Any, task: str, *, data: Path | None = None, dense: bool = False, **options: Any
) -> TaskResult:
    """Evaluate an artifact by a task.

    Args:
        artifact: a `graphprune.exporters.Artifact`.
        task: a name from TASKS.
        data: the task's file or folder; also found through $GRAPHPRUNE_DATA.
        dense: evaluate its baseline instead.
        options: as `evaluate` takes them.

    Raises:
        GraphPruneError: there is no such task, or it needs what the artifact or its data lack.
    """
    if task in TASKS and TASKS[task].labeled:
        options.setdefault("schema", artifact_schema(artifact, task))
    if task in TASKS and TASKS[task].compares:
        options["dense"] = artifact.baseline_session()
    session = artifact.baseline_session() if dense else artifact.session()
    return evaluate(task, session, tokenizer_dir=tokenizer_dir(artifact.path), data=data, **options)


def artifact_schema(artifact: Any, task: str) -> Schema:
    """The schema of an artifact's head: as it was trained, or from its files.

    Raises:
        GraphPruneError: it has no head for this task.
    """
    folder = artifact.path / artifact.layout.own
    if (folder / SCHEMA).is_file():
        found = Schema.from_file(folder / SCHEMA)
        if found.task != task:
            raise GraphPruneError(
                f"{str(artifact.path)!r} was trained for {found.task}: give --task {found.task}"
            )
        return found
    if "logits" not in [output["name"] for output in artifact.manifest["outputs"]]:
        raise headless(str(artifact.path), task)
    names: dict[str, str] = {}
    if (folder / LABELS).is_file():
        names = json.loads((folder / LABELS).read_text(encoding="utf-8"))
    return Schema(task, classes=tuple(names[key] for key in sorted(names, key=int)))


def headless(name: str, task: str) -> GraphPruneError:
    """The error for a model or artifact that has no head for a task."""
    return GraphPruneError(
        f"{name!r} has no head for {task}: compile MODEL with --task {task} --train FILE first"
    )
