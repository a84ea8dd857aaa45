"""PruneHeads: remove whole attention heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from graphprune.passes.structural.base import StructuralPass
from graphprune.passes.structural.selection import Selector
from graphprune.pipeline.registry import register


@register
@final
@dataclass(frozen=True, slots=True)
class PruneHeads(StructuralPass):
    """Remove attention heads, with everything that only they read or write.

    1. Plain attention: a head's query, key and value rows and its columns of the output projection.
    2. Grouped-query attention: a whole group, one key/value head and all query heads that share it.
       With `queries_per_group`, query heads inside every group instead; keys and values stay.
    3. A group that spans layers (a position bias shared by a stack) is cut as one.

    Attributes:
        queries_per_group: cut query heads inside every key/value group, not whole groups.
    """

    name: ClassVar[str] = "prune-heads"

    queries_per_group: bool = False

    @property
    def selector(self) -> Selector:
        return Selector(("queries_per_group",) if self.queries_per_group else ("head", "kv_group"))
