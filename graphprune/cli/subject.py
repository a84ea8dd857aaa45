"""What a command is given: a model, or an artifact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from graphprune.errors import GraphPruneError

if TYPE_CHECKING:
    from graphprune.api import Compiled
    from graphprune.cli.progress import Advance, Display
    from graphprune.exporters import Artifact
    from graphprune.models import LoadedModel


@contextmanager
def opened(name: str, allow_pickle: bool) -> Iterator[tuple[LoadedModel | Artifact, Display]]:
    """Open a subject under a progress display, which stays on while inside."""
    from rich.console import Console

    from graphprune.cli.progress import Display

    with Display(Console(stderr=True)) as display:
        with display.step(f"load {name}") as advance:
            subject = open_subject(name, allow_pickle, advance)
        yield subject, display


def open_subject(name: str, allow_pickle: bool, advance: Advance) -> LoadedModel | Artifact:
    """The artifact in a folder, or the model of a name.

    Raises:
        GraphPruneError: there is neither, or it cannot be loaded.
    """
    # Before hub ids.
    if is_artifact(name):
        from graphprune.exporters import open_artifact

        return open_artifact(Path(name).expanduser())
    from graphprune.models import load_model

    return load_model(name, allow_pickle=allow_pickle, progress=advance)


def is_artifact(name: str) -> bool:
    """Whether a folder of this name was exported here: it has a manifest, whole or broken."""
    return (Path(name).expanduser() / "manifest.json").is_file()


def captured(
    subject: LoadedModel | Artifact, cache: bool = False, dynamic: Sequence[str] = ()
) -> Compiled:
    """A subject without further passes: a model captured, an artifact's program read.

    Args:
        subject: what `open_subject` found.
        cache: with a decoder's cached form; an artifact has it or not.
        dynamic: names of sizes that must be dynamic; an artifact's are what they are.

    Raises:
        GraphPruneError: the model cannot be captured, or with a cache or these sizes not.
    """
    from graphprune.api import compile, load
    from graphprune.models import LoadedModel

    if not isinstance(subject, LoadedModel):
        if dynamic:
            raise GraphPruneError(
                "--dynamic is for a model that is captured now, and an artifact's sizes are what "
                "they were at capture; name the model itself"
            )
        loaded = load(subject.path)
        return compile(loaded, [], cache=True) if cache else loaded
    inputs = dict(subject.example_inputs)
    compiled = compile(
        subject.module,
        [],
        example_inputs=inputs,
        dynamic_shapes=tuple(dynamic) or "auto",
        cache=cache,
    )
    compiled.files = subject.files()
    return compiled


def tokenizer_dir(subject: LoadedModel | Artifact) -> Path | None:
    """The folder with a subject's tokenizer, or None."""
    from graphprune.models import LoadedModel
    from graphprune.models.loading.loaded import TOKENIZER

    if isinstance(subject, LoadedModel):
        return subject.tokenizer_dir
    folder = subject.path / TOKENIZER
    return folder if folder.is_dir() else None
