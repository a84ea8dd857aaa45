"""A pass of your own, in one file: usable from Python and, once registered, from recipes.

    python examples/custom_pass.py

The pass decides what stays; `ctx.shrink` removes the rest and verifies that this equals masking it.
A package offers its passes to every user through the entry-point group "graphprune.passes".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

import graphprune as gp
from graphprune.axes import AxisGroup, AxisGroups, axis_groups
from graphprune.errors import RecipeError
from graphprune.models.zoo.tiny import tiny
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.registry import register


@register
@final
@dataclass(frozen=True, slots=True)
class DropWeakNeurons(Pass):
    """Remove neurons whose weights are weak beside the average neuron of their layer.

    How many go is up to each layer, not to a ratio.

    Attributes:
        below: a neuron goes when its L2 norm is below this fraction of its layer's mean norm.
    """

    name: ClassVar[str] = "drop-weak-neurons"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE

    below: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.below < 1:
            raise RecipeError(f"below must be between 0 and 1, got {self.below!r}")

    def run(self, program: gp.Program, ctx: Context) -> PassResult:
        groups = ctx.get(axis_groups, program)
        neurons = groups.with_role("neuron")
        skipped = [{"id": g.id, "reason": g.frozen[0]} for g in neurons if g.frozen]
        keep = {}
        for group in neurons:
            norms = _norms(groups, group)
            strong = (norms >= self.below * norms.mean()).nonzero().flatten()
            if not group.frozen and 0 < len(strong) < group.size:
                keep[group.id] = strong
        if not keep:
            return PassResult(program, False, {"skipped": skipped})
        smaller, verification = ctx.shrink(program, keep)
        cut = [
            {"id": g, "role": "neuron", "before": groups[g].size, "after": len(k)}
            for g, k in keep.items()
        ]
        return PassResult(
            smaller, True, {"groups": cut, "skipped": skipped, "verification": verification}
        )


def _norms(groups: AxisGroups, group: AxisGroup) -> Tensor:
    """L2 norm of all that goes with each neuron, whatever tensors and dimensions it is in."""
    squares = torch.zeros(group.size)
    for place in group.occurrences:
        if place.tensor in groups.program.parameters:
            weight = groups.program.tensors[place.tensor].float().movedim(place.dim, 0)
            units = groups.units(group, place.tensor, place.dim)
            ours = units >= 0
            squares.index_add_(0, units[ours], weight[ours].flatten(1).pow(2).sum(dim=1))
    return squares.sqrt()


def main() -> None:
    model, inputs = tiny("tiny-llama")
    compiled = gp.compile(model, [DropWeakNeurons(0.95)], example_inputs=inputs)
    print(compiled.report)
    again = gp.compile(
        model, {"passes": [{"drop-weak-neurons": {"below": 0.9}}]}, example_inputs=inputs
    )
    print(f"\nfrom a recipe:\n{again.report}")


if __name__ == "__main__":
    main()
