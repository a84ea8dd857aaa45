"""What the command line trains with: labelled files, a head for them, a dense model to prune."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from graphprune.errors import GraphPruneError, RecipeError
from graphprune.pipeline.base import Context, Pass
from graphprune.pipeline.events import JSON, Event, Observer, PassStarted
from graphprune.storage.folders import check_writable
from graphprune.suggest import suggest

if TYPE_CHECKING:
    from torch import Tensor

    from graphprune.api import Compiled
    from graphprune.exporters import Artifact
    from graphprune.models import LoadedModel
    from graphprune.models.data.tables import Schema, Table
    from graphprune.training.spec import Training

DIGITS = "digits"
TASKS = ("classification", "regression", DIGITS)
# A small network that was trained at a high rate does not move at the usual one.
_RATES = {DIGITS: 1e-3}
_RATE = 5e-5
_EPOCHS = 2
_BATCH = 32
_DENSE = "dense"  # the folder of the dense model's checkpoints


@final
@dataclass(frozen=True, slots=True)
class Wish:
    """The command line's options about training, as they were given; None where they were not.

    Attributes:
        task: one of TASKS, or empty.
        train, eval: labelled files.
        text, label: names of their columns; recognised where empty.
        epochs: of the dense model, where its head is fresh.
        lr: learning rate of that, and of the passes for which a recipe gives none.
        batch: examples of a batch.
        checkpoints: a folder for checkpoints.
        resume: go on from those that are there.
    """

    task: str = ""
    train: Path | None = None
    eval: Path | None = None
    text: tuple[str, ...] = ()
    label: str = ""
    epochs: int | None = None
    lr: float | None = None
    batch: int | None = None
    checkpoints: Path | None = None
    resume: bool = False

    @property
    def own_rate(self) -> float | None:
        """The learning rate that was given or is the task's; None for that of each pass."""
        return _RATES.get(self.task) if self.lr is None else self.lr

    @property
    def rate(self) -> float:
        """The learning rate of the dense model."""
        return _RATE if self.own_rate is None else self.own_rate

    @property
    def dense_epochs(self) -> int:
        """How long the dense model is trained."""
        return _EPOCHS if self.epochs is None else self.epochs

    @property
    def size(self) -> int:
        """Examples of a batch."""
        return _BATCH if self.batch is None else self.batch


@final
@dataclass(frozen=True, slots=True)
class Lesson:
    """A wish whose files were read; what a model is trained on and judged by.

    Attributes:
        wish: as it was given.
        schema: columns and classes; None for the digits, which bring their own data.
        train, eval: the rows, where a file was given.
        recovers: whether a pass trains.
    """

    wish: Wish
    schema: Schema | None = None
    train: Table | None = None
    eval: Table | None = None
    recovers: bool = False

    @property
    def trains(self) -> bool:
        """Whether there is something to train on."""
        return self.wish.task == DIGITS or self.train is not None

    @property
    def judges(self) -> bool:
        """Whether there is something to judge by."""
        return self.wish.task == DIGITS or self.eval is not None


def lesson_of(wish: Wish, steps: Sequence[Pass]) -> Lesson | None:
    """Read the files of a wish that `check_wish` let pass, before a model is loaded.

    Returns:
        None where the command line names no task.

    Raises:
        GraphPruneError: there is nothing to train the passes on, or a file is broken.
    """
    training = " and ".join(dict.fromkeys(step.name for step in steps if step.needs_training))
    if not wish.task:
        if training:
            raise RecipeError(
                f"{training} needs something to train on: give --task classification (or "
                "regression) with --train FILE, a table with TABs and a header line"
            )
        return None
    if wish.task == DIGITS:
        return Lesson(wish, recovers=bool(training))
    if wish.train is None and (training or wish.eval is None):
        raise RecipeError(
            f"{training or f'--task {wish.task}'} needs --train FILE: a table with TABs and a "
            "header line"
        )
    from graphprune.models.data.tables import Schema, read_table

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
    return Lesson(wish, schema, train, judged, bool(training))


