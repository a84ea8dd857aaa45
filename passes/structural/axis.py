"""PruneAxis: cut any free axis group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from graphprune.axes import ROLES
from graphprune.errors import RecipeError
from graphprune.passes.structural.base import StructuralPass
from graphprune.passes.structural.selection import Selector
from graphprune.pipeline.registry import register
from graphprune.suggest import suggest


@register
@final
@dataclass(frozen=True, slots=True)
class PruneAxis(StructuralPass):
    """Remove units of any free axis group, chosen by role, by id, or by the tensors it reaches.

    1. `role="qk_dim"`: query/key dimensions inside the heads; "v_dim": value dimensions.
    2. `groups=("classifier.dense.weight[0]",)`: one group by its id, as `gp.inspect` prints it.
    3. `normalized=True` also takes axes that a layer norm or its like computes statistics over.
       That changes what the model computes; the report holds the drift, recovery is up to you.
    4. Of groups of one role that are factors of one dimension, 16 = 4 × 4 channels, one is cut, so
       that `ratio` and `round_to` count channels. With `groups` each one named loses the ratio.

    Attributes:
        role: a role or several; empty means any, and then `groups` or `targets` must say which.
        groups: ids of groups, or patterns of them.
        normalized: whether an axis goes that a norm computes statistics over; outputs change.
    """

    name: ClassVar[str] = "prune-axis"

    role: str | tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    normalized: bool = False

    def __post_init__(self) -> None:
        for role in self.selector.roles:
            if role not in ROLES:
                raise RecipeError(f"there is no role {role!r}; {suggest(str(role), ROLES)}")
        if not (self.role or self.groups or self.targets):
            raise RecipeError(
                f"prune-axis needs to know what to cut: role (one of {list(ROLES)}), groups or "
                "targets"
            )
        StructuralPass.__post_init__(self)

    @property
    def selector(self) -> Selector:
        roles = self.role
        if isinstance(roles, str):
            roles = (roles,) if roles else ()
        return Selector(roles, self.groups, normalized=self.normalized)
