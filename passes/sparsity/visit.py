"""The work on one region of a model: its sites, what their inputs were, and what comes out."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from graphprune.axes import axis_groups
from graphprune.axes.sites import LinearSite, is_output_head, linear_sites
from graphprune.calibration.gram import Gram, Remarks
from graphprune.calibration.stream import Stream
from graphprune.errors import UnsupportedError
from graphprune.ir.program import Program
from graphprune.passes.solvers.sparsegpt import Inputs, output_error
from graphprune.passes.sparsity.allocation import Share
from graphprune.passes.sparsity.feedforward import find_feedforwards
from graphprune.passes.sparsity.records import MatrixSparsity
from graphprune.pipeline.base import Context

log = logging.getLogger(__name__)


@final
@dataclass(slots=True)
class Visit:
    """The work of a pass: the sites of one region after another, with what their inputs were.

    Attributes:
        program: with the weights as pruned so far.
        shares: site name -> what to remove from it.
        sites: of the region, in execution order.
        grams: site name -> second moments of its inputs; empty without calibration.
        rows: site name -> all rows of its inputs, for the sites a pass asked to keep.
        matrices: what was done to each so far.
        warnings: sentences for the report.
        remarks: sentences about sites, each kept once for all that it fits.
        most_rows: calibration rows that a matrix saw at most, padding left out.
        collecting: seconds that went into running the model.
    """

    program: Program
    shares: Mapping[str, Share]
    sites: Sequence[LinearSite]
    grams: Mapping[str, Gram] = field(default_factory=dict)
    rows: dict[str, list[Tensor]] = field(default_factory=dict)
    matrices: list[MatrixSparsity] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    remarks: Remarks = field(default_factory=Remarks)
    most_rows: int = 0
    collecting: float = 0.0
    _inputs: dict[int, Inputs] = field(default_factory=dict)
    _own: set[str] = field(default_factory=set)

    def enter(
        self,
        sites: Sequence[LinearSite],
        grams: Mapping[str, Gram],
        rows: dict[str, list[Tensor]],
    ) -> None:
        """Go on to the next region; say where rows are fewer than features, once for each Gram."""
        self.sites, self.grams, self.rows = sites, grams, rows
        self._inputs, self._own = {}, set()
        seen: set[int] = set()
        for site in sites:
            gram = grams[site.name]
            if id(gram) not in seen:
                self.remarks.add_shortage(site.name, gram)
                seen.add(id(gram))
        self.most_rows = max(self.most_rows, *(gram.count for gram in grams.values()))

    def matrix(self, site: LinearSite) -> Tensor:
        """A site's weight, float64 [out, in].

        Raises:
            UnsupportedError: it holds NaN or infinity.
        """
        weight = site.matrix(self.program).to("cpu", torch.float64)
        if not bool(weight.isfinite().all()):
            raise UnsupportedError(
                f"the weight {site.name!r} holds NaN or infinity; repair the weights first"
            )
        return weight

    def inputs(self, site: LinearSite, damping: float) -> Inputs:
        """The solver's view of a site's inputs, made once for all sites that read the same.

        Raises:
            UnsupportedError: their squares are not finite.
        """
        gram = self.grams[site.name]
        if id(gram) not in self._inputs:
            if not bool(gram.matrix.isfinite().all()):
                raise UnsupportedError(
                    f"the squares of the inputs of {site.name!r} are too large for float32: scale "
                    "the inputs, or repair the weights before it"
                )
            self._inputs[id(gram)] = made = Inputs.of(gram.matrix, damping)
            if made.damping > damping:
                how = "its eigenvalues were clamped"
                if math.isfinite(made.damping):
                    how = f"damping was raised from {damping:g} to {made.damping:g}"
                self.remarks.add(
                    site.name, f"its inputs do not span its {len(made.gram)} features; {how}"
                )
        return self._inputs[id(gram)]

    def warn(self, sentence: str) -> None:
        """Say something once, in the log and in the report."""
        log.warning("%s", sentence)
        self.warnings.append(sentence)

    def put(
        self,
        site: LinearSite,
        weight: Tensor,
        seconds: float,
        block_errors: Sequence[float] = (),
    ) -> None:
        """Take a site's new weight, and note what it means on the rows that were seen."""
        old, gram = self.matrix(site), self.grams.get(site.name)
        error = error_masked = None
        if gram is not None and gram.count:
            masked = torch.where(weight == 0, 0.0, old)
            error = error_masked = output_error(old, weight, gram.matrix)
            if not torch.equal(masked, weight):
                error_masked = output_error(old, masked, gram.matrix)
        self.matrices.append(
            MatrixSparsity(
                site.name,
                tuple(weight.shape),
                float((weight == 0).double().mean()),
                self.shares[site.name].pattern.text,
                seconds,
                error,
                error_masked,
                tuple(block_errors),
            )
        )
        if site.expert is None:
            self.program = site.with_matrix(self.program, weight)
            return
        if site.tensor not in self._own:  # copied once for all of its experts
            copy = self.program.tensors[site.tensor].clone()
            self.program = self.program.with_tensors({site.tensor: copy})
            self._own.add(site.tensor)
        site.matrix(self.program).copy_(weight)


def whole_regions(
    stream: Stream, program: Program, chosen: Collection[LinearSite], ctx: Context
) -> list[list[LinearSite]]:
    """The chosen sites of each region, in execution order; no feed-forward block is cut in two.

    A narrow block looks like the end of one. Regions are of all sites: what is left out moves no
    cut between a block's weights.
    """
    regions = stream.regions(linear_sites(ctx.get(axis_groups, program)))
    found = ([site for site in r if site in chosen] for r in _joined(regions))
    return [some for some in found if some]


def _joined(regions: Sequence[list[LinearSite]]) -> list[list[LinearSite]]:
    result: list[list[LinearSite]] = []
    for region in regions:
        if result and any(
            block.ups[0] in result[-1] and block.down in region
            for block in find_feedforwards([*result[-1], *region])
        ):
            result[-1] = [*result[-1], *region]
        else:
            result.append(region)
    return result


def collected(
    stream: Stream,
    program: Program,
    region: Sequence[LinearSite],
    wanted: set[str],
    shared: Mapping[str, Gram],
) -> tuple[dict[str, Gram], dict[str, list[Tensor]]]:
    """Moments of every site's inputs, one for all that read the same, and rows where wanted."""
    rows: dict[str, list[Tensor]] = {}

    def observe(site: LinearSite, seen: Tensor) -> None:
        if site.name in wanted:
            rows.setdefault(site.name, []).append(seen.float())

    moments = stream.moments(program, region, observe=observe if wanted else None)
    grams = {site.name: gram for site, gram in zip(region, moments, strict=True)}
    return {name: shared.get(name, gram) for name, gram in grams.items()}, rows


def shared_grams(program: Program, names: Collection[str], ctx: Context) -> dict[str, Gram]:
    """Moments over all places of weights that are used at several; dense, before any pruning.

    Such a weight is pruned once, at its first place, and must suit them all.
    """
    sites = linear_sites(ctx.get(axis_groups, program))
    count = Counter(site.name for site in sites)
    repeated = [
        s for s in sites if count[s.name] > 1 and s.name in names and not is_output_head(s, program)
    ]
    if not repeated:
        return {}
    moments = Stream(program, ctx.batches()).moments(program, repeated)
    grams: dict[str, Gram] = {}
    for site, gram in zip(repeated, moments, strict=True):
        grams[site.name] = grams[site.name] + gram if site.name in grams else gram
    return grams
