"""Around the loop of sparse training: permanent zeros, and the connections that remain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphprune.axes import axis_groups
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.ir.program import JSON, Program
from graphprune.passes.sparsity.sparsity_pattern import Pattern, parse_pattern
from graphprune.passes.training.penalties import (
    SINGLE,
    Part,
    Parts,
    degrees,
    find_parts,
    views,
)
from graphprune.passes.training.training_pass import PlainTrainingPass
from graphprune.pipeline.base import Context
from graphprune.validate import check_number
from graphprune.verify.equivalence import verify_rewrite

_BINS = 20


@dataclass(frozen=True, kw_only=True)
class PenaltyPass(PlainTrainingPass):
    """A pass that trains with a penalty on some weights, and zeroes the small ones of them.

    Attributes:
        zero_below: after the last epoch, weights of smaller magnitude become zero; 0 for none. Of
            blocks their root mean square is meant.
        sparsity: instead, this fraction of all weights under penalty becomes zero, the smallest
            ones; of all blocks, those of smallest L2 norm.
        pattern: "unstructured", or "OUTxIN" blocks such as "32x4": what the penalty acts on, and
            becomes zero, together.
    """

    __slots__ = ()

    epochs: int = 3
    zero_below: float = 1e-4
    sparsity: float | None = None
    pattern: str = "unstructured"

    def __post_init__(self) -> None:
        PlainTrainingPass.__post_init__(self)
        check_number("zero_below", self.zero_below, "0 or more", low=0)
        if self.sparsity is not None:
            rule = "a fraction of all weights, 0 to 1"
            check_number("sparsity", self.sparsity, rule, low=0, high=1)
        if not (self.blocks.is_block or self.blocks.text == "unstructured"):
            raise RecipeError(
                f"{self.name} acts on single weights or blocks, not on pattern {self.pattern!r}: "
                "write 'unstructured', or blocks such as '32x4'"
            )

    @property
    def blocks(self) -> Pattern:
        """What goes together."""
        return parse_pattern(self.pattern)

    def parts(self, program: Program) -> Parts:
        """Return the weights under penalty."""
        return find_parts(axis_groups(program))

    def some_parts(self, program: Program, ctx: Context) -> Parts:
        """Return the weights under penalty.

        Raises:
            UnsupportedError: nothing is.
        """
        parts = self.parts(program)
        if not parts.all:
            raise UnsupportedError(
                f"pass {ctx.running!r} finds neither feed-forward nor attention weights that are "
                "linear layers in this model"
            )
        return parts

    def zeroed(self, program: Program) -> Program:
        """The program with its small weights under penalty zeroed."""
        if self.sparsity is None and not self.zero_below:
            return program
        parts = self.parts(program).all
        return zero_small(program, parts, self.zero_below, self.sparsity, self.blocks)


def zero_small(
    program: Program,
    parts: Sequence[Part],
    below: float,
    sparsity: float | None,
    pattern: Pattern = SINGLE,
) -> Program:
    """Zero the small weights of the parts, or small blocks of them, and note them as zeroed.

    A block that parts hold a piece of only stays.

    Args:
        below: weights of smaller magnitude, blocks of smaller root mean square, go.
        sparsity: instead, this fraction of all of the parts' weights or blocks goes, those of
            smallest magnitude or L2 norm.
        pattern: unstructured, or blocks.
    """
    tensors = {part.tensor: part for part in parts}
    chosen = {name: torch.zeros_like(program.tensors[name], dtype=torch.bool) for name in tensors}
    for part in parts:
        _view_of(part, chosen[part.tensor])
    norms, sizes, whole = {}, {}, {}
    for name, part in tensors.items():
        matrix = part.matrix(program.tensors[name]).abs().double()
        norms[name] = pattern.units(matrix)
        sizes[name] = pattern.units(torch.ones_like(matrix))  # their roots
        whole[name] = pattern.units(1.0 - part.matrix(chosen[name]).double()) == 0
    if sparsity is None or not tensors:
        gone = {name: norms[name] < below * sizes[name] for name in tensors}
    else:
        flat = torch.cat([norms[name][whole[name]] for name in tensors])
        count = int(sparsity * len(flat) + 0.5)
        # Exactly so many but for ties: those below the value that comes next.
        limit = float(flat.sort().values[count]) if count < len(flat) else float("inf")
        gone = {name: norms[name] < limit for name in tensors}
    changed = {}
    for name, part in tensors.items():
        changed[name] = program.tensors[name].clone()
        matrix = part.matrix(changed[name])
        matrix[pattern.spread(gone[name] & whole[name], *matrix.shape[-2:])] = 0
    return replace(program.with_tensors(changed), zeroed=program.zeroed.union(tensors))


def sparsity_of(program: Program, parts: Sequence[Part], threshold: float) -> float:
    """The fraction of the parts' weights that is smaller than a threshold, or zero."""
    seen = views(parts, program.tensors)
    count = sum(view.numel() for view in seen)
    dead = sum(int(((view.abs() < threshold) | (view == 0)).sum()) for view in seen)
    return dead / count if count else 0.0


def compare_zeroed(dead: Program, masked: Program) -> None:
    """Verify that zeroed weights are masked units, in whatever order the masked program has them.

    Raises:
        VerificationError: they are not.
    """
    # Only `forward`: the example of a cache is in the old order.
    dead, masked = (replace(p, entries={"forward": p.forward}) for p in (dead, masked))
    verify_rewrite(dead, masked, nodes=False)


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
