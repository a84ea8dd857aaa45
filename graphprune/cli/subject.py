"""What a command is given: a model, or an artifact."""

from __future__ import annotations

import statistics
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from graphprune.errors import GraphPruneError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from graphprune.api import Compiled
    from graphprune.exporters import Artifact
    from graphprune.models import LoadedModel
    from graphprune.models.data.tables import Schema, Table
    from graphprune.progress import Advance, Display


class Subject(ABC):
    """What a command works on.

    Attributes:
        name: what the user called it.
        tokenizer_dir: the folder with its tokenizer, or None.
        task: the task that evaluates it when the user names none, or None.
        trained: False where its head was drawn at random.
        compared: whether it has a pruned form beside the dense one.
    """

    name: str
    tokenizer_dir: Path | None
    task: str | None = None
    trained: bool = True
    compared: bool

    @abstractmethod
    def captured(self, cache: bool = False, dynamic: Sequence[str] = ()) -> Compiled:
        """Return it as it is, without further passes.

        Args:
            cache: with a decoder's cached form; an artifact has it or not.
            dynamic: names of sizes that must be dynamic; an artifact's are what they are.

        Raises:
            GraphPruneError: the model cannot be captured, or not with a cache or these sizes.
        """

    @abstractmethod
    def exported(
        self, compiled: Compiled | None = None, *, cache: bool = False, baseline: bool = False
    ) -> AbstractContextManager[Artifact]:
        """Enter its artifact, which for a model is there while inside alone.

        Args:
            compiled: what `captured` returned, where that was called already.
            cache: as for `captured`.
            baseline: whether a model's baseline is written too.
        """

    @abstractmethod
    def models(self, comparing: str = "") -> dict[str, Any]:
        """Return what runs, "pruned" and "dense", as far as there is.

        Args:
            comparing: a task that needs both, named in the error.

        Raises:
            GraphPruneError: both are needed, and one is missing.
        """

    @abstractmethod
    def check_opponents(self, against: str) -> None:
        """Refuse what the function `check_opponents` cannot see: a baseline that is not there."""

    @abstractmethod
    def schema(self, task: str) -> Schema:
        """Return what its head answers: as it was trained, or as its files say.

        Raises:
            GraphPruneError: it has no head for this task.
        """

    @abstractmethod
    def with_head(self, schema: Schema, train: Table | None, seed: int) -> tuple[Subject, Schema]:
        """Return it with a head for a schema, and the schema with that head's order of classes.

        A fresh head is drawn with the seed, and starts at the mean score of the rows `train`.

        Raises:
            GraphPruneError: no head can be put on, or it is fresh and there is nothing to train on.
        """


@final
class Model(Subject):
    """A loaded model."""

    compared = False

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.name, self.tokenizer_dir = loaded.name, loaded.tokenizer_dir
        self.task, self.trained = loaded.task, loaded.trained

    def captured(self, cache: bool = False, dynamic: Sequence[str] = ()) -> Compiled:
        from graphprune.api import compile

        if dynamic and self.loaded.dynamic != "auto":
            raise GraphPruneError(
                f"{self.name!r} says itself which sizes are dynamic: omit --dynamic, or return "
                "(module, example_inputs) alone"
            )
        compiled = compile(
            self.loaded.module,
            [],
            example_inputs=dict(self.loaded.example_inputs),
            dynamic_shapes=tuple(dynamic) or self.loaded.dynamic,
            cache=cache,
        )
        compiled.files = self.loaded.files()
        return compiled

    @contextmanager
    def exported(
        self, compiled: Compiled | None = None, *, cache: bool = False, baseline: bool = False
    ) -> Iterator[Artifact]:
        with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
            compiled = compiled or self.captured(cache)
            yield compiled.export(Path(folder) / "out", baseline=baseline)

    def models(self, comparing: str = "") -> dict[str, Any]:
        if comparing:
            raise GraphPruneError(
                f"the task {comparing!r} compares an artifact with its dense model; compile the "
                "model first, and evaluate the folder"
            )
        return {"dense": self.loaded.module}

    def check_opponents(self, against: str) -> None:
        """It has no baseline of its own."""

    def schema(self, task: str) -> Schema:
        from graphprune.models.data.tables import Schema
        from graphprune.models.tasks.artifacts import headless
        from graphprune.models.zoo.heads import head_classes, head_width

        classes = head_classes(self.loaded) or ()
        if not classes if task == "classification" else head_width(self.loaded) != 1:
            raise headless(self.name, task)
        return Schema(task, classes=classes)

    def with_head(self, schema: Schema, train: Table | None, seed: int) -> tuple[Subject, Schema]:
        from graphprune.models.zoo.heads import with_head

        center = 0.0
        if schema.task == "regression" and train is not None:
            center = statistics.fmean(train.scores())
        loaded = with_head(self.loaded, schema, seed=seed, center=center)
        if not loaded.trained and train is None:
            raise GraphPruneError(
                f"{loaded.name!r} has no head for {schema.task}: give --train FILE, and one is "
                "trained first"
            )
        assert loaded.schema is not None
        return Model(loaded), loaded.schema


