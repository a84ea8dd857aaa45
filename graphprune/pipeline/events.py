"""Events that observers of a pipeline receive: frozen facts, in the order in which they happen.

An observer watches (a progress bar, a log, a timing); it can neither skip nor alter anything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

JSON = Any  # what json.dumps takes


@dataclass(frozen=True, slots=True)
class PipelineStarted:
    """A pipeline is about to run these passes, in this order."""

    passes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PassStarted:
    """The pass at `index` (from 0) of `total` is about to run."""

    name: str
    index: int
    total: int


@dataclass(frozen=True, slots=True)
class PassProgress:
    """A long pass has done `done` of `total` units of its work.

    `values` are numbers to watch on the way, such as the loss of a pass that trains, and `where`
    says in words how far that is, such as "epoch 2/3".
    """

    name: str
    done: int
    total: int
    unit: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True, slots=True)
class PassFinished:
    """A pass is done, and so is its verification.

    `seconds` is the pass itself, its own masked-against-shrunk check included; `verify_seconds` is
    what the pipeline checked afterwards.
    """

    name: str
    index: int
    total: int
    modified: bool
    seconds: float
    verify_seconds: float
    report: Mapping[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PipelineFinished:
    """All passes are done."""

    modified: bool
    seconds: float


Event = PipelineStarted | PassStarted | PassProgress | PassFinished | PipelineFinished
Observer = Callable[[Event], None]

_logger = logging.getLogger(__name__)


def emit(observers: Iterable[Observer], event: Event) -> None:
    """Send an event to every observer. One that fails is logged and cannot stop the pipeline."""
    for observer in observers:
        try:
            observer(event)
        except Exception:
            _logger.exception("observer %r failed on %r", observer, event)
