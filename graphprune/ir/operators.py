"""graphprune::grouped_mm: one matmul for each group of rows, as mixtures of experts compute them.

Libraries name this operator each in their own way; capture turns those names into this one, so
that a saved Program needs nothing but graphprune.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("graphprune::grouped_mm", mutates_args=())
def grouped_mm(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Multiply each group of rows by its own matrix.

    Args:
        input: rows sorted by group, [rows, features in].
        weight: one matrix a group, [groups, features in, features out].
        offs: end of each group's rows, cumulative, integers [groups]; rows after the last stay 0.
    """
    output = input.new_zeros(input.shape[0], weight.shape[2])
    for group, rows in _groups(offs):
        torch.mm(input[rows], weight[group], out=output[rows])
    return output


def _groups(offs: Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for group, end in enumerate(offs.tolist()):
        if end > start:
            yield group, slice(start, end)
            start = end


@grouped_mm.register_fake
def _fake(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    if not (input.dim() == 2 and weight.dim() == 3 and offs.dim() == 1):
        raise ValueError("grouped_mm takes [rows, in], [groups, in, out] and [groups]")
    if input.shape[1] != weight.shape[1] or offs.shape[0] != weight.shape[0]:
        raise ValueError(
            f"grouped_mm: {tuple(input.shape)}, {tuple(weight.shape)} and {tuple(offs.shape)} "
            "do not fit each other"
        )
    return input.new_empty(input.shape[0], weight.shape[2])


@torch.library.custom_op("graphprune::grouped_mm_weight_gradient", mutates_args=())
def _weight_gradient(input: Tensor, gradient: Tensor, offs: Tensor) -> Tensor:
    """input' @ gradient for each group; an operator because its loop depends on values."""
    result = input.new_zeros(offs.shape[0], input.shape[1], gradient.shape[1])
    for group, rows in _groups(offs):
        torch.mm(input[rows].T, gradient[rows], out=result[group])
    return result


@_weight_gradient.register_fake
def _fake_weight_gradient(input: Tensor, gradient: Tensor, offs: Tensor) -> Tensor:
    return input.new_empty(offs.shape[0], input.shape[1], gradient.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    input, weight, offs = ctx.saved_tensors
    to_input = to_weight = None
    if ctx.needs_input_grad[0]:
        to_input = grouped_mm(gradient, weight.transpose(1, 2), offs)
    if ctx.needs_input_grad[1]:
        to_weight = _weight_gradient(input, gradient, offs)
    return to_input, to_weight, None


grouped_mm.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.graphprune.grouped_mm)
def _flops(
    input_shape: Sequence[int], weight_shape: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    """Two for each multiply-add; every row meets one matrix."""
    return 2 * int(input_shape[0]) * int(input_shape[1]) * int(weight_shape[2])
