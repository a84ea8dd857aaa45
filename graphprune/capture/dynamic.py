"""Which sizes torch.export is asked to keep dynamic, and how a user names them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from graphprune.errors import CaptureError

# Sizes that may be asked for by name; batch and sequence by their dimension.
_SIZES = ("batch", "sequence", "height", "width")


def asked_names(dynamic_shapes: Any) -> tuple[str, ...] | None:
    """The names of sizes that must be dynamic; None where torch.export gets the sizes itself."""
    if dynamic_shapes == "auto":
        return ()
    if isinstance(dynamic_shapes, str):
        dynamic_shapes = [dynamic_shapes]
    names = isinstance(dynamic_shapes, list | tuple) and dynamic_shapes
    if not names or not all(isinstance(name, str) for name in names):
        return None
    for name in names:
        place, colon, dim = name.rpartition(":")
        if name not in _SIZES and not (place and colon and dim.isdecimal()):
            raise CaptureError(
                f"{name!r} is no size that can be dynamic; write {', '.join(_SIZES)}, or INPUT:"
                "DIMENSION, such as x:1"
            )
    return tuple(names)


def asked_dims(name: str, argument: str, tensor: Tensor) -> list[int]:
    """The dimensions of an argument's tensor that a name of `dynamic_shapes` means."""
    last = tensor.dim() - 1
    if name in ("height", "width"):
        image = last >= 3 and tensor.is_floating_point()
        return [last - (name == "height")] if image else []
    if name in _SIZES:
        dim = _SIZES.index(name)
        return [dim] if dim == 0 or 1 < last + 1 <= 3 else []
    place, _, dim_text = name.rpartition(":")
    return [int(dim_text)] if place == argument and int(dim_text) <= last else []


def auto_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], asked: Sequence[str]
) -> Any:
    """Ask torch.export to decide for the first two dimensions, and for those that are asked for."""
    lengths = {
        x.shape[1]
        for x in pytree.tree_leaves((args, kwargs))
        if isinstance(x, Tensor) and x.dim() == 2
    }

    def dims(argument: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return None
        wanted = {d for name in asked for d in asked_dims(name, argument, x)}
        return {
            d: torch.export.Dim.AUTO
            for d in range(x.dim())
            if x.shape[d] > 1
            and (
                d in wanted
                or d == 0
                or (x.dim() <= 3 and d == 1)
                or (x.dim() > 3 and x.shape[d] in lengths)
            )
        }

    arguments = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes: dict[str, Any] = {}
    for name, value in arguments.items():
        shapes[name] = pytree.tree_map(functools.partial(dims, name), value)
    return shapes
