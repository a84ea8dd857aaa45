"""What sparse training does around its loop: zeros for good, and how the network is wired then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from graphprune.ir.program import JSON, Program
from graphprune.passes.training.penalties import Part, degrees, views

_BINS = 20


def zero_small(
    program: Program, parts: Sequence[Part], below: float, sparsity: float | None
) -> Program:
    """Zero the small weights of the parts, and note them as zeroed.

    Args:
        below: weights of smaller magnitude go.
        sparsity: instead, this part of all of the parts' weights goes, the smallest of them.
    """
    names = list(dict.fromkeys(part.tensor for part in parts))
    chosen = {name: torch.zeros_like(program.tensors[name], dtype=torch.bool) for name in names}
    for part in parts:
        _view_of(part, chosen[part.tensor])
    sizes = {name: program.tensors[name].abs().double() for name in names}
    limit = below
    if sparsity is not None and names:
        flat = torch.cat([sizes[name][chosen[name]] for name in names])
        count = int(sparsity * len(flat) + 0.5)
        # Exactly so many but for ties: those below the value that comes next.
        limit = float(flat.sort().values[count]) if count < len(flat) else float("inf")
    changed = {
        name: program.tensors[name].masked_fill(chosen[name] & (sizes[name] < limit), 0)
        for name in names
    }
    return replace(program.with_tensors(changed), zeroed=program.zeroed.union(names))


def sparsity_of(program: Program, parts: Sequence[Part], threshold: float) -> float:
    """The part of the parts' weights that is smaller than a threshold, or zero."""
    seen = views(parts, program.tensors)
    count = sum(view.numel() for view in seen)
    dead = sum(int(((view.abs() < threshold) | (view == 0)).sum()) for view in seen)
    return dead / count if count else 0.0


def topology(program: Program, parts: Sequence[Part], threshold: float) -> dict[str, JSON]:
    """How many living connections units have: mean, spread, dead ones, and a histogram."""
    found = degrees(parts, program, threshold)
    if not len(found):
        return {}
    widest = max(int(view.shape[-1]) for view in views(parts, program.tensors))
    counts = torch.histc(found, _BINS, 0, widest)
    return {
        "units": len(found),
        "mean": float(found.mean()),
        "sd": float(found.std(correction=0)),
        "dead": int((found == 0).sum()),
        "histogram": {"from": 0, "to": widest, "counts": [int(c) for c in counts]},
    }


def _view_of(part: Part, chosen: Tensor) -> None:
    """Mark a part's entries in a mask of its tensor."""
    moved = chosen.movedim((part.unit_dim, part.other_dim), (-2, -1))
    units = torch.arange(moved.shape[-2]) if part.units is None else torch.tensor(part.units)
    others = torch.arange(moved.shape[-1]) if part.others is None else torch.tensor(part.others)
    moved[..., units[:, None], others[None, :]] = True
