"""Magnitude: zero the smallest weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from graphprune.axes.sites import LinearSite
from graphprune.errors import RecipeError
from graphprune.passes.sparsity.visit import Visit
from graphprune.passes.sparsity.zeroing import ZeroingPass
from graphprune.pipeline.registry import register
from graphprune.suggest import suggest

SCOPES = ("layer", "row")


@register
@final
@dataclass(frozen=True, slots=True)
class Magnitude(ZeroingPass):
    """Zero the weights of smallest absolute value; needs no data.

    Zeros alone make nothing faster in ONNX Runtime: remove structure, or quantize, for speed.

    Attributes:
        scope: "layer" (smallest of the matrix) or "row" (so many of every row).
    """

    name: ClassVar[str] = "magnitude"
    without_data: ClassVar[str] = "allocation='uniform'"
    reads_activations: ClassVar[bool] = False

    scope: str = "layer"

    def __post_init__(self) -> None:
        check_scope(self.scope)
        ZeroingPass.__post_init__(self)

    def prune_matrix(self, visit: Visit, site: LinearSite) -> Tensor:
        weight = visit.matrix(site)
        return visit.shares[site.name].zeroed(weight, weight.abs(), per_row=self.scope == "row")


def check_scope(scope: str) -> None:
    """Raise RecipeError for an unknown scope."""
    if scope not in SCOPES:
        raise RecipeError(f"there is no scope {scope!r}; {suggest(scope, SCOPES)}")
