"""FoldConstants: compute once what does not depend on inputs or parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor

from graphprune.capture.fold import MAX_GROWTH, fold
from graphprune.errors import RecipeError
from graphprune.ir.graph import erase_dead
from graphprune.ir.program import Program
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.registry import register


@register
@final
@dataclass(frozen=True, slots=True)
class FoldConstants(Pass):
    """Replace computations on buffers and constants by their result, as a buffer.

    buffer -> op -> op -> (dynamic)    becomes    folded buffer -> (dynamic)

    1. Parameters are not folded unless `parameters` is set: they would no longer train.
    2. A result that needs more than `max_growth` bytes beyond the tensors that it makes needless
       stays a computation, of the largest constants that do not; an expanded mask would fill the
       file.
    3. Dynamic sizes, random operators and operators with an effect are never constant.
    4. A lone `zeros` or its like is left alone: it is as cheap as reading a buffer.

    Capture folds what depends on no parameter; this is for more bytes, or for parameters.

    Attributes:
        max_growth: bytes that a result may need beyond the tensors that it makes needless.
        parameters: whether parameters are folded too; they train no more.
    """

    name: ClassVar[str] = "fold-constants"
    preserves: ClassVar[Invariant] = Invariant.INTERFACE | Invariant.NUMERICS | Invariant.NODES
    idempotent: ClassVar[bool] = True

    max_growth: int = MAX_GROWTH
    parameters: bool = False

    def __post_init__(self) -> None:
        if self.max_growth < 0:
            raise RecipeError(f"max_growth is a number of bytes, got {self.max_growth!r}")

    def run(self, program: Program, ctx: Context) -> PassResult:
        graphs = program.fork_graphs()
        sources = self._sources(program)
        folded: dict[str, Tensor] = {}
        skipped: list[dict[str, Any]] = []
        for graph in graphs.values():
            taken = {*program.tensors, *program.aliases, *folded}
            found = fold(graph, sources, taken, self.max_growth)
            folded |= found.tensors
            skipped += [
                {"node": name, "reason": f"grows by {growth} bytes"}
                for name, growth in found.skipped.items()
            ]
            erase_dead(graph)
        report: dict[str, Any] = {"folded": sorted(folded), "skipped": skipped}
        if not folded:
            return PassResult(program, False, report)
        changed = program.with_graphs(graphs, {**program.tensors, **folded})
        unread = sorted(program.read() - changed.read())
        return PassResult(changed.without_tensors(unread), True, {**report, "tensors": unread})

    def _sources(self, program: Program) -> dict[str, Tensor]:
        return {
            name: t
            for name, t in program.tensors.items()
            if self.parameters or name not in program.parameters
        }
