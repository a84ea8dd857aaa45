"""The cache inputs of an exported decoder, and feeds that fill them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphprune.decode import IDS, MASK, PAST

Feeds = dict[str, npt.NDArray[Any]]
Shapes = Mapping[str, Sequence[int | str]]


def is_past(name: str) -> bool:
    """Whether an input of an ONNX file holds keys or values of past tokens."""
    return name.startswith(f"{PAST}.")


def shapes_of(session: Any) -> dict[str, Sequence[int | str]]:
    """The inputs of a session by name; a dynamic size is a string."""
    return {i.name: i.shape for i in session.get_inputs()}


def filled(shapes: Shapes, feeds: Feeds) -> Feeds:
    """Feeds for a model with these inputs: what of the cache is not given, or does not fit, is 0.

    Pruned and dense model keep different heads, so one cache cannot be for both. How long the past
    is follows from the mask, which is longer than the new tokens by it.
    """
    result: Feeds = {}
    for name, shape in shapes.items():
        if not is_past(name):
            result[name] = feeds[name]
            continue
        batch, sequence = feeds[IDS].shape
        past = feeds[MASK].shape[1] - sequence
        wanted = (batch, int(shape[1]), past, int(shape[3]))
        held = feeds.get(name)
        if held is None or held.shape != wanted:
            held = np.zeros(wanted, np.float32)
        result[name] = held
    return result
