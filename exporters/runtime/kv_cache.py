"""The cache inputs of an exported decoder, and feeds that fill them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from graphprune.errors import GraphPruneError
from graphprune.ir.decoding import IDS, MASK, is_past, zero_pasts

Feeds = dict[str, npt.NDArray[Any]]
Shapes = Mapping[str, Sequence[int | str]]


def shapes_of(session: Any) -> dict[str, Sequence[int | str]]:
    """The inputs of a session by name, optional ones too; a dynamic size is a string."""
    # An optional input has the shape of its own value there, which says nothing of what is fed.
    optional = optional_inputs(session)
    sizes = {i.name: [f"{i.name}_{dim}" for dim in range(len(i.shape))] for i in optional}
    return {i.name: i.shape for i in session.get_inputs()} | sizes


def optional_inputs(session: Any) -> list[Any]:
    """The inputs of a session that need not be fed: initializers that are inputs too."""
    found: list[Any] = getattr(session, "get_overridable_initializers", list)()
    return found


def filled(shapes: Shapes, feeds: Feeds, *, strict: bool = False) -> Feeds:
    """Feeds for a model with these inputs: what of the cache is not given, or does not fit, is 0.

    Pruned and dense model keep different heads, so one cache cannot be for both. How long the past
    is follows from the mask, which is longer than the new tokens by it.

    Args:
        shapes: the model's inputs.
        feeds: what there is.
        strict: refuse a cache that does not fit.

    Raises:
        GraphPruneError: the mask is shorter than the tokens, or a cache does not fit and must.
    """
    # What is missing is optional, or for ONNX Runtime to name.
    result: Feeds = {n: feeds[n] for n in shapes if n in feeds and not is_past(n)}
    if not any(map(is_past, shapes)):
        return result
    batch, sequence = feeds[IDS].shape
    past = feeds[MASK].shape[1] - sequence
    if past < 0:
        raise GraphPruneError(
            f"{MASK!r} is {feeds[MASK].shape[1]} long for {sequence} new tokens: it covers the "
            "past and the new tokens"
        )
    for name, zeros in zero_pasts(shapes, batch, past).items():
        held = feeds.get(name, zeros)
        if strict and held.shape != zeros.shape:
            raise GraphPruneError(
                f"{name!r} has shape {list(held.shape)}; with these tokens and this mask the model "
                f"takes {list(zeros.shape)}"
            )
        result[name] = held if held.shape == zeros.shape else zeros
    return result
