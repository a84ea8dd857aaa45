"""What a family is, and how small models of transformers, timm and others are made."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.families.stubs import imported
from graphprune.models.loading.inputs import text_batch
from graphprune.models.zoo.tiny import randomize, tiny

VOCABULARY = 99
Inputs = Any  # what forward takes: a dict of keyword arguments, or a tuple
Built = tuple[nn.Module, Inputs]


@dataclass(frozen=True, slots=True)
class Family:
    """A model family, represented by a small model.

    Attributes:
        name: what the field calls it.
        domain: the section of the table.
        build: makes a model and its example inputs; ImportError where a package is missing.
        dynamic: sizes beyond batch and sequence that may change, as `graphprune.compile` takes
            them.
    """

    name: str
    domain: str
    build: Callable[[], Built]
    dynamic: Any = "auto"

    def made(self, seed: int = 0) -> Built:
        """The model with all weights random, and its inputs."""
        with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
            torch.manual_seed(seed)
            model, inputs = self.build()
            randomize(model)
        return model.eval(), inputs


class Domain:
    """Collects the families of a module.

    Args:
        name: the section of the table.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.families: list[Family] = []

    def add(self, name: str, build: Callable[[], Built], dynamic: Any = "auto") -> None:
        """Add a family."""
        self.families.append(Family(name, self.name, build, dynamic))

    def tiny(self, name: str, zoo: str) -> None:
        """Add a family whose model the zoo of tests has."""
        self.add(name, lambda: tiny(zoo))

    def hf(
        self,
        name: str,
        model: str,
        config: str,
        options: Mapping[str, Any],
        inputs: Callable[[], Inputs] | None = None,
        dynamic: Any = "auto",
    ) -> None:
        """Add a family of transformers: class names of model and configuration."""

        def build() -> Built:
            transformers = importlib.import_module("transformers")
            made = getattr(transformers, config)(**options)
            return getattr(transformers, model)(made), (inputs or text)()

        self.add(name, build, dynamic)

    def timm(self, name: str, model: str, side: int = 64, **options: Any) -> None:
        """Add a family of timm, at images of a side."""

        def build() -> Built:
            made = imported("timm").create_model(model, num_classes=5, **options)
            return made, (torch.randn(2, 3, side, side),)

        self.add(name, build)


def text(length: int = 12) -> dict[str, Tensor]:
    """Token ids and their mask."""
    return text_batch(VOCABULARY, length)


def translated() -> dict[str, Tensor]:
    """Tokens for an encoder and a decoder."""
    return {**text(), "decoder_input_ids": torch.randint(5, VOCABULARY, (2, 7))}


def tokens() -> dict[str, Tensor]:
    """Token ids alone."""
    return {"input_ids": text()["input_ids"]}


def image(side: int = 32, channels: int = 3) -> Callable[[], dict[str, Tensor]]:
    """Pixels of two images."""
    return lambda: {"pixel_values": torch.randn(2, channels, side, side)}


def wave(samples: int = 1600) -> dict[str, Tensor]:
    """A waveform."""
    return {"input_values": torch.randn(2, samples)}
