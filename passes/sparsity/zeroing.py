"""ZeroingPass: the owner of what the passes that zero weights share, options, streaming, report."""

from __future__ import annotations

import abc
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from graphprune.axes.sites import LinearSite
from graphprune.calibration.stream import Stream
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.ir.program import Program
from graphprune.ir.quantization import refuse_quantized
from graphprune.passes.sparsity.allocation import (
    ALLOCATIONS,
    Share,
    check_allocation,
    global_shares,
    input_norms,
    owl_shares,
)
from graphprune.passes.sparsity.records import MatrixSparsity, ZeroingReport
from graphprune.passes.sparsity.site_pass import SitePass
from graphprune.passes.sparsity.sparsity_pattern import parse_pattern
from graphprune.passes.sparsity.visit import Visit, collected, shared_grams, whole_regions
from graphprune.pipeline.base import Context, PassResult
from graphprune.validate import check_number

log = logging.getLogger(__name__)

_EXTREME = 0.95  # a matrix that a ranking leaves less of is pointed out


@dataclass(frozen=True, kw_only=True)
class PatternPass(SitePass):
    """A pass that zeroes weights in a pattern.

    Attributes:
        pattern: what goes together: "unstructured" (each weight alone), "n:m" (keeps n of every m
            consecutive inputs of a row), "OUTxIN" blocks such as "32x4", whole "rows" or "columns".
            Units are scored by the L2 norm of their weights' scores. Blocks at the edges of a
            matrix may be smaller; they count as whole ones.
        allocation: "uniform" (the sparsity in every matrix), "owl" (more where outliers are few;
            needs calibration) or "global" (one ranking of all matrices: by |w|, or with activations
            by |w| · ‖x‖ relative to the matrix's mean).
        indivisible: what to do with a matrix that the pattern does not fit: "refuse" or "skip".
    """

    __slots__ = ()

    allocations: ClassVar[tuple[str, ...]] = ALLOCATIONS

    allocation: str = "uniform"
    indivisible: str = "refuse"

    @property
    @abc.abstractmethod
    def pattern(self) -> str:
        """A field of the subclasses, some of which take it by position."""

    def __post_init__(self) -> None:
        SitePass.__post_init__(self)
        pattern = parse_pattern(self.pattern)
        check_allocation(self.allocation, self.allocations)
        if self.indivisible not in ("refuse", "skip"):
            raise RecipeError(f"indivisible is 'refuse' or 'skip', got {self.indivisible!r}")
        if pattern.of and self.allocation == "global":
            raise RecipeError(
                f"pattern {self.pattern!r} fixes every layer's sparsity: allocation 'global' has "
                "nothing to choose; take 'uniform', or 'owl' with owl_spread 1 or more"
            )
        if pattern.text in ("rows", "columns") and self.allocation == "global":
            raise RecipeError(
                f"{self.pattern} of unlike length do not compare: allocation 'global' ranks single "
                "weights and blocks; take 'uniform' or 'owl'"
            )

    def misfit(self, name: str, rows: int, columns: int) -> str:
        obstacle = parse_pattern(self.pattern).obstacle(rows, columns)
        if obstacle and self.indivisible == "refuse":
            raise UnsupportedError(
                f"pattern {self.pattern!r} does not fit {name!r}: {obstacle}; name it in "
                "ignore, give indivisible='skip', or choose another pattern"
            )
        return obstacle and f"pattern {self.pattern!r} does not fit: {obstacle}"


