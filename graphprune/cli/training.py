"""What the command line trains with: labelled files, a head for them, a dense model to prune."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from graphprune.errors import GraphPruneError, RecipeError
from graphprune.events import JSON, Event, Observer, PassStarted
from graphprune.passbase import Context, Pass
from graphprune.registry import suggest

if TYPE_CHECKING:
    from torch import Tensor

    from graphprune.api import Compiled
    from graphprune.exporters import Artifact
    from graphprune.models import LoadedModel
    from graphprune.models.tables import Schema, Table
    from graphprune.training import Training

DIGITS = "digits"
TASKS = ("classification", "regression", DIGITS)
# A small network that was trained at a high rate does not move at the usual one.
_RATES = {DIGITS: 1e-3}
_RATE = 5e-5
_DENSE = "dense"  # the folder of the dense model's checkpoints


@final
@dataclass(frozen=True, slots=True)
class Wish:
    """The command line's options about training, as they were given.

    Attributes:
        task: one of TASKS, or empty.
        train, eval: labelled files.
        text, label: names of their columns; recognised where empty.
        epochs: of the dense model, where its head is fresh.
        lr: learning rate of that, and of --finetune and --distill; None for the task's usual one.
        batch: examples of a batch.
        checkpoints: a folder for checkpoints.
        resume: go on from those that are there.
    """

    task: str = ""
    train: Path | None = None
    eval: Path | None = None
    text: tuple[str, ...] = ()
    label: str = ""
    epochs: int = 2
    lr: float | None = None
    batch: int = 32
    checkpoints: Path | None = None
    resume: bool = False

    @property
    def rate(self) -> float:
        """The learning rate."""
        return _RATES.get(self.task, _RATE) if self.lr is None else self.lr


@final
@dataclass(frozen=True, slots=True)
class Lesson:
    """A wish whose files were read; what a model is trained on and judged by.

    Attributes:
        wish: as it was given.
        schema: columns and classes; None for the digits, which bring their own data.
        train, eval: the rows, where a file was given.
    """

    wish: Wish
    schema: Schema | None = None
    train: Table | None = None
    eval: Table | None = None

    @property
    def trains(self) -> bool:
        """Whether there is something to train on."""
        return self.wish.task == DIGITS or self.train is not None

    @property
    def judges(self) -> bool:
        """Whether there is something to judge by."""
        return self.wish.task == DIGITS or self.eval is not None


def lesson_of(wish: Wish, steps: Sequence[Pass]) -> Lesson | None:
    """Check the options about training, and read their files, before a model is loaded.

    Returns:
        None where the command line names no task.

    Raises:
        GraphPruneError: options are missing or do not go together, or a file is broken.
    """
    training = " and ".join(dict.fromkeys(step.name for step in steps if step.needs_training))
    if not wish.task:
        given = {"--train": wish.train, "--eval": wish.eval, "--checkpoints": wish.checkpoints}
        alone = next((name for name, value in given.items() if value is not None), None)
        if alone is not None:
            raise RecipeError(f"{alone} needs --task: one of {', '.join(TASKS)}")
        if training:
            raise RecipeError(
                f"{training} needs something to train on: give --task classification (or "
                "regression) with --train FILE, a table with TABs and a header line"
            )
        return None
    _check(wish)
    if wish.task == DIGITS:
        return Lesson(wish)
    if wish.train is None and (training or wish.eval is None):
        raise RecipeError(
            f"{training or f'--task {wish.task}'} needs --train FILE: a table with TABs and a "
            "header line"
        )
    from graphprune.models.tables import Schema, read_table

    tables = {
        file: read_table(file, wish.task, wish.text, wish.label)
        for file in (wish.train, wish.eval)
        if file is not None
    }
    train = None if wish.train is None else tables[wish.train]
    judged = None if wish.eval is None else tables[wish.eval]
    first = train or judged
    assert first is not None
    schema = Schema(wish.task, first.text, first.label)
    if train is not None:
        if wish.task == "classification":
            schema = replace(schema, classes=train.classes())
        for table in (train, *([] if judged is None else [judged])):
            schema.targets(table)
    return Lesson(wish, schema, train, judged)


def _check(wish: Wish) -> None:
    from graphprune.optimiser import Plan

    if wish.task not in TASKS:
        raise RecipeError(
            f"there is no task {wish.task!r} to train for; {suggest(wish.task, TASKS)}"
        )
    if wish.task == DIGITS and (wish.train is not None or wish.eval is not None):
        raise RecipeError("the task 'digits' brings its own images: leave --train and --eval away")
    if len(wish.text) > 2:
        raise RecipeError(
            f"--text-column is given once, or twice for pairs, not {len(wish.text)} times"
        )
    if wish.batch < 1:
        raise RecipeError(f"--batch-size must be at least 1, got {wish.batch}")
    if wish.resume and wish.checkpoints is None:
        raise RecipeError("--resume goes on from checkpoints: give --checkpoints FOLDER")
    Plan(epochs=wish.epochs, lr=wish.rate)


def taught(
    subject: LoadedModel | Artifact, lesson: Lesson, folder: Path | None, seed: int
) -> tuple[LoadedModel | Artifact, Lesson]:
    """The subject with a head for the lesson, and the lesson in the order of that head's classes.

    Args:
        subject: a model, or an artifact, which has a head already.
        lesson: what `lesson_of` read.
        folder: the subject's tokenizer.
        seed: for a fresh head.

    Raises:
        GraphPruneError: there is no tokenizer, no head can be put on, or the head there is does not
            know a label.
    """
    from graphprune.models import LoadedModel
    from graphprune.models.heads import with_head

    schema = lesson.schema
    if schema is None:
        return subject, lesson
    if folder is None:
        raise GraphPruneError(
            f"--task {schema.task} reads text, and no tokenizer was found beside the model"
        )
    if isinstance(subject, LoadedModel):
        center = 0.0
        if schema.task == "regression" and lesson.train is not None:
            center = statistics.fmean(lesson.train.scores())
        subject = with_head(subject, schema, seed=seed, center=center)
        if not subject.trained and lesson.train is None:
            raise GraphPruneError(
                f"{subject.name!r} has no head for {schema.task}: give --train FILE, and one is "
                "trained first"
            )
        assert subject.schema is not None
        known = subject.schema
    else:
        found = schema_of(subject, schema.task)
        known = replace(schema, classes=found.classes or schema.classes)
    for table in (lesson.train, lesson.eval):
        if table is not None:
            known.targets(table)
    return subject, replace(lesson, schema=known)


def training_of(
    lesson: Lesson, inputs: Sequence[str], folder: Path | None, length: int
) -> Training:
    """Batches, loss and evaluation of a lesson.

    Args:
        lesson: as `taught` returned it; there is something to train on.
        inputs: names of the model's inputs.
        folder: the subject's tokenizer.
        length: the most tokens of a text.
    """
    from graphprune.models.batches import Batches, table_batches
    from graphprune.training import Training

    wish = lesson.wish
    judge: Batches | None = None
    if lesson.schema is None:
        from graphprune.models.digits import digits

        images, labels = digits("train")
        data = Batches({"pixel_values": images}, labels, wish.batch)
        images, labels = digits("test")
        judge = Batches({"pixel_values": images}, labels, wish.batch, shuffle=False)
        loss = "classification"
    else:
        assert folder is not None
        assert lesson.train is not None
        loss = lesson.schema.task
        batches = functools.partial(
            table_batches,
            schema=lesson.schema,
            inputs=inputs,
            tokenizer_dir=folder,
            size=wish.batch,
            length=length,
        )
        data = batches(lesson.train)
        if lesson.eval is not None:
            judge = batches(lesson.eval, shuffle=False)
    return Training(data, loss=loss, eval=judge, checkpoints=wish.checkpoints, resume=wish.resume)


def calibration_from(training: Training, count: int) -> list[dict[str, Tensor]]:
    """Calibration batches of at most so many training examples, drawn with a fixed seed."""
    from graphprune.models.batches import Batches

    assert isinstance(training.data, Batches)
    return training.data.unlabelled(count)


def trained_first(
    start: Compiled, training: Training, wish: Wish, seed: int, observer: Observer
) -> tuple[Compiled, dict[str, JSON]]:
    """A captured model whose head is fresh, trained, and what the training reports.

    It is a dense model of its own then: baseline, teacher, and what pruned quality compares with.
    """
    from graphprune.api import compile
    from graphprune.passes import Finetune
    from graphprune.pipeline import Pipeline

    def announced(event: Event) -> None:
        if isinstance(event, PassStarted):
            event = replace(event, name="train the dense model")
        observer(event)

    if training.checkpoints is not None:
        training = replace(training, checkpoints=Path(training.checkpoints) / _DENSE)
    context = Context(training=training, seed=seed, observers=[announced])
    result = Pipeline([Finetune(epochs=wish.epochs, lr=wish.rate)]).run(start.program, context)
    program = result.program
    # With the report of the untrained model it would count as compiled from that one.
    metadata = {key: value for key, value in program.metadata.items() if key != "report"}
    dense = compile(replace(program, metadata=metadata), [])
    dense.files = start.files
    return dense, dict(result.results[0].report)


def schema_of(subject: LoadedModel | Artifact, task: str) -> Schema:
    """What a subject's head answers: as it was told when it was trained, or as its files say.

    Raises:
        GraphPruneError: it has no head for this task.
    """
    from graphprune.models import LoadedModel
    from graphprune.models.heads import head_classes, head_width
    from graphprune.models.loaded import LABELS, SCHEMA
    from graphprune.models.tables import Schema

    if isinstance(subject, LoadedModel):
        classes = head_classes(subject) or ()
        if not classes if task == "classification" else head_width(subject) != 1:
            raise _headless(subject.name, task)
        return Schema(task, classes=classes)
    if (subject.path / SCHEMA).is_file():
        found = Schema.from_file(subject.path / SCHEMA)
        if found.task != task:
            raise GraphPruneError(
                f"{str(subject.path)!r} was trained for {found.task}: give --task {found.task}"
            )
        return found
    outputs: list[Any] = subject.manifest.get("outputs") or [{}]
    if outputs[0].get("name") != "logits":
        raise _headless(str(subject.path), task)
    names: dict[str, str] = {}
    if (subject.path / LABELS).is_file():
        names = json.loads((subject.path / LABELS).read_text(encoding="utf-8"))
    return Schema(task, classes=tuple(names[key] for key in sorted(names, key=int)))


def _headless(name: str, task: str) -> GraphPruneError:
    return GraphPruneError(
        f"{name!r} has no head for {task}: compile MODEL with --task {task} --train FILE first"
    )
