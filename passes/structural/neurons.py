"""PruneNeurons: remove hidden units between two weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from graphprune.passes.structural.base import StructuralPass
from graphprune.passes.structural.selection import Selector
from graphprune.pipeline.registry import register


@register
@final
@dataclass(frozen=True, slots=True)
class PruneNeurons(StructuralPass):
    """Remove hidden units: what one weight writes and only other weights read.

    1. Feed-forward neurons: a row of the first weight, a column of the second.
    2. Gated ones: the same row of gate and up, fused or not, and the column of down.
    3. Experts: the neurons of all experts that share a tensor, at the same indices.
    4. Inner channels of convolutional blocks, with their batch-norm entries. Where a grouped
       convolution or a shuffle takes 16 channels as 4 × 4, units of one factor go: `ratio` and
       `round_to` count channels. The report names the factor that is left alone.

    Scores and compensation that look at data take channels too, as columns of what reads them; fold
    batch norms first (FoldBatchNorm).

    Units that a normalization computes statistics over are left alone; PruneAxis cuts those on
    request.
    """

    name: ClassVar[str] = "prune-neurons"

    @property
    def selector(self) -> Selector:
        return Selector(("neuron",))
