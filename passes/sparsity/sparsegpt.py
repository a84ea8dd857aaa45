"""SparseGPT: zero weights, and let the others of the row make up for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from graphprune.calibration.gram import Gram
from graphprune.ir.program import Program
from graphprune.passes.name_patterns import check_names
from graphprune.passes.solvers.sparsegpt import Inputs, sparsegpt
from graphprune.passes.sparsity.zeroing import Share, SiteBySite, Zeroing
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.registry import register


@register
@final
@dataclass(frozen=True, slots=True)
class SparseGPT(Pass):
    """Zero the weights whose loss costs least, while those to their right make up for it.

    SparseGPT (arXiv 2301.00774), matrix by matrix: the outputs on the calibration inputs change
    as little as a single sweep over the columns can make them. Layers are visited in execution
    order, each block on what the pruned ones before it make. Zeros alone make nothing faster in
    ONNX Runtime.

    Attributes:
        sparsity: part of the weights to zero, in [0, 1); not with an n:m pattern.
        pattern: what goes together: "single" weights, "n:m" (keeps n of every m consecutive inputs
            of a row), "OUTxIN" blocks such as "32x4" (scored and made up for jointly), whole
            "columns" (structured OBS), or "rows" (for which nothing can make up).
        allocation: "uniform" (the sparsity in every matrix), "owl" (more where outliers are few) or
            "global" (one ranking of all matrices by |w| · ‖x‖ relative to its mean).
        targets: name patterns; only these weights. Globs for a name or a module, or "re:" and a
            regular expression.
        ignore: name patterns to leave alone; output heads are left alone unless targets names them.
        indivisible: what to do with a matrix that the pattern does not fit: "refuse" or "skip".
        damping: part of the mean squared input added to the Gram matrix's diagonal.
        owl_threshold: OWL: how many times the mean score makes an outlier.
        owl_spread: OWL: the largest deviation of a block's density from the lowest is twice this;
            with n:m, this many weights of each m.
    """

    name: ClassVar[str] = "sparsegpt"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE | Invariant.SHAPES
    needs_float: ClassVar[bool] = True

    sparsity: float | None = None
    pattern: str = "single"
    allocation: str = "uniform"
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    indivisible: str = "refuse"
    damping: float = 0.01
    owl_threshold: float = 5.0
    owl_spread: float = 0.08

    def __post_init__(self) -> None:
        Zeroing.of(self)

    @property
    def needs_calibration(self) -> bool:
        return True

    def check(self, program: Program) -> None:
        check_names(self, program)

    def run(self, program: Program, ctx: Context) -> PassResult:
        return Zeroing.of(self).run(program, ctx, SiteBySite(solve), data=True)


def solve(weight: Tensor, gram: Gram | None, inputs: Callable[[], Inputs], share: Share) -> Tensor:
    """SparseGPT on one matrix, as a method of `SiteBySite`."""
    return sparsegpt(weight, inputs(), share.sparsity, share.pattern)
