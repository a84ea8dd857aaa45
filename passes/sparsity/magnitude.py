"""Magnitude: zero the smallest weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from graphprune.errors import RecipeError
from graphprune.ir.program import Program
from graphprune.passes.name_patterns import check_names
from graphprune.passes.sparsity.sparsity_pattern import removed_mask
from graphprune.passes.sparsity.zeroing import Share, SiteBySite, Zeroing
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.registry import register
from graphprune.suggest import suggest

SCOPES = ("layer", "row")


@register
@final
@dataclass(frozen=True, slots=True)
class Magnitude(Pass):
    """Zero the weights of smallest absolute value; needs no data.

    Zeros alone make nothing faster in ONNX Runtime: remove structure, or quantise, for speed.

    Attributes:
        sparsity: part of the weights to zero, in [0, 1); not with an n:m pattern.
        pattern: what goes together: "single" weights, "n:m" (keeps n of every m consecutive inputs
            of a row), "OUTxIN" blocks such as "32x4", whole "rows" or "columns". Units are scored
            by the sum of their absolute values.
        scope: "layer" (smallest of the matrix) or "row" (so many of every row).
        allocation: "uniform" (the sparsity in every matrix), "global" (one ranking of all matrices)
            or "owl" (outliers decide each block's; needs calibration).
        targets: name patterns; only these weights. Globs for a name or a module, or "re:" and a
            regular expression.
        ignore: name patterns to leave alone; output heads are left alone unless targets names them.
        indivisible: what to do with a matrix that the pattern does not fit: "refuse" or "skip".
        owl_threshold: OWL: how many times the mean score makes an outlier.
        owl_spread: OWL: the largest deviation of a block's density from the lowest is twice this;
            with n:m, this many weights of each m.
    """

    name: ClassVar[str] = "magnitude"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE | Invariant.SHAPES
    needs_float: ClassVar[bool] = True
    without_data: ClassVar[str] = "allocation='uniform'"

    sparsity: float | None = None
    pattern: str = "single"
    scope: str = "layer"
    allocation: str = "uniform"
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    indivisible: str = "refuse"
    owl_threshold: float = 5.0
    owl_spread: float = 0.08

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise RecipeError(f"there is no scope {self.scope!r}; {suggest(self.scope, SCOPES)}")
        Zeroing.of(self)

    @property
    def needs_calibration(self) -> bool:
        return Zeroing.of(self).needs_calibration(False)

    def check(self, program: Program) -> None:
        check_names(self, program)

    def run(self, program: Program, ctx: Context) -> PassResult:
        def solve(weight: Tensor, gram: object, inputs: object, share: Share) -> Tensor:
            gone = removed_mask(weight.abs(), share.sparsity, share.pattern, self.scope == "row")
            return weight.masked_fill(gone, 0)

        return Zeroing.of(self).run(program, ctx, SiteBySite(solve), data=False)