@final
class Exported(Subject):
    """An artifact."""

    compared = True

    def __init__(self, artifact: Artifact) -> None:
        from graphprune.models.hub.source import tokenizer_dir

        self.artifact = artifact
        self.name = str(artifact.path)
        self.tokenizer_dir = tokenizer_dir(artifact.path)

    def captured(self, cache: bool = False, dynamic: Sequence[str] = ()) -> Compiled:
        from graphprune.api import compile, load

        if dynamic:
            raise GraphPruneError(
                "--dynamic is for a model that is captured now, and an artifact's sizes are what "
                "they were at capture; name the model itself"
            )
        loaded = load(self.artifact.path)
        return compile(loaded, [], cache=True) if cache else loaded

    @contextmanager
    def exported(
        self, compiled: Compiled | None = None, *, cache: bool = False, baseline: bool = False
    ) -> Iterator[Artifact]:
        yield self.artifact

    def models(self, comparing: str = "") -> dict[str, Any]:
        found = {"pruned": self.artifact.session()}
        if comparing or self.artifact.has_baseline:
            found["dense"] = self.artifact.baseline_session()
        return found

    def check_opponents(self, against: str) -> None:
        self.artifact.check_opponents(against)

    def schema(self, task: str) -> Schema:
        from graphprune.models.tasks.artifacts import artifact_schema

        return artifact_schema(self.artifact, task)

    def with_head(self, schema: Schema, train: Table | None, seed: int) -> tuple[Subject, Schema]:
        found = self.schema(schema.task)
        return self, replace(schema, classes=found.classes or schema.classes)


@contextmanager
def opened(name: str, allow_pickle: bool) -> Iterator[tuple[Subject, Display]]:
    """Open a subject under a progress display, which stays on while inside."""
    from rich.console import Console

    from graphprune.cli.quiet import quiet_libraries
    from graphprune.progress import Display

    with Display(Console(stderr=True, emoji=False)) as display:
        with display.step(f"load {name}") as advance:
            quiet_libraries()
            subject = open_subject(name, allow_pickle, advance)
        yield subject, display


def open_subject(name: str, allow_pickle: bool, advance: Advance) -> Subject:
    """Open the artifact in a folder, or load the model of a name.

    Raises:
        GraphPruneError: there is neither, or it cannot be loaded.
    """
    # Before hub ids.
    if _is_artifact(name):
        from graphprune.exporters import open_artifact

        return Exported(open_artifact(Path(name).expanduser()))
    from graphprune.models import load_model

    return Model(load_model(name, allow_pickle=allow_pickle, progress=advance))


def check_opponents(name: str, against: str) -> None:
    """Refuse, before a subject is opened, to time it against what is not there.

    Raises:
        GraphPruneError: it is no artifact, or a name stands for nothing; near ones are named.
    """
    from graphprune.exporters.artifact.artifact import DENSE, check_names

    if not _is_artifact(name) and against != DENSE:
        raise GraphPruneError("--against compares artifacts; compile the model first")
    check_names(against)


def _is_artifact(name: str) -> bool:
    """Whether a folder of this name was exported here: it has a manifest, whole or broken."""
    from graphprune.storage.layout import layout_of

    return layout_of(Path(name).expanduser()) is not None
