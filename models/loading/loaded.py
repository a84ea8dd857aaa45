"""LoadedModel: a model with what is needed to capture, feed and judge it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import Tensor, nn

from graphprune.models.data.tables import Schema

TOKENIZER = "tokenizer"  # the folder in an artifact
SCHEMA = "task.json"  # the file in an artifact
LABELS = "labels.json"


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
        task: the task that judges it when the user names none, or None.
        schema: what its head answers, where a labeled file said so; else None.
        trained: False where its head was drawn at random.
    """

    module: nn.Module
    example_inputs: Mapping[str, Tensor]
    name: str
    tokenizer_dir: Path | None = None
    task: str | None = None
    schema: Schema | None = None
    trained: bool = True

    def files(self) -> dict[str, Path | bytes]:
        """What an artifact should carry beside the model (for `Compiled.files`), by name.

        The tokenizer's files; for a classifier labels.json with the names of its classes; and
        task.json where the model was given a task.
        """
        from graphprune.models.loading.loading import tokenizer_files

        files: dict[str, Path | bytes] = {}
        if self.tokenizer_dir is not None:
            for file in tokenizer_files(self.tokenizer_dir):
                files[f"{TOKENIZER}/{file.name}"] = file
            # It says which tokens end a text.
            generation = self.tokenizer_dir / "generation_config.json"
            if generation.is_file():
                files[f"{TOKENIZER}/{generation.name}"] = generation
        labels = getattr(getattr(self.module, "config", None), "id2label", None)
        if self.schema is not None:
            files[SCHEMA] = self.schema.to_bytes()
            labels = dict(enumerate(self.schema.classes))
        if labels and not all(str(v) in (str(k), f"LABEL_{k}") for k, v in labels.items()):
            files[LABELS] = json.dumps(labels, indent=1, ensure_ascii=False).encode()
        return files
