"""Arguments of a graph to JSON and back; nothing here runs code from a file."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphprune.errors import ArtifactError, UnsupportedError

JSON = Any


def encode(value: Any) -> JSON:
    """One argument of a call.

    Plain values stay themselves; everything else is an object with one key that says what it is.

    Raises:
        UnsupportedError: a kind of value that a saved graph does not hold.
    """
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, dict):
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, known in _CONSTANTS.items():
        for name, constant in known.items():
            if value is constant:
                return {kind: name}
    if value is ...:
        return {"ellipsis": True}
    raise UnsupportedError(
        f"a graph with the argument {value!r} ({type(value).__name__}) cannot be saved"
    )


def decode(value: JSON, nodes: dict[str, fx.Node]) -> Any:
    """The argument that `encode` wrote.

    Raises:
        ArtifactError: not something that `encode` writes, or a node that is not there yet.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [decode(v, nodes) for v in value]
    if isinstance(value, dict) and len(value) == 1:
        ((kind, inner),) = value.items()
        if kind == "node" and isinstance(inner, str) and inner in nodes:
            return nodes[inner]
        if kind in _CONSTANTS and inner in _CONSTANTS[kind]:
            return _CONSTANTS[kind][inner]
        if kind in _DECODERS:
            return _DECODERS[kind](inner, lambda v: decode(v, nodes))
    raise ArtifactError(f"{value!r} is not an argument that graphprune writes")


def _constants(kind: type) -> dict[str, Any]:
    found = {n: getattr(torch, n) for n in dir(torch) if isinstance(getattr(torch, n), kind)}
    return dict(sorted(found.items()))


_CONSTANTS: dict[str, dict[str, Any]] = {
    "dtype": _constants(torch.dtype),
    "layout": _constants(torch.layout),
    "memory_format": _constants(torch.memory_format),
}


def _float(inner: JSON, decoded: Callable[[JSON], Any]) -> float:
    if inner not in ("inf", "-inf", "nan"):
        raise ArtifactError(f"{inner!r} is not a number that graphprune writes")
    return float(inner)


_DECODERS: dict[str, Callable[[JSON, Callable[[JSON], Any]], Any]] = {
    "float": _float,
    "tuple": lambda inner, decoded: tuple(decoded(v) for v in inner),
    "dict": lambda inner, decoded: {decoded(k): decoded(v) for k, v in inner},
    "slice": lambda inner, decoded: slice(*(decoded(v) for v in inner)),
    "device": lambda inner, decoded: torch.device(inner),
    "ellipsis": lambda inner, decoded: ...,
}
