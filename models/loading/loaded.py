"""LoadedModel: a model with what is needed to capture, feed and evaluate it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from graphprune.models.data.tables import Schema
from graphprune.models.hub.source import source_files

SCHEMA, LABELS = "task.json", "labels.json"  # files in an artifact


@final
@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model, and everything around it that the command line would otherwise have to ask for.

    Attributes:
        module: the model, in eval mode.
        example_inputs: keyword arguments of its forward; batch of two or more, padded where the
            model takes a mask, batch and sequence of different sizes.
        name: what the user called it.
        tokenizer_dir: a folder with the tokenizer's files, or None.
        task: the task that evaluates it when the user names none, or None.
        schema: what its head answers, where a labeled file said so; else None.
        trained: False where its head was drawn at random.
        source: its hub id, for a built-in one; else "".
        license: of its weights; "" where its files say it, or nobody does.
        dynamic: sizes that are dynamic, as `graphprune.compile` takes `dynamic_shapes`.
    """

    module: nn.Module
    example_inputs: Mapping[str, Tensor]
    name: str
    tokenizer_dir: Path | None = None
    task: str | None = None
    schema: Schema | None = None
    trained: bool = True
    source: str = ""
    license: str = ""
    dynamic: Any = "auto"

    def files(self) -> dict[str, Path | bytes]:
        """Files that an artifact should carry beside the model (`Compiled.files`), by name.

        Its configuration and tokenizer; for a classifier labels.json with the names of its classes;
        and task.json where the model was given a task.
        """
        files = source_files(
            self.module,
            self.tokenizer_dir,
            name=self.source or self.name,
            license=self.license,
            schema=self.schema,
        )
        labels = getattr(getattr(self.module, "config", None), "id2label", None)
        if self.schema is not None:
            files[SCHEMA] = self.schema.to_bytes()
            labels = dict(enumerate(self.schema.classes))
        if labels and not all(str(v) in (str(k), f"LABEL_{k}") for k, v in labels.items()):
            files[LABELS] = json.dumps(labels, indent=1, ensure_ascii=False).encode()
        return files
