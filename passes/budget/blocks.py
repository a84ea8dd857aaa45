"""Zero blocks in a branch's products, as one more thing that a budget chooses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from graphprune.axes import AxisGroups, axis_groups
from graphprune.axes.sites import LinearSite, linear_sites
from graphprune.calibration.gram import Gram
from graphprune.calibration.stream import Stream
from graphprune.ir.program import Program
from graphprune.passes.solvers.sparsegpt import Inputs, sparsegpt
from graphprune.passes.sparsity.sparsity_pattern import Pattern, lowest, removed_count


def block_sites(groups: AxisGroups, tensors: Collection[str], pattern: Pattern) -> list[LinearSite]:
    """The products with these weights that a sparse kernel can run, in execution order.

    Those with a matrix that is used once and is more than one block; no convolutions, no experts.
    """
    every = linear_sites(groups)
    uses = Counter(site.tensor for site in every)
    return [
        site
        for site in every
        if site.tensor in tensors
        and uses[site.tensor] == 1
        and site.window is None
        and site.expert is None
        and not pattern.obstacle(*site.matrix(groups.program).shape)
    ]


def thinned_out(program: Program, pattern: Pattern, zeros: Mapping[str, float]) -> Program:
    """The program with zero blocks, whichever they are: for its time only.

    Args:
        program: in which products that a sparse kernel can run get them.
        pattern: of the blocks.
        zeros: the fraction of them that is zero, by the weight's name.
    """
    if not zeros:
        return program
    generator = torch.Generator().manual_seed(0)
    for site in block_sites(axis_groups(program), zeros, pattern):
        weight = site.matrix(program)
        units = pattern.shape(*weight.shape)
        drawn = torch.rand(1, units[0] * units[1], generator=generator)
        count = removed_count(zeros[site.tensor], drawn.numel())
        gone = lowest(drawn, count).reshape(units)
        new = weight.masked_fill(pattern.spread(gone, *weight.shape), 0)
        program = site.with_matrix(program, new)
    return program


@final
@dataclass(frozen=True, slots=True)
class Blocks:
    """What candidates with zero blocks are made of.

    Blocks are chosen in one sweep over the columns, and what stays is fitted to the outputs; the
    exact order, one after another, would take minutes for every candidate.

    Attributes:
        pattern: of the blocks.
        damping: fraction of the mean squared input added to the Gram matrix's diagonal.
        sites: by item.
        grams: moments of the inputs in the dense model, by site.
    """

    pattern: Pattern
    damping: float
    sites: Mapping[str, Sequence[LinearSite]]
    grams: Mapping[str, Gram]

    @classmethod
    def collect(
        cls,
        program: Program,
        batches: Sequence[object],
        sites: Mapping[str, Sequence[LinearSite]],
        pattern: Pattern,
        damping: float,
    ) -> Blocks:
        """Run the dense model over the batches."""
        every = [site for some in sites.values() for site in some]
        moments = Stream(program, batches).moments(program, every)
        grams = {site.name: gram for site, gram in zip(every, moments, strict=True)}
        return cls(pattern, damping, sites, grams)

    def zeroed(
        self, program: Program, item: str, zeros: float, kept: Mapping[str, Tensor]
    ) -> Program:
        """The program with so many zero blocks in each product of an item.

        Args:
            program: all shapes are the dense model's.
            item: its id.
            zeros: fraction of the blocks.
            kept: by tensor that has lost units, what stays of it; bool, like the tensor.
        """
        inputs: dict[tuple[object, ...], Inputs] = {}
        for site in self.sites[item]:
            whole = site.matrix(program).to("cpu", torch.float64)
            stays = kept.get(site.tensor)
            mask = torch.ones_like(whole, dtype=torch.bool)
            if stays is not None:
                mask = site.as_matrix(stays)
            # What stays will be a smaller matrix, whose blocks are others.
            rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            key = *site.reads, len(columns)
            if key not in inputs:
                gram = self.grams[site.name].matrix[columns][:, columns]
                inputs[key] = Inputs.of(gram, self.damping)
            small = sparsegpt(
                whole[rows][:, columns], inputs[key], zeros, self.pattern, exact=False
            )
            new = whole.clone()
            new[rows[:, None], columns] = small
            program = site.with_matrix(program, new)
        return program
