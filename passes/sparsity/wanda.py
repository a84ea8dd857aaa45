"""Wanda: zero the weights that matter least to what their layer computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from graphprune.axes.sites import LinearSite
from graphprune.passes.sparsity.magnitude import check_scope
from graphprune.passes.sparsity.visit import Visit
from graphprune.passes.sparsity.zeroing import ZeroingPass
from graphprune.pipeline.registry import register


@register
@final
@dataclass(frozen=True, slots=True)
class Wanda(ZeroingPass):
    """Zero the weights of smallest |w| · ‖x‖, x being their input; the others stay as they are.

    Wanda (arXiv 2306.11695). Layers are visited in execution order, each on what the pruned ones
    before it make. Zeros alone make nothing faster in ONNX Runtime.

    Attributes:
        scope: "row" (so many of every row, as the paper does; rows of a pattern's units) or
            "layer" (the lowest of the matrix).
    """

    name: ClassVar[str] = "wanda"

    scope: str = "row"

    def __post_init__(self) -> None:
        check_scope(self.scope)
        ZeroingPass.__post_init__(self)

    def prune_matrix(self, visit: Visit, site: LinearSite) -> Tensor:
        weight = visit.matrix(site)
        scores = weight.abs() * visit.grams[site.name].norm
        return visit.shares[site.name].zeroed(weight, scores, per_row=self.scope == "row")
