"""SparseLLM: prune a feed-forward block's weights together, so that the block's output stays."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from graphprune.axes.sites import LinearSite
from graphprune.passes.solvers.alternation import Alternation, Weights
from graphprune.passes.solvers.sparsegpt import Inputs, sparsegpt
from graphprune.passes.sparsity.feedforward import FeedForward, find_feedforwards
from graphprune.passes.sparsity.records import MatrixSparsity
from graphprune.passes.sparsity.sparsegpt import CompensatedPass
from graphprune.passes.sparsity.visit import Visit
from graphprune.pipeline.registry import register
from graphprune.validate import check_number, check_whole


@register
@final
@dataclass(frozen=True, slots=True)
class SparseLLM(CompensatedPass):
    """Prune feed-forward blocks as a whole, everything else by SparseGPT.

    SparseLLM (arXiv 2402.17946). SparseGPT keeps each matrix's own output; here the weights before
    and after the activation are pruned alternately, with the hidden values between them as
    variables, so that the output of the block stays. Blocks are found in the graph: one or more
    weights that read the same input, any elementwise function (gated or not), and the weight that
    reads its result. Each block keeps the round with the smallest true error, so that on its
    calibration rows it is never worse than SparseGPT.

    Attributes:
        rounds: how often the weights are pruned; 1 is SparseGPT.
        alpha: weight of the fit of the products before the activation. Only the ratios of the three
            matter. The paper takes them equal; a smaller alpha leaves the hidden values freer, and
            gave smaller block errors, on unseen text too.
        beta: weight of the fit of the block's output.
        gamma: weight of the agreement of hidden values and products through the activation.
    """

    name: ClassVar[str] = "sparsellm"

    rounds: int = 4
    alpha: float = 0.1
    beta: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_whole("rounds", self.rounds, "a whole number from 1")
        for option in ("alpha", "beta", "gamma"):
            value = getattr(self, option)
            check_number(option, value, "a number above 0", low=0, open_low=True)
        CompensatedPass.__post_init__(self)

    def remarks(self, matrices: Sequence[MatrixSparsity]) -> list[str]:
        if self.rounds == 1 or any(matrix.block_errors for matrix in matrices):
            return []
        return [
            "no feed-forward block was found among the chosen weights (experts, weights used "
            "several times and blocks chosen in part are none): everything was pruned as by "
            "SparseGPT"
        ]

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
        self.prune_sites(visit, alone)
        for block in blocks:
            self._prune_block(visit, block)

    def _prune_block(self, visit: Visit, block: FeedForward) -> None:
        start = time.perf_counter()
        x = torch.cat(visit.rows.pop(block.ups[0].name))
        p = torch.cat(visit.rows.pop(block.down.name))
        state = Alternation.start(block, visit.program, x, p)
        weights = Weights(self.alpha, self.beta, self.gamma)
        reading = {up.name: visit.inputs(up, self.damping) for up in block.ups}
        energy = max(state.energy(), 1e-300)
        errors: list[float] = []
        best: dict[str, Tensor] = {}
        for t in range(self.rounds):
            if t == 0:
                down = visit.inputs(block.down, self.damping)
                matrices = {site.name: visit.matrix(site) for site in (*block.ups, block.down)}
            else:
                down = Inputs.of(state.gram(), self.damping)
                matrices = {up.name: state.fit_up(up, reading[up.name]) for up in block.ups}
                matrices[block.down.name] = state.fit_down(down)
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
            error = state.error(program) if last else state.update(program, weights)
            errors.append(error / energy)
            if errors.index(min(errors)) == t:  # of equals the first
                best = pruned
        seconds = (time.perf_counter() - start) / (len(block.ups) + 1)
        for site in (*block.ups, block.down):
            visit.put(site, best[site.name], seconds, errors)


def _count(visit: Visit, name: str) -> int:
    return sum(map(len, visit.rows[name]))
