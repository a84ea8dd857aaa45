"""How much each unit of an axis group matters: the higher, the longer it stays."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graphprune.axes import AxisGroup, AxisGroups, axis_groups
from graphprune.errors import RecipeError
from graphprune.ir.program import Program
from graphprune.pipeline.base import Context
from graphprune.suggest import suggest

Score = Callable[[Program, AxisGroup, Context], Tensor]


def magnitude(program: Program, group: AxisGroup, ctx: Context) -> Tensor:
    """L2 norm of everything that would go with a unit: its slices of all parameters.

    Returns:
        float64 [size]. A parameter that carries the group on two dimensions counts on both.
    """
    groups: AxisGroups = ctx.get(axis_groups, program)
    # Units are looked up by the axes of one analysis; the group may come from another run of it.
    group = groups[group.id]
    squares = torch.zeros(group.size, dtype=torch.float64)
    for tensor, dim in sorted({(o.tensor, o.dim) for o in group.occurrences}):
        if tensor not in program.parameters:
            continue
        units = groups.units(group, tensor, dim)
        slices = _slice_norms(program.tensors[tensor], dim).double().square()
        mine = units >= 0
        squares.index_add_(0, units[mine], slices[mine])
    return squares.sqrt()


def _slice_norms(tensor: Tensor, dim: int) -> Tensor:
    """L2 norm of each slice along `dim`, at least in float32."""
    wide = tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32))
    others = [d for d in range(wide.dim()) if d != dim % wide.dim()]
    # vector_norm over an empty list of dimensions would reduce all of them.
    return torch.linalg.vector_norm(wide, dim=others) if others else wide.abs()


def random(program: Program, group: AxisGroup, ctx: Context) -> Tensor:
    """Uniform random numbers from the context's seed: the baseline that any score must beat."""
    return torch.rand(group.size, generator=ctx.generator, dtype=torch.float64)


# name -> function. Another score is one function and one line here.
SCORES: dict[str, Score] = {"magnitude": magnitude, "random": random}


def score_named(name: str) -> Score:
    """The score of this name.

    Raises:
        RecipeError: there is none; near matches are named.
    """
    if name not in SCORES:
        raise RecipeError(f"there is no score {name!r}; {suggest(name, SCORES)}")
    return SCORES[name]
