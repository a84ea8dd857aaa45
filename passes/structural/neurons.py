"""PruneNeurons: remove hidden units between two weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from graphprune.ir.program import Program
from graphprune.passes.name_patterns import check_names
from graphprune.passes.structural.removal import Removal
from graphprune.passes.structural.selection import Selector
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.registry import register


@register
@final
@dataclass(frozen=True, slots=True)
class PruneNeurons(Pass):
    """Remove hidden units: what one weight writes and only other weights read.

    1. Feed-forward neurons: a row of the first weight, a column of the second.
    2. Gated ones: the same row of gate and up, fused or not, and the column of down.
    3. Experts: the neurons of all experts that share a tensor, at the same indices.
    4. Inner channels of convolutional blocks, with their batch-norm entries. Where a grouped
       convolution or a shuffle takes 16 channels as 4 × 4, units of one factor go: `ratio` and
       `round_to` count channels. The report names the factor that is left alone.

    Units that a normalisation computes statistics over are left alone; PruneAxis cuts those on
    request.

    Attributes:
        ratio: part of each group's units to remove, in [0, 1); one unit always stays.
        score: "magnitude" (L2 norm of all that goes with a unit), "random"; with calibration
            "obs" (exact cost after the others make up), "fluctuation", "activation",
            "taylor" (gradients).
        allocation: "uniform" (the ratio of each group) or "global" (of all groups together).
        round_to: the kept count rounds up to a multiple of this; 8 or 16 suits vector units.
        compensate: how kept weights make up for removed ones: "none", "bias", "least-squares";
            "auto" is least squares where calibration decides, else none.
        damping: part of the mean squared input added to the Gram matrix's diagonal.
        floor: under "global", the part of each group's units that stays in any case.
        targets: name patterns; only groups that reach such a tensor. Globs for a name or a module,
            or "re:" and a regular expression.
        ignore: name patterns to leave alone.
        of: what ratio is a part of: the units there are "now", or those of the "dense" model, of
            which some may be gone already.
    """

    name: ClassVar[str] = "prune-neurons"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE
    needs_float: ClassVar[bool] = True
    without_data: ClassVar[str] = "score='magnitude' with compensate='none'"

    ratio: float
    score: str = "magnitude"
    allocation: str = "uniform"
    round_to: int = 1
    compensate: str = "auto"
    damping: float = 0.01
    floor: float = 0.0
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    of: str = "now"

    def __post_init__(self) -> None:
        self._removal()

    @property
    def needs_calibration(self) -> bool:
        return self._removal().needs_calibration

    def check(self, program: Program) -> None:
        check_names(self, program)

    def run(self, program: Program, ctx: Context) -> PassResult:
        return self._removal().run(program, ctx)

    def _removal(self) -> Removal:
        selector = Selector(("neuron",), targets=self.targets, ignore=self.ignore)
        return Removal(
            selector,
            self.ratio,
            self.score,
            self.allocation,
            self.round_to,
            self.compensate,
            self.damping,
            self.floor,
            self.of,
        )
