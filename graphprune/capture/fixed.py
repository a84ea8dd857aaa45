"""Dimensions that have one size, although they could be dynamic by what they are; and why."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from graphprune.capture.agreement import model_outputs
from graphprune.capture.dynamic import asked_dims
from graphprune.capture.guards import Place, culprit
from graphprune.errors import CaptureError, first_line
from graphprune.ir.program import Entry, Program

_log = logging.getLogger(__name__)

_BY_TRACING = "torch.export made it constant while tracing forward"
_UNASKED = (
    "an image's sides are kept unless they are asked for, with dynamic_shapes=('height', 'width') "
    "or --dynamic height,width"
)


def with_fixed(model: nn.Module, program: Program, asked: Sequence[str]) -> Entry:
    """The entry `forward` with a reason for each dimension that might have been dynamic and is not.

    A dimension that the model itself takes in one size alone, such as its features, is none of
    them; the sides of images always are.

    Args:
        model: what was captured.
        program: its entry has the dimensions that tracing made constant in `fixed`, with a line.
        asked: names of sizes that must be dynamic.

    Raises:
        CaptureError: one of these cannot be.
    """
    entry = program.forward
    lines = {(name, d): line for name, dims in entry.fixed.items() for d, line in dims.items()}
    demanded = _demanded(model, entry, asked)
    fixed: dict[str, dict[int, str]] = {}
    sides = _sides(entry, lines.keys())
    for place in (*lines, *sides):
        like = [
            p
            for p in (sides if place in sides else lines)
            if _size(entry, p) == _size(entry, place)
        ]
        refusal = _refusal(model, entry, like, _size(entry, place))
        if place in sides:
            takes = f"{type(model).__name__} takes no other: {refusal}"
            reason = takes if refusal else _UNASKED
        elif refusal and place not in demanded:
            continue
        else:
            line = lines[place] or culprit(program, entry, place)
            reason = f"{line} fixed it" if line else _BY_TRACING
            _check_demanded(demanded.get(place), reason)
            _log.warning(
                "%s was captured for one size alone in dimension %d of %r: %s",
                type(model).__name__,
                place[1],
                place[0],
                reason,
            )
        fixed.setdefault(place[0], {})[place[1]] = reason
    for place, name in demanded.items():
        if place[1] not in entry.dynamic.get(place[0], {}):
            _check_demanded(name, "the example inputs have a size of one there")
    return replace(entry, fixed=fixed)


def _check_demanded(name: str | None, reason: str) -> None:
    if name is not None:
        raise CaptureError(
            f"{name!r} cannot be dynamic: {reason}; capture without it, at the size that you deploy"
        )


def _demanded(model: nn.Module, entry: Entry, asked: Sequence[str]) -> dict[Place, str]:
    """Dimensions that must be dynamic, with the names that they were asked for by."""
    tensors = dict(zip(entry.input_names, entry.example, strict=True))
    demanded = {
        (leaf, dim): name
        for name in asked
        for argument in entry.arguments
        for leaf in argument.leaves
        if isinstance(leaf, str)
        for dim in asked_dims(name, argument.name, tensors[leaf])
    }
    for name in asked:
        if name not in demanded.values():
            shapes = {n: tuple(shape) for n, shape in entry.shapes.items()}
            raise CaptureError(
                f"{name!r} cannot be dynamic: no input of {type(model).__name__} has it, they are "
                f"{shapes}; name another size"
            )
    return demanded


def _size(entry: Entry, place: Place) -> int:
    return int(dict(zip(entry.input_names, entry.example, strict=True))[place[0]].shape[place[1]])


def _sides(entry: Entry, known: Collection[Place]) -> list[Place]:
    """The sides of images that are not dynamic."""
    return [
        (name, dim)
        for name, tensor in zip(entry.input_names, entry.example, strict=True)
        if tensor.dim() >= 4 and tensor.is_floating_point()
        for dim in (tensor.dim() - 2, tensor.dim() - 1)
        if tensor.shape[dim] > 1
        and dim not in entry.dynamic.get(name, {})
        and (name, dim) not in known
    ]


def _refusal(model: nn.Module, entry: Entry, places: Sequence[Place], size: int) -> str:
    """Why the model itself takes no other size in these dimensions; "" where it does."""
    refusal = ""
    for other in (size * 2 // 3, size // 2, size + -(-size // 2)):
        if other in (0, size):
            continue
        flat = [
            _resized(tensor, [dim for name_, dim in places if name_ == name], other)
            for name, tensor in zip(entry.input_names, entry.example, strict=True)
        ]
        try:
            model_outputs(model, entry, flat)
        except Exception as e:
            refusal = first_line(e)
        else:
            return ""
    return refusal


def _resized(tensor: Tensor, dims: Sequence[int], size: int) -> Tensor:
    """A tensor cropped, or repeated, to a size in some dimensions."""
    for dim in dims:
        tensor = torch.cat([tensor, tensor], dim).narrow(dim, 0, size)
    return tensor.contiguous()
