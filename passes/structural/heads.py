"""PruneHeads: remove whole attention heads."""

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
class PruneHeads(Pass):
    """Remove attention heads, with everything that only they read or write.

    1. Plain attention: a head's query, key and value rows and its columns of the output projection.
    2. Grouped-query attention: a whole group, one key/value head and all query heads that share it.
       With `queries_per_group`, query heads inside every group instead; keys and values stay.
    3. A group that spans layers (a position bias shared by a stack) is cut as one.

    Attributes:
        ratio: part of each group's heads to remove, in [0, 1); the last head always stays.
        score: "magnitude" (L2 norm of all that goes with a head), "random"; with calibration
            "obs" (exact cost after the others make up), "fluctuation", "activation",
            "taylor" (gradients).
        allocation: "uniform" (the ratio of each group) or "global" (of all groups together).
        round_to: the kept count rounds up to a multiple of this.
        compensate: how kept weights make up for removed ones: "none", "bias", "least-squares";
            "auto" is least squares where calibration decides, else none.
        damping: part of the mean squared input added to the Gram matrix's diagonal.
        floor: under "global", the part of each group's units that stays in any case.
        targets: name patterns; only attention that reaches such a tensor. Globs for a name or a
            module, or "re:" and a regular expression.
        ignore: name patterns to leave alone.
        queries_per_group: cut query heads inside every key/value group, not whole groups.
        of: what ratio is a part of: the units there are "now", or those of the "dense" model, of
            which some may be gone already.
    """

    name: ClassVar[str] = "prune-heads"
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
    queries_per_group: bool = False
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
        roles = ("queries_per_group",) if self.queries_per_group else ("head", "kv_group")
        selector = Selector(roles, targets=self.targets, ignore=self.ignore)
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
