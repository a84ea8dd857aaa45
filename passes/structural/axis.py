"""PruneAxis: cut any free axis group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from graphprune.axes import ROLES
from graphprune.errors import RecipeError
from graphprune.ir.program import Program
from graphprune.passes.name_patterns import check_names
from graphprune.passes.structural.removal import Removal
from graphprune.passes.structural.selection import Selector
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.registry import register
from graphprune.suggest import suggest


@register
@final
@dataclass(frozen=True, slots=True)
class PruneAxis(Pass):
    """Remove units of any free axis group, chosen by role, by id, or by the tensors it reaches.

    1. `role="qk_dim"`: query/key dimensions inside the heads; "v_dim": value dimensions.
    2. `groups=("classifier.dense.weight[0]",)`: one group by its id, as `gp.inspect` prints it.
    3. `normalised=True` also takes axes that a layer norm or its like computes statistics over.
       That changes what the model computes; the report holds the drift, recovery is up to you.
    4. Of groups of one role that are factors of one dimension, 16 = 4 × 4 channels, one is cut, so
       that `ratio` and `round_to` count channels. With `groups` each one named loses the ratio.

    Attributes:
        ratio: part of each group's units to remove, in [0, 1); one unit always stays.
        role: a role or several; empty means any, and then `groups` or `targets` must say which.
        groups: ids of groups, or patterns of them.
        score: "magnitude" (L2 norm of all that goes with a unit), "random"; with calibration
            "obs" (exact cost after the others make up), "fluctuation", "activation",
            "taylor" (gradients).
        allocation: "uniform" (the ratio of each group) or "global" (of all groups together).
        round_to: the kept count rounds up to a multiple of this.
        compensate: how kept weights make up for removed ones: "none", "bias", "least-squares";
            "auto" is least squares where calibration decides, else none.
        damping: part of the mean squared input added to the Gram matrix's diagonal.
        floor: under "global", the part of each group's units that stays in any case.
        targets: name patterns; only groups that reach such a tensor. Globs for a name or a module,
            or "re:" and a regular expression.
        ignore: name patterns to leave alone.
        normalised: whether an axis goes that a norm computes statistics over; outputs change.
        of: what ratio is a part of: the units there are "now", or those of the "dense" model, of
            which some may be gone already.
    """

    name: ClassVar[str] = "prune-axis"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE
    needs_float: ClassVar[bool] = True
    without_data: ClassVar[str] = "score='magnitude' with compensate='none'"

    ratio: float
    role: str | tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    score: str = "magnitude"
    allocation: str = "uniform"
    round_to: int = 1
    compensate: str = "auto"
    damping: float = 0.01
    floor: float = 0.0
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    normalised: bool = False
    of: str = "now"

    def __post_init__(self) -> None:
        for role in self._roles():
            if role not in ROLES:
                raise RecipeError(f"there is no role {role!r}; {suggest(str(role), ROLES)}")
        if not (self.role or self.groups or self.targets):
            raise RecipeError(
                f"prune-axis needs to know what to cut: role (one of {list(ROLES)}), groups or "
                "targets"
            )
        self._removal()

    @property
    def needs_calibration(self) -> bool:
        return self._removal().needs_calibration

    def check(self, program: Program) -> None:
        check_names(self, program)

    def run(self, program: Program, ctx: Context) -> PassResult:
        return self._removal().run(program, ctx)

    def _roles(self) -> tuple[str, ...]:
        if isinstance(self.role, str):
            return (self.role,) if self.role else ()
        return self.role

    def _removal(self) -> Removal:
        selector = Selector(self._roles(), self.groups, self.targets, self.ignore, self.normalised)
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
