"""SparseLLM: prune a feed-forward block's weights together, so that the block's output stays."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from graphprune.axes.sites import LinearSite
from graphprune.errors import RecipeError
from graphprune.ir.program import Program
from graphprune.passes.name_patterns import check_names
from graphprune.passes.solvers.alternation import Alternation, Weights
from graphprune.passes.solvers.sparsegpt import Inputs, sparsegpt
from graphprune.passes.sparsity.feedforward import FeedForward, find_feedforwards
from graphprune.passes.sparsity.sparsegpt import solve
from graphprune.passes.sparsity.zeroing import SiteBySite, Visit, Zeroing
from graphprune.pipeline.base import Context, Invariant, Pass, PassResult
from graphprune.pipeline.registry import register

log = logging.getLogger(__name__)


@register
@final
@dataclass(frozen=True, slots=True)
class SparseLLM(Pass):
    """Prune feed-forward blocks as a whole, everything else by SparseGPT.

    SparseLLM (arXiv 2402.17946). SparseGPT keeps each matrix's own output; here the weights before
    and after the activation are pruned in turns, with the hidden values as variables between them,
    so that the output of the block stays. Blocks are found in the graph: one or more weights that
    read the same input, any elementwise function (gated or not), and the weight that reads its
    result. Each block keeps the round with the smallest true error, so that on its calibration
    rows it is never worse than SparseGPT.

    Attributes:
        sparsity: part of the weights to zero, in [0, 1); not with an n:m pattern.
        pattern: what goes together: "single" weights, "n:m" (keeps n of every m consecutive inputs
            of a row), "OUTxIN" blocks such as "32x4", whole "rows" or "columns".
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
        rounds: how often the weights are pruned; 1 is SparseGPT.
        alpha: weight of the fit of the products before the activation. Only the ratios of the three
            matter. The paper takes them equal; a smaller alpha leaves the hidden values freer, and
            gave smaller block errors, on unseen text too.
        beta: weight of the fit of the block's output.
        gamma: weight of the agreement of hidden values and products through the activation.
    """

    name: ClassVar[str] = "sparsellm"
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
    rounds: int = 4
    alpha: float = 0.1
    beta: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise RecipeError(f"rounds must be a whole number from 1, got {self.rounds!r}")
        for option in ("alpha", "beta", "gamma"):
            value = getattr(self, option)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise RecipeError(f"{option} must be a number above 0, got {value!r}")
        Zeroing.of(self)

    @property
    def needs_calibration(self) -> bool:
        return True

    def check(self, program: Program) -> None:
        check_names(self, program)

    def run(self, program: Program, ctx: Context) -> PassResult:
        method = _Method(self.rounds, Weights(self.alpha, self.beta, self.gamma))
        result = Zeroing.of(self).run(program, ctx, method, data=True)
        if self.rounds == 1 or any("round" in site for site in result.report["sites"]):
            return result
        sentence = (
            "no feed-forward block was found among the chosen weights (experts, weights used "
            "several times and blocks chosen in part are none): everything was pruned as by "
            "SparseGPT"
        )
        log.warning("%s", sentence)
        warnings = [*result.report["warnings"], sentence]
        return replace(result, report={**result.report, "warnings": warnings})


@final
@dataclass(frozen=True, slots=True)
class _Method:
    rounds: int
    weights: Weights

    def keep_rows(self, sites: Sequence[LinearSite]) -> set[str]:
        blocks = find_feedforwards(sites) if self.rounds > 1 else []
        return {name for b in blocks for name in (b.ups[0].name, b.down.name)}

    def prune(self, visit: Visit) -> None:
        blocks = []
        for block in find_feedforwards(visit.sites) if self.rounds > 1 else []:
            names = (block.ups[0].name, block.down.name)
            # Not where a weight is used at several places: its rows are of one of them.
            if all(len(visit.rows.get(n, ())) and visit.grams[n].count == _count(visit, n)
                   for n in names):  # fmt: skip
                blocks.append(block)
        inside = {site.name for b in blocks for site in (*b.ups, b.down)}
        alone = [site for site in visit.sites if site.name not in inside]
        SiteBySite(solve).prune_sites(visit, alone)
        for block in blocks:
            self._prune_block(visit, block)

    def _prune_block(self, visit: Visit, block: FeedForward) -> None:
        start = time.perf_counter()
        x = torch.cat(visit.rows.pop(block.ups[0].name))
        p = torch.cat(visit.rows.pop(block.down.name))
        state = Alternation.start(block, visit.program, x, p)
        reading = {up.name: visit.inputs(up) for up in block.ups}
        energy = max(state.energy(), 1e-300)
        errors: list[float] = []
        best: dict[str, Tensor] = {}
        for t in range(self.rounds):
            down = visit.inputs(block.down) if t == 0 else Inputs.of(state.gram(), visit.damping)
            matrices = {
                up.name: visit.matrix(up) if t == 0 else state.fit_up(up, reading[up.name])
                for up in block.ups
            }
            matrices[block.down.name] = visit.matrix(block.down) if t == 0 else state.fit_down(down)
            program = visit.program
            pruned = {}
            for site in (*block.ups, block.down):
                share = visit.shares[site.name]
                inputs = down if site is block.down else reading[site.name]
                pruned[site.name] = sparsegpt(
                    matrices[site.name], inputs, share.sparsity, share.pattern
                )
                program = site.with_matrix(program, pruned[site.name])
            last = t == self.rounds - 1
            error = state.error(program) if last else state.update(program, self.weights)
            errors.append(error / energy)
            if errors.index(min(errors)) == t:  # of equals the first
                best = pruned
        seconds = (time.perf_counter() - start) / (len(block.ups) + 1)
        note = {"block_errors": errors, "round": errors.index(min(errors))}
        for site in (*block.ups, block.down):
            visit.put(site, best[site.name], seconds, **note)


def _count(visit: Visit, name: str) -> int:
    return sum(map(len, visit.rows[name]))
