"""What programs are compared on, and how: two batches, and the largest relative difference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphprune.graph import terms
from graphprune.program import Entry


def batches(entry: Entry) -> list[list[Tensor]]:
    """The flat inputs that everything is compared on: the examples, and a padded second batch."""
    return [list(entry.example), second_inputs(entry)]


def second_inputs(entry: Entry) -> list[Tensor]:
    """Other flat inputs for an entry: another number of samples, another length, and padding.

    Made from the examples by cropping and repeating to `entry.second`; in tensors of zeros and
    ones (masks) the last sample's tail becomes zero, with a cache its head, as decoders are padded.
    """
    result = []
    for name, tensor in zip(entry.input_names, entry.example, strict=True):
        dims = entry.dynamic.get(name, {})
        for dim, symbol in dims.items():
            size = sum(entry.second[term] for term in terms(symbol))
            repeats = -(-size // tensor.shape[dim])
            tensor = torch.cat([tensor] * repeats, dim).narrow(dim, 0, size)
        result.append(_pad(tensor, dims, left=bool(entry.cache)).contiguous())
    return result


def second_sizes(
    names: tuple[str, ...],
    example: tuple[Tensor, ...],
    dynamic: Mapping[str, Mapping[int, str]],
) -> list[dict[str, int]]:
    """Sizes that a second batch may have, the most different from the examples first.

    One more sample and two thirds of every length; then the same lengths, for models that need a
    least length or a multiple; then the examples' own sizes.
    """
    own = {
        symbol: int(tensor.shape[dim])
        for name, tensor in zip(names, example, strict=True)
        for dim, symbol in dynamic.get(name, {}).items()
        if len(terms(symbol)) == 1
    }
    leading = {symbol for dims in dynamic.values() for dim, symbol in dims.items() if dim == 0}
    more = {s: n + 1 if s in leading else n for s, n in own.items()}
    shorter = {s: n + 1 if s in leading else max(2, n * 2 // 3) for s, n in own.items()}
    return [shorter, more, own]


def _pad(tensor: Tensor, dims: Mapping[int, str], *, left: bool) -> Tensor:
    last = tensor.dim() - 1
    if last < 1 or last not in dims or 0 not in dims or tensor.is_floating_point():
        return tensor
    if bool(((tensor != 0) & (tensor != 1)).any()):
        return tensor
    padded = tensor.clone()
    length = padded.shape[-1]
    padded[-1, ..., slice(length // 3) if left else slice(length * 2 // 3, None)] = 0
    return padded


def relative_error(expected: Any, actual: Any) -> float:
    """max|expected - actual| / max|expected|; infinite for another shape, or NaN on one side.

    Equal infinities agree, a NaN agrees with a NaN. What is no float must be equal.
    """
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return 0.0 if expected is actual or expected == actual else math.inf
    if expected.shape != actual.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, actual.to(expected.dtype)) else math.inf
    a, b = expected.detach().double(), actual.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf).max()
    finite = a[a.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return float(difference) / max(scale, 1e-30)