def check_wish(wish: Wish) -> None:
    """Refuse options about training that are wrong, or that nothing would come of.

    Raises:
        RecipeError: so they are.
        ExportError: the folder for checkpoints cannot be written.
    """
    from graphprune.training.optimizer import Plan

    learning = {
        "--epochs": wish.epochs,
        "--lr": wish.lr,
        "--batch-size": wish.batch,
        "--checkpoints": wish.checkpoints,
        "--resume": wish.resume or None,
    }
    files = {"--train": wish.train, "--eval": wish.eval}
    columns = {"--text-column": wish.text or None, "--label-column": wish.label or None}
    if not wish.task:
        _refuse({**files, **columns, **learning}, f"needs --task: one of {', '.join(TASKS)}")
        return
    if wish.task not in TASKS:
        raise RecipeError(
            f"there is no task {wish.task!r} to train for; {suggest(wish.task, TASKS)}"
        )
    if wish.task == DIGITS:
        own = "is for a file of texts, and the task 'digits' brings its own images: leave it away"
        _refuse({**files, **columns}, own)
    elif wish.train is None:
        _refuse(learning, "is about training: give --train FILE, or leave it away")
    if len(wish.text) > 2:
        raise RecipeError(
            f"--text-column is given once, or twice for pairs, not {len(wish.text)} times"
        )
    if wish.size < 1:
        raise RecipeError(f"--batch-size must be at least 1, got {wish.size}")
    if wish.resume and wish.checkpoints is None:
        raise RecipeError("--resume goes on from checkpoints: give --checkpoints FOLDER")
    Plan(epochs=wish.dense_epochs, lr=wish.rate)
    if wish.checkpoints is not None:
        check_writable(wish.checkpoints / "checkpoint")


def _refuse(options: Mapping[str, object], why: str) -> None:
    """Refuse the first of some options that was given."""
    for name, value in options.items():
        if value is not None:
            raise RecipeError(f"{name} {why}")


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
        GraphPruneError: there is no tokenizer, no head can be put on, the head there is does not
            know a label, or it is kept, and options about training have no effect.
    """
    from graphprune.models import LoadedModel

    subject, lesson = _headed(subject, lesson, folder, seed)
    if isinstance(subject, LoadedModel) and not subject.trained:
        return subject, lesson
    wish = lesson.wish
    idle: dict[str, object] = {"--epochs": wish.epochs}
    if not lesson.recovers:
        idle |= {"--lr": wish.lr, "--checkpoints": wish.checkpoints}
    _refuse(
        idle,
        "has no effect: the model has a trained head, which is kept; leave it away, or train after "
        "pruning with --finetune EPOCHS or --distill EPOCHS",
    )
    return subject, lesson


def _headed(
    subject: LoadedModel | Artifact, lesson: Lesson, folder: Path | None, seed: int
) -> tuple[LoadedModel | Artifact, Lesson]:
    from graphprune.models import LoadedModel
    from graphprune.models.zoo.heads import with_head

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
    from graphprune.models.data.batches import Batches, table_batches
    from graphprune.training.spec import Training

    wish = lesson.wish
    judge: Batches | None = None
    if lesson.schema is None:
        from graphprune.models.zoo.digits import digits

        images, labels = digits("train")
        data = Batches({"pixel_values": images}, labels, wish.size)
        images, labels = digits("test")
        judge = Batches({"pixel_values": images}, labels, wish.size, shuffle=False)
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
            size=wish.size,
            length=length,
        )
        data = batches(lesson.train)
        if lesson.eval is not None:
            judge = batches(lesson.eval, shuffle=False)
    return Training(data, loss=loss, eval=judge, checkpoints=wish.checkpoints, resume=wish.resume)


def calibration_from(training: Training, count: int) -> list[dict[str, Tensor]]:
    """Calibration batches of at most so many training examples, drawn with a fixed seed."""
    from graphprune.models.data.batches import Batches

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
    from graphprune.pipeline.pipeline import Pipeline

    def announced(event: Event) -> None:
        if isinstance(event, PassStarted):
            event = replace(event, name="train the dense model")
        observer(event)

    if training.checkpoints is not None:
        training = replace(training, checkpoints=Path(training.checkpoints) / _DENSE)
    context = Context(training=training, seed=seed)
    step = Finetune(epochs=wish.dense_epochs, lr=wish.rate)
    result = Pipeline([step], observers=[announced]).run(start.program, context)
    program = result.program
    # With the report of the untrained model it would count as compiled from that one.
    dense = compile(replace(program, report=None), [])
    dense.files = start.files
    return dense, dict(result.results[0].report)


def schema_of(subject: LoadedModel | Artifact, task: str) -> Schema:
    """What a subject's head answers: as it was told when it was trained, or as its files say.

    Raises:
        GraphPruneError: it has no head for this task.
    """
    from graphprune.models import LoadedModel
    from graphprune.models.data.tables import Schema
    from graphprune.models.loading.loaded import LABELS, SCHEMA
    from graphprune.models.zoo.heads import head_classes, head_width

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
