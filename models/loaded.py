"""LoadedModel: a model with what is needed to capture, feed and judge it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import Tensor, nn


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
    """

    module: nn.Module
    example_inputs: Mapping[str, Tensor]
    name: str
    tokenizer_dir: Path | None = None
    task: str | None = None
