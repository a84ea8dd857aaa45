"""SitePass: the owner of `targets` and `ignore`, for passes that change linear weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphprune.axes import axis_groups
from graphprune.axes.sites import LinearSite, is_output_head, linear_sites
from graphprune.errors import UnsupportedError
from graphprune.ir.program import Program
from graphprune.passes.name_patterns import (
    TensorNames,
    check_names,
    check_patterns,
    refuse_unmatched,
)
from graphprune.pipeline.base import Context, Invariant, Pass


@dataclass(frozen=True, kw_only=True)
class SitePass(Pass):
    """A pass over the weights that a model multiplies activations by, convolutions included.

    Subclasses that `slots=True` recreates call `SitePass.__post_init__(self)`: super() would
    look for the class before that.

    Attributes:
        targets: name patterns; only these weights. Globs for a name or a module, or "re:" and a
            regular expression.
        ignore: name patterns to leave alone; output heads are left alone unless targets names them.
    """

    __slots__ = ()

    preserves: ClassVar[Invariant] = Invariant.INTERFACE | Invariant.SHAPES
    needs_float: ClassVar[bool] = True

    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option in ("targets", "ignore"):
            check_patterns(option, getattr(self, option))

    def check(self, program: Program) -> None:
        check_names(self, program)

    def misfit(self, name: str, rows: int, columns: int) -> str:
        """Say why a matrix of this shape is skipped; empty where it is taken."""
        return ""

    def sites(self, program: Program, ctx: Context) -> tuple[list[LinearSite], dict[str, str]]:
        """Find the sites to change, each tensor once; and name -> why others are left alone.

        Raises:
            RecipeError: a pattern of names matches nothing.
            UnsupportedError: no weight is left, or one does not fit the options.
        """
        names = TensorNames(program)
        for option in ("targets", "ignore"):
            refuse_unmatched(option, getattr(self, option), names.all())
        every = linear_sites(ctx.get(axis_groups, program))
        ways: dict[str, set[bool]] = {}
        for site in every:
            ways.setdefault(site.name, set()).add(site.transposed)
        sites: dict[str, LinearSite] = {}
        skipped: dict[str, str] = {}
        for site in every:
            if site.name in sites or site.name in skipped:
                continue
            named = names.match(site.tensor, self.targets)
            if self.targets and not named:
                continue
            if names.match(site.tensor, self.ignore):
                skipped[site.name] = "ignored on request"
            elif is_output_head(site, program) and not named:
                skipped[site.name] = "an output head: left alone unless targets names it"
            elif len(ways[site.name]) > 1:
                skipped[site.name] = "it is multiplied both as it is and transposed"
            elif reason := self.misfit(site.name, *site.matrix(program).shape):
                skipped[site.name] = reason
            else:
                sites[site.name] = site
        if not sites:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:2])
            raise UnsupportedError(
                "there is no weight to prune: the model multiplies no activation by a weight that "
                f"these options take{f' ({reasons})' if reasons else ''}"
            )
        return list(sites.values()), skipped