@dataclass(frozen=True)
class ZeroingPass(PatternPass):
    """A pass that zeroes weights once, region after region, each on what the ones before it make.

    A subclass says how one matrix is pruned (`prune_matrix`), or several together (`prune`).

    Attributes:
        sparsity: fraction of the weights to zero, in [0, 1); not with an n:m pattern.
        owl_threshold: OWL: how many times the mean score makes an outlier.
        owl_spread: OWL: the largest deviation of a block's density from the lowest is twice this;
            with n:m, this many weights of each m.
    """

    __slots__ = ()

    reads_activations: ClassVar[bool] = True
    """Whether `prune` looks at activations, and so does a global ranking."""

    sparsity: float | None = None
    pattern: str = "unstructured"
    owl_threshold: float = field(default=5.0, kw_only=True)
    owl_spread: float = field(default=0.08, kw_only=True)

    def __post_init__(self) -> None:
        PatternPass.__post_init__(self)
        pattern = parse_pattern(self.pattern)
        if self.sparsity is None and pattern.sparsity is None:
            raise RecipeError(f"pattern {self.pattern!r} needs a sparsity, such as 0.5")
        if self.sparsity is not None:
            check_number("sparsity", self.sparsity, "the fraction of the weights to zero, at least "
                         "0 and below 1", low=0, high=1, open_high=True)  # fmt: skip
            own = pattern.sparsity
            if own is not None and abs(self.sparsity - own) > 1e-6:
                raise RecipeError(
                    f"pattern {self.pattern!r} keeps {pattern.keep} of {pattern.of}, which is a "
                    f"sparsity of {own:g}, not {self.sparsity:g}: leave sparsity out"
                )
        check_number("owl_threshold", self.owl_threshold, "above 0", low=0, open_low=True)
        check_number("owl_spread", self.owl_spread, "above 0", low=0, open_low=True)
        if pattern.of and self.allocation == "owl" and self.owl_spread < 0.5:
            raise RecipeError(
                f"with pattern {self.pattern!r} owl_spread counts weights of each {pattern.of}: "
                f"{self.owl_spread:g} moves none; give 1 or more"
            )

    @property
    def needs_calibration(self) -> bool:
        return self.reads_activations or self.allocation == "owl"

    @abc.abstractmethod
    def prune_matrix(self, visit: Visit, site: LinearSite) -> Tensor:
        """A site's weight with zeros, float64 [out, in], as its share asks for."""

    def prune(self, visit: Visit) -> None:
        """Prune every site of a region."""
        self.prune_sites(visit, visit.sites)

    def keep_rows(self, sites: Sequence[LinearSite]) -> set[str]:
        """Names of the sites whose input rows `prune` needs, not only their moments."""
        return set()

    def remarks(self, matrices: Sequence[MatrixSparsity]) -> list[str]:
        """Sentences about the whole, for the log and the report."""
        return []

    def prune_sites(self, visit: Visit, sites: Iterable[LinearSite]) -> None:
        """Prune some sites of a region, one after another."""
        for site in sites:
            start = time.perf_counter()
            gram = visit.grams.get(site.name)
            if gram is not None and not gram.count:
                visit.warn(
                    f"{site.name}: no calibration row reaches it; pruned by the size of its weights"
                )
                weight = visit.matrix(site)
                new = visit.shares[site.name].zeroed(weight, weight.abs())
            else:
                new = self.prune_matrix(visit, site)
            visit.put(site, new, time.perf_counter() - start)

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Zero weights, region after region.

        Raises:
            RecipeError: a pattern of names matches nothing, or calibration is missing.
            UnsupportedError: no weight is left to prune, one does not fit the pattern, or one is
                not finite.
        """
        refuse_quantized(program, ctx.running)
        if self.needs_calibration:
            ctx.batches()
        # Said before the work: it is what most people would want to know first.
        log.warning(
            "%s: zeros make the exported model no faster, ONNX Runtime multiplies by them like by "
            "any other number; blocks of 32x4 or 16x4 are skipped with Quantize('int8-dynamic') "
            "and export(target='onnxruntime+kernels'), and removed structure (prune-heads, "
            "prune-neurons) is faster everywhere",
            ctx.running,
        )
        began = time.perf_counter()
        sites, skipped = self.sites(program, ctx)
        shares = self._shares(program, sites, ctx)
        planned = time.perf_counter()
        extremes = _extremes(shares, self.allocation)
        if self.reads_activations:
            visit = self.streamed(program, sites, shares, ctx)
        else:
            visit = Visit(program, shares, sites)
            self.prune(visit)
        visit.warnings[:0] = extremes
        visit.warnings += visit.remarks.warn(log)
        for sentence in self.remarks(visit.matrices):
            visit.warn(sentence)
        seconds = {}
        if self.reads_activations:
            whole = time.perf_counter() - began
            seconds = {"allocation": planned - began, "calibration": visit.collecting}
            seconds["solving"] = whole - sum(seconds.values())
        report = ZeroingReport(
            visit.matrices,
            skipped,
            visit.warnings,
            visit.most_rows,
            program.num_parameters(),
            visit.program.num_parameters(),
            seconds,
        ).to_json()
        tensors = {site.tensor for site in sites}
        if all(torch.equal(visit.program.tensors[t], program.tensors[t]) for t in tensors):
            return PassResult(program, False, report)
        return PassResult(with_zeroed(visit.program, sites), True, report)

    def streamed(
        self,
        program: Program,
        sites: Sequence[LinearSite],
        shares: Mapping[str, Share],
        ctx: Context,
    ) -> Visit:
        """Region after region: collect what the pruned ones before it make, prune, go on.

        Args:
            program: with the weights to prune.
            sites: to prune.
            shares: site name -> what to remove from it.
            ctx: of the pass that runs.
        """
        visit = Visit(program, shares, sites)
        stream = Stream(visit.program, ctx.batches())
        shared = shared_grams(visit.program, visit.shares, ctx)
        regions = whole_regions(stream, visit.program, set(visit.sites), ctx)
        for i, region in enumerate(regions):
            ctx.progress(i, len(regions), "regions")
            start = time.perf_counter()
            kept = self.keep_rows(region)
            grams, rows = collected(stream, visit.program, region, kept, shared)
            visit.collecting += time.perf_counter() - start
            visit.enter(region, grams, rows)
            self.prune(visit)
        ctx.progress(len(regions), len(regions), "regions")
        return visit

    def _shares(
        self, program: Program, sites: Sequence[LinearSite], ctx: Context
    ) -> dict[str, Share]:
        pattern = parse_pattern(self.pattern)
        sparsity = self.sparsity if pattern.sparsity is None else pattern.sparsity
        assert sparsity is not None
        asked = Share(sparsity, pattern)
        if self.allocation == "uniform" or sparsity == 0:
            return {site.name: asked for site in sites}
        norms = input_norms(program, sites, ctx) if self.needs_calibration else None
        if self.allocation == "global":
            return global_shares(program, sites, asked, norms)
        assert norms is not None
        return owl_shares(
            program, sites, asked, norms, threshold=self.owl_threshold, spread=self.owl_spread
        )


def _extremes(shares: Mapping[str, Share], allocation: str) -> list[str]:
    """Say which matrices a ranking leaves next to nothing of."""
    emptied = [name for name, share in shares.items() if share.sparsity > _EXTREME]
    if allocation != "global" or not emptied:
        return []
    sentence = (
        f"the global ranking takes more than {_EXTREME:.0%} of {', '.join(map(repr, emptied[:3]))}"
        f"{f' and {len(emptied) - 3} more' if len(emptied) > 3 else ''}: name them in ignore, or "
        "take allocation 'uniform'"
    )
    log.warning("%s", sentence)
    return [sentence]


def with_zeroed(program: Program, sites: Sequence[LinearSite]) -> Program:
    """The program with the names of its zeroed tensors, for passes that train: zeros stay zero."""
    return replace(program, zeroed=program.zeroed.union(site.tensor for site in sites))
