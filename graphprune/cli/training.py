"""What the command line trains with: labeled files, a head for them, a dense model to prune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from graphprune.cli.early import check_exists
from graphprune.cli.names import BRINGS_DATA, TRAINABLE
from graphprune.errors import GraphPruneError, RecipeError
from graphprune.pipeline.events import JSON, Event, Observer, PassProgress, PassStarted
from graphprune.storage.folders import check_writable
from graphprune.suggest import suggest

if TYPE_CHECKING:
    from torch import Tensor

    from graphprune.api import Compiled
    from graphprune.cli.subject import Subject
    from graphprune.models.data.tables import Schema, Table
    from graphprune.models.tasks import Task
    from graphprune.pipeline.base import Pass
    from graphprune.training.spec import Training

_RATE = 5e-5
_EPOCHS = 2
_BATCH = 32
_DENSE = "dense"  # the folder of the dense model's checkpoints


@final
@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """The command line's options about training, as they were given; None where they were not.

    Attributes:
        task: one of TRAINABLE, or empty.
        train, eval: labeled files.
        text, label: names of their columns; recognized where empty.
        epochs: of the dense model, where its head is fresh.
        lr: learning rate of that, and of the passes for which a recipe gives none.
        batch: examples of a batch.
        spans: random spans of each text, to distill on.
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
    spans: int = 0
    checkpoints: Path | None = None
    resume: bool = False

    @property
    def record(self) -> Task | None:
        """The task."""
        from graphprune.models.tasks import TASKS

        return TASKS.get(self.task)

    @property
    def brings_data(self) -> bool:
        """Whether the task has examples of its own."""
        return self.task in BRINGS_DATA

    @property
    def own_rate(self) -> float | None:
        """The learning rate that was given or is the task's; None for that of each pass."""
        return self.record.rate if self.lr is None and self.record is not None else self.lr

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
class LabeledData:
    """Options whose files were read: what a model is trained on and evaluated by.

    Attributes:
        options: as they were given.
        schema: columns and classes; None for a task that brings its own data.
        train, eval: the rows, where a file was given.
        recovers: whether a pass trains.
    """

    options: TrainingOptions
    schema: Schema | None = None
    train: Table | None = None
    eval: Table | None = None
    recovers: bool = False

    @property
    def trains(self) -> bool:
        """Whether there is something to train on."""
        return self.options.brings_data or self.train is not None

    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate on."""
        return self.options.brings_data or self.eval is not None


def labeled_data(options: TrainingOptions, steps: Sequence[Pass]) -> LabeledData | None:
    """Read the files of options that `check_training` accepted, before a model is loaded.

    Returns:
        None where the command line names no task.

    Raises:
        GraphPruneError: there is nothing to train the passes on, or a file is broken.
    """
    training = " and ".join(dict.fromkeys(step.name for step in steps if step.needs_training))
    if not options.task:
        if training:
            raise RecipeError(
                f"{training} needs something to train on: give --task classification (or "
                "regression) with --train FILE, a table with TABs and a header line"
            )
        return None
    if options.spans and not any(map(_distills, steps)):
        raise RecipeError("--spans is for passes that distill: give --distill EPOCHS, or omit it")
    if options.brings_data:
        return LabeledData(options, recovers=bool(training))
    if options.train is None and (training or options.eval is None):
        raise RecipeError(
            f"{training or f'--task {options.task}'} needs --train FILE: a table with TABs and a "
            "header line"
        )
    from graphprune.models.data.tables import Schema, read_table

    tables = {
        file: read_table(file, options.task, options.text, options.label)
        for file in (options.train, options.eval)
        if file is not None
    }
    train = None if options.train is None else tables[options.train]
    evaluated = None if options.eval is None else tables[options.eval]
    first = train or evaluated
    assert first is not None
    schema = Schema(options.task, first.text, first.label)
    if train is not None:
        if options.task == "classification":
            schema = replace(schema, classes=train.classes())
        for table in (train, *([] if evaluated is None else [evaluated])):
            schema.targets(table)
    return LabeledData(options, schema, train, evaluated, bool(training))


def _distills(step: Pass) -> bool:
    """Whether a pass, or one that it runs, learns from the dense model."""
    from graphprune.passes.training.training_pass import DistillingPass

    if isinstance(step, DistillingPass) and step.distillation() is not None:
        return True
    return any(map(_distills, step.inner))


def check_training(options: TrainingOptions) -> None:
    """Refuse, before torch is imported, options about training that are wrong or have no effect.

    Raises:
        RecipeError: an option has a wrong value, misses another one, or has no effect.
        ExportError: the folder for checkpoints cannot be written.
    """
    learning = {
        "--epochs": options.epochs,
        "--lr": options.lr,
        "--batch-size": options.batch,
        "--spans": options.spans or None,
        "--checkpoints": options.checkpoints,
        "--resume": options.resume or None,
    }
    files = {"--train": options.train, "--eval": options.eval}
    columns = {"--text-column": options.text or None, "--label-column": options.label or None}
    if not options.task:
        _refuse({"--spans": options.spans or None}, "needs --task classification")
        _refuse({**files, **columns, **learning}, f"needs --task: one of {', '.join(TRAINABLE)}")
        return
    if options.task not in TRAINABLE:
        raise RecipeError(
            f"there is no task {options.task!r} to train for; {suggest(options.task, TRAINABLE)}"
        )
    if options.brings_data:
        _refuse(
            {**files, **columns},
            f"is for a file of texts, and the task {options.task!r} brings its own images: omit it",
        )
    elif options.train is None:
        _refuse(learning, "is about training: give --train FILE, or omit it")
    if len(options.text) > 2:
        raise RecipeError(
            f"--text-column is given once, or twice for pairs, not {len(options.text)} times"
        )
    if options.spans and options.task != "classification":
        raise RecipeError(
            f"--spans is for --task classification, and the task is {options.task}: omit it"
        )
    if options.spans < 0:
        raise RecipeError(f"--spans must be 0 or more, got {options.spans}")
    if options.size < 1:
        raise RecipeError(f"--batch-size must be at least 1, got {options.size}")
    if options.resume and options.checkpoints is None:
        raise RecipeError("--resume goes on from checkpoints: give --checkpoints FOLDER")
    check_exists(options.train)
    check_exists(options.eval)
    if options.checkpoints is not None:
        check_writable(options.checkpoints / "checkpoint")


def check_plan(options: TrainingOptions) -> None:
    """Refuse epochs and learning rates that have no meaning.

    Raises:
        RecipeError: one of these.
    """
    from graphprune.training.optimizer import Plan

    if options.task:
        Plan(epochs=options.dense_epochs, lr=options.rate)


def _refuse(options: Mapping[str, object], why: str) -> None:
    """Refuse the first of some options that was given."""
    for name, value in options.items():
        if value is not None:
            raise RecipeError(f"{name} {why}")


def with_task_head(
    subject: Subject, labeled: LabeledData, seed: int
) -> tuple[Subject, LabeledData]:
    """Put a head on the subject; return it, and the data with that head's order of classes.

    Args:
        subject: a model, or an artifact, which has a head already.
        labeled: what `labeled_data` read.
        seed: for a fresh head.

    Raises:
        GraphPruneError: there is no tokenizer, no head can be put on, the head there is does not
            know a label, or it is kept, and options about training have no effect.
    """
    if labeled.schema is not None:
        if subject.tokenizer_dir is None:
            raise GraphPruneError(
                f"--task {labeled.schema.task} reads text, and no tokenizer was found beside the "
                "model"
            )
        subject, schema = subject.with_head(labeled.schema, labeled.train, seed)
        for table in (labeled.train, labeled.eval):
            if table is not None:
                schema.targets(table)
        labeled = replace(labeled, schema=schema)
    if subject.trained:
        options = labeled.options
        idle: dict[str, object] = {"--epochs": options.epochs}
        if not labeled.recovers:
            idle |= {"--lr": options.lr, "--checkpoints": options.checkpoints}
        _refuse(
            idle,
            "has no effect: the model has a trained head, which is kept; omit it, or train "
            "after pruning with --finetune EPOCHS or --distill EPOCHS",
        )
    return subject, labeled


def training_of(
    labeled: LabeledData, inputs: Sequence[str], folder: Path | None, length: int
) -> Training:
    """Return batches, loss and evaluation of labeled data.

    Args:
        labeled: as `with_task_head` returned it; there is something to train on.
        inputs: names of the model's inputs.
        folder: the subject's tokenizer.
        length: the most tokens of a text.
    """
    from graphprune.models.data.batches import Batches, table_batches
    from graphprune.models.data.spans import Spans
    from graphprune.training.spec import Training

    options = labeled.options
    evaluation: Batches | None = None
    data: Batches | Spans
    if labeled.schema is None:
        assert options.record is not None
        assert options.record.examples is not None
        data = Batches(*options.record.examples("train"), options.size)
        evaluation = Batches(*options.record.examples("test"), options.size, shuffle=False)
        loss = "classification"
    else:
        assert folder is not None
        assert labeled.train is not None
        loss = labeled.schema.task
        common: dict[str, Any] = {
            "schema": labeled.schema,
            "inputs": inputs,
            "tokenizer_dir": folder,
            "size": options.size,
            "length": length,
        }
        data = (
            Spans(labeled.train, count=options.spans, **common)
            if options.spans
            else table_batches(labeled.train, **common)
        )
        if labeled.eval is not None:
            evaluation = table_batches(labeled.eval, shuffle=False, **common)
    return Training(
        data, loss=loss, eval=evaluation, checkpoints=options.checkpoints, resume=options.resume
    )


def calibration_from(training: Training, count: int) -> list[dict[str, Tensor]]:
    """Calibration batches of at most so many training examples, drawn with a fixed seed."""
    from graphprune.models.data.batches import Batches
    from graphprune.models.data.spans import Spans

    assert isinstance(training.data, Batches | Spans)
    return training.data.unlabeled(count)


def trained_first(
    start: Compiled, training: Training, options: TrainingOptions, seed: int, observer: Observer
) -> tuple[Compiled, dict[str, JSON]]:
    """A captured model whose head is fresh, trained, and what the training reports.

    It is a dense model of its own then: baseline, teacher, and what pruned quality compares with.
    """
    from graphprune.api import compile
    from graphprune.models.data.spans import Spans
    from graphprune.passes import Finetune
    from graphprune.pipeline.base import Context
    from graphprune.pipeline.pipeline import Pipeline

    def announced(event: Event) -> None:
        if isinstance(event, PassStarted | PassProgress):
            event = replace(event, name="train the dense model")
        observer(event)

    if isinstance(training.data, Spans):
        training = replace(training, data=training.data.whole)
    if training.checkpoints is not None:
        training = replace(training, checkpoints=Path(training.checkpoints) / _DENSE)
    context = Context(training=training, seed=seed)
    step = Finetune(epochs=options.dense_epochs, lr=options.rate)
    result = Pipeline([step], observers=[announced]).run(start.program, context)
    program = result.program
    # With the report of the untrained model it would count as compiled from that one.
    dense = compile(replace(program, report=None), [])
    dense.files = start.files
    return dense, dict(result.results[0].report)
