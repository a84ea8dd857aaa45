"""SparseGPT: zero weights, with error compensation in the rest of the row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from graphprune.axes.sites import LinearSite
from graphprune.passes.solvers.sparsegpt import sparsegpt
from graphprune.passes.sparsity.visit import Visit
from graphprune.passes.sparsity.zeroing import ZeroingPass
from graphprune.pipeline.registry import register
from graphprune.validate import check_number


@dataclass(frozen=True, kw_only=True)
class CompensatedPass(ZeroingPass):
    """A pass that prunes matrices by SparseGPT's solver, which adjusts the weights that stay.

    Blocks are scored by the cost of the whole block. From 8 outputs a block on ("32x4"), and for
    whole columns, every weight that stays compensates (structured OBS), at the price of more time
    than a sweep takes. Whole rows leave nothing to compensate with.

    Attributes:
        damping: fraction of the mean squared input added to the Gram matrix's diagonal.
    """

    __slots__ = ()

    damping: float = 0.01

    def __post_init__(self) -> None:
        ZeroingPass.__post_init__(self)
        check_number("damping", self.damping, "0 or more", low=0)

    def prune_matrix(self, visit: Visit, site: LinearSite) -> Tensor:
        share, inputs = visit.shares[site.name], visit.inputs(site, self.damping)
        return sparsegpt(visit.matrix(site), inputs, share.sparsity, share.pattern)


@register
@final
@dataclass(frozen=True, slots=True)
class SparseGPT(CompensatedPass):
    """Zero the weights whose removal costs least, with compensation in those to their right.

    SparseGPT (arXiv 2301.00774), matrix by matrix: the outputs on the calibration inputs change
    as little as a single sweep over the columns can make them. Layers are visited in execution
    order, each block on what the pruned ones before it make. Zeros alone make nothing faster in
    ONNX Runtime.
    """

    name: ClassVar[str] = "sparsegpt"
