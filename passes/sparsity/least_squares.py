"""LeastSquares: fit the kept weights to the dense layers' outputs, without labels or gradients.

A linear layer has the weight W [out, in] and inputs x [in] in the pruned model, W' and x' in the
dense one. With the residual s = W' x' - W x [out], A = Σ x xᵀ [in, in] and R = Σ s xᵀ [out, in],

    min over D, zero where W was zeroed    Σ |(W + D) x - W' x'|² + λ |D|²
                                         = Σ |s|² - 2 tr(D Rᵀ) + tr(D (A + λ I) Dᵀ)

falls apart into rows: each row d of D solves (A + λ I) d = r on its own support, r that row of R.
Without zeros all rows share one Cholesky factor. With them every row has a system of its own, and
all are solved together by conjugate gradients, projected to the support and preconditioned by the
diagonal (Jacobi). A bias is one more feature, the constant 1, which is not damped. λ is a fraction
of the mean of A's diagonal.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from graphprune.axes import axis_groups
from graphprune.axes.sites import LinearSite, linear_sites
from graphprune.calibration.gram import Gram, Remarks
from graphprune.calibration.stream import Stream
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.ir.graph import bound_arguments, is_op
from graphprune.ir.history import removals
from graphprune.ir.program import Program
from graphprune.ir.quantization import refuse_quantized
from graphprune.passes.solvers.obs import damped
from graphprune.passes.sparsity.records import MatrixFit, skipped_json
from graphprune.passes.sparsity.site_pass import SitePass
from graphprune.passes.training.penalties import site_dims
from graphprune.pipeline.base import Context, PassResult
from graphprune.pipeline.events import JSON
from graphprune.pipeline.registry import register
from graphprune.rewrite.shrink import shrink
from graphprune.training.optimizer import zero_masks
from graphprune.validate import check_number

log = logging.getLogger(__name__)

_PRECISE = 1e-6  # of the first residual of a row: conjugate gradients stop there
_AT_MOST = 100  # or after so many steps, each of which lowers the error


@register
@final
@dataclass(frozen=True, slots=True)
class LeastSquares(SitePass):
    """Refit each pruned linear layer to the outputs of the same layer in the dense model.

    Needs calibration batches, no labels. The dense and the pruned model run side by side, layer
    after layer, and each layer is fitted to the inputs that the refitted ones before it make.

    1. Weights that a pass has zeroed stay zero; a bias is fitted too.
    2. Where output units are gone, those left are fitted to their own outputs in the dense model.
       A layer is left alone where each head lost other dims: which ones is not on record.
    3. A weight that is used at several places is fitted once for all of them, before the others.
    4. A layer whose error on the calibration rows does not get smaller stays as it is.
    5. Experts are left alone: the dense model may route other rows to them.

    Attributes:
        damping: how strongly weights stay what they are: λ, as a fraction of the mean squared
            input.
    """

    name: ClassVar[str] = "least-squares"

    damping: float = 0.01

    def __post_init__(self) -> None:
        SitePass.__post_init__(self)
        check_number("damping", self.damping, "0 or more", low=0)

    @property
    def needs_calibration(self) -> bool:
        return True

    def run(self, program: Program, ctx: Context) -> PassResult:
        refuse_quantized(program, ctx.running)
        batches = ctx.batches()
        if ctx.reference is None:
            raise RecipeError(
                f"pass {ctx.running!r} fits to the dense model, and the context has no reference"
            )
        sites, skipped = self.sites(program, ctx)
        pairs = _pairs(program, ctx.reference, sites, skipped, ctx)
        work = _Work(program, ctx.reference, zero_masks(program), self.damping)
        places: dict[str, list[_Pair]] = {}
        for pair in pairs:
            places.setdefault(pair.site.name, []).append(pair)
        rounds = [[several] for several in places.values() if len(several) > 1]
        alone = [pair for pair in pairs if len(places[pair.site.name]) == 1]
        # Those that read one value are fitted together, on one Gram matrix.
        rounds.append([list(some) for _, some in itertools.groupby(alone, lambda p: p.site.reads)])
        total, done = sum(map(len, rounds)), 0
        for steps in filter(None, rounds):
            streams = [Stream(p, batches) for p in (work.dense, work.program)]
            for step in steps:
                ctx.progress(done, total, "layers")
                work.fit(step, streams[0], streams[1])
                done += 1
        ctx.progress(total, total, "layers")
        return PassResult(work.program, work.program is not program, work.report(skipped))


@final
@dataclass(frozen=True, slots=True)
class _Pair:
    """A place of a weight in both models.

    Attributes:
        site: in the pruned one.
        dense: in the dense one.
        rows: output units of the dense one that are left, in order; None for all.
    """

    site: LinearSite
    dense: LinearSite
    rows: Tensor | None


@final
@dataclass(slots=True)
class _Sums:
    """Sums that least squares needs: Σ residual xᵀ, Σ |residual|², Σ |dense output|²."""

    slope: Tensor
    before: float = 0.0
    energy: float = 0.0


@final
@dataclass(slots=True)
class _Work:
    """The state of the pass; `program` holds the weights fitted so far."""

    program: Program
    dense: Program
    masks: Mapping[str, Tensor]
    damping: float
    matrices: list[MatrixFit] = field(default_factory=list)
    remarks: Remarks = field(default_factory=Remarks)
    rows: int = 0

    def fit(self, pairs: Sequence[_Pair], dense: Stream, pruned: Stream) -> None:
        """Fit the weights that read one value, or one weight at all of its places."""
        start = time.perf_counter()
        # One weight with several biases is fitted without any of them.
        several = len(pairs) > 1 and pairs[0].site.name == pairs[1].site.name
        gram, sums = self._collected(pairs, several, dense, pruned)
        self.rows = max(self.rows, gram.count)
        self.remarks.add_shortage(pairs[0].site.name, gram)
        collecting = time.perf_counter() - start
        for site in dict((p.site.name, p.site) for p in pairs).values():
            start = time.perf_counter()
            record = self._solve(site, gram, sums[site.name], with_bias=not several)
            seconds = time.perf_counter() - start + collecting / len(sums)
            self.matrices.append(replace(record, seconds=seconds))

    def _collected(
        self, pairs: Sequence[_Pair], several: bool, dense: Stream, pruned: Stream
    ) -> tuple[Gram, dict[str, _Sums]]:
        first = pairs[0].site
        gram = Gram.empty(first.matrix(self.program).shape[1])
        sums: dict[str, _Sums] = {}
        for pair in pairs:
            rows, columns = pair.site.matrix(self.program).shape
            own = pair.site.bias is not None and not several
            zeros = torch.zeros(rows, columns + own, dtype=torch.float64)
            sums.setdefault(pair.site.name, _Sums(zeros))
        by_place = {(pair.site.node, pair.site.name): pair for pair in pairs}
        both = zip(
            dense.visit(self.dense, [pair.dense for pair in pairs]),
            pruned.visit(self.program, [pair.site for pair in pairs]),
            strict=True,
        )
        for (_, _, theirs), (_, site, mine) in both:
            pair, held = by_place[site.node, site.name], sums[site.name]
            wanted = _output(pair.dense, self.dense, theirs)
            if pair.rows is not None:
                wanted = wanted[:, pair.rows]
            inputs = mine.to(wanted.dtype)
            residual = wanted - _output(site, self.program, mine)
            if held.slope.shape[1] > inputs.shape[1]:
                ones = inputs.new_ones(len(inputs), 1)
                held.slope += residual.T @ torch.cat([inputs, ones], 1)
            else:
                held.slope += residual.T @ inputs
            held.before += float(residual.double().square().sum())
            held.energy += float(wanted.double().square().sum())
            if several or site is first:
                gram.add(mine)
        return gram, sums

    def _solve(self, site: LinearSite, gram: Gram, sums: _Sums, *, with_bias: bool) -> MatrixFit:
        """Fit one weight, and take it if that is better; what to report of it."""
        if not bool(sums.slope.isfinite().all() & gram.matrix.isfinite().all()):
            raise UnsupportedError(
                f"the weight {site.name!r}, or the squares of its inputs, hold NaN or infinity; "
                "repair the weights or scale the inputs first"
            )
        weight = site.matrix(self.program)
        bias = site.bias_column(self.program) if with_bias else None
        held = self.masks.get(site.tensor)
        mask = None if held is None else site.as_matrix(held)
        seen, normal = gram.matrix, damped(gram.matrix, self.damping)
        if bias is not None:
            seen, normal = gram.with_ones(), _bordered(normal, gram)
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        change, steps = solve_masked(normal, sums.slope, mask)
        columns = weight.shape[1]
        new = (weight + change[:, :columns]).to(weight.dtype)
        parts = [(new - weight).double()]
        moved = None
        if bias is not None:
            assert site.bias is not None
            moved = (bias + change[:, columns]).to(self.program.tensors[site.bias].dtype)
            parts.append((moved.double() - bias)[:, None])
        # The error after it, by the identity above with D as rounded, and without damping.
        real = torch.cat(parts, 1)
        after = sums.before - float((real * (2 * sums.slope - real @ seen)).sum())
        better = after < sums.before
        if better:
            self.program = site.with_matrix(self.program, new, moved)
        energy = max(sums.energy, 1e-300)
        return MatrixFit(
            site.name,
            tuple(weight.shape),
            sums.before / energy,
            max(after if better else sums.before, 0.0) / energy,
            better,
            steps,
        )

    def report(self, skipped: Mapping[str, str]) -> dict[str, JSON]:
        fitted = [matrix for matrix in self.matrices if matrix.fitted]
        words = f"refitted {len(fitted)} of {len(self.matrices)} matrices"
        if fitted:
            before = sum(matrix.error_before for matrix in fitted) / len(fitted)
            after = sum(matrix.error for matrix in fitted) / len(fitted)
            words += f", their output errors {before:.2g} to {after:.2g} on average"
        return {
            "summary": words,
            "sites": [matrix.to_json() for matrix in self.matrices],
            "skipped": skipped_json(skipped),
            "warnings": self.remarks.warn(log),
            "calibration_rows": self.rows,
        }


def solve_masked(gram: Tensor, slope: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
    """Minimize d A dᵀ - 2 d · r for each row d that is zero where its mask is false.

    Conjugate gradients for P A P d = P r, with P the projection to the row's mask: residuals are
    masked, so directions stay in the support. Rows are independent and stop one by one.

    Args:
        gram: A, symmetric and positive (semi)definite, float64 [in, in].
        slope: the rows r, float64 [out, in].
        mask: bool [out, in], or None for all true.

    Returns:
        The rows [out, in], and how many steps of conjugate gradients they took: 0 by Cholesky.
    """
    if mask is None:
        factor, bad = torch.linalg.cholesky_ex(gram)
        if not int(bad):
            return torch.cholesky_solve(slope.T, factor).T, 0
        mask = torch.ones_like(slope, dtype=torch.bool)
    # Names in the literature: left r, towards p, scaled z = r / diag A, size r·z, pushed A p.
    diagonal = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny)
    result = torch.zeros_like(slope)
    left = slope * mask
    goal = _PRECISE * left.norm(dim=1)
    towards = left / diagonal
    size = (left * towards).sum(1)
    for step in range(_AT_MOST):
        going = left.norm(dim=1) > goal
        if not bool(going.any()):
            return result, step
        pushed = (towards @ gram) * mask
        curve = (towards * pushed).sum(1)  # pᵀ A p; not positive only by rounding
        rate = torch.where(going & (curve > 0), size / curve, 0.0)[:, None]
        result += rate * towards
        left -= rate * pushed
        scaled = left / diagonal
        before, size = size, (left * scaled).sum(1)
        # The next direction is conjugate to the former ones.
        towards = scaled + torch.where(before > 0, size / before, 0.0)[:, None] * towards
    return result, _AT_MOST


def _output(site: LinearSite, program: Program, rows: Tensor) -> Tensor:
    """The output of a site on rows [n, in]: [n, out], in float32 at least."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    result = wide @ site.matrix(program).to(wide.dtype).T
    bias = site.bias_column(program)
    return result if bias is None else result + bias.to(result)


def _bordered(normal: Tensor, gram: Gram) -> Tensor:
    """A damped Gram matrix with the constant one as last feature, which is not damped."""
    whole = gram.with_ones()
    whole[:-1, :-1] = normal
    return whole


def _pairs(
    program: Program,
    dense: Program,
    sites: Sequence[LinearSite],
    skipped: dict[str, str],
    ctx: Context,
) -> list[_Pair]:
    """Every place of these sites with the same one in the dense model; others go to `skipped`."""
    wanted = [site.name for site in sites]
    here, there = (_places(p, ctx) for p in (program, dense))
    tables = _tables(program)
    reasons: dict[str, str] = {}
    for name in wanted:
        mine, theirs = here[name], there.get(name, [])
        if mine[0].expert is not None:
            reasons[name] = "an expert: the dense model may route other rows to it"
        elif mine[0].tensor in tables:
            reasons[name] = "it is a table of embeddings too"
        elif len(mine) != len(theirs):
            reasons[name] = f"it is at {len(mine)} places, in the dense model at {len(theirs)}"
        elif any(_lead(a) != _lead(b) for a, b in zip(mine, theirs, strict=True)):
            reasons[name] = "its input has other rows in the dense model"
        elif any(s.window is not None and s.window.apart for s in (*mine, *theirs)):
            reasons[name] = "its patches are too wide: its taps are not fitted together"
        elif mine[0].group is not None and mine[0].group != theirs[0].group:
            reasons[name] = "some of its groups are gone"
    cut = [
        here[name][0]
        for name in wanted
        if name not in reasons
        and here[name][0].matrix(program).shape[0] != there[name][0].matrix(dense).shape[0]
    ]
    rows = _kept_rows(program, dense, cut)
    reasons |= {
        site.name: "which of its output units are left is not on record"
        for site in cut
        if len(rows.get(site.name, ())) != site.matrix(program).shape[0]
    }
    pairs = []
    number = {node: i for i, node in enumerate(dense.forward.graph.nodes)}
    reached = -1
    for site in linear_sites(ctx.get(axis_groups, program)):
        if site.name not in wanted or site.name in reasons:
            continue
        former = there[site.name].pop(0)
        if len(here[site.name]) == 1 and number[former.node] < reached:
            reasons[site.name] = "it comes earlier in the dense model"
            continue
        reached = max(reached, number[former.node])
        pairs.append(_Pair(site, former, rows.get(site.name)))
    skipped |= reasons
    return pairs


def _places(program: Program, ctx: Context) -> dict[str, list[LinearSite]]:
    found: dict[str, list[LinearSite]] = {}
    for site in linear_sites(ctx.get(axis_groups, program)):
        found.setdefault(site.name, []).append(site)
    return found


def _lead(site: LinearSite) -> list[int | None]:
    """The sizes of a site's input but its features; None where they follow the batch."""
    sizes = [int(s) if isinstance(s, int) else None for s in site.operand.meta["val"].shape]
    del sizes[-1 if site.window is None else -1 - len(site.window.kernel)]
    return sizes


def _tables(program: Program) -> set[str]:
    """Tensors that an embedding looks rows up in."""
    graph = program.forward.graph
    return {str(bound_arguments(n)["weight"].target) for n in graph.nodes if is_op(n, "embedding")}


def _kept_rows(program: Program, dense: Program, sites: Sequence[LinearSite]) -> dict[str, Tensor]:
    """Output units of the dense model that are left at these sites, by doing all removals again.

    Without those whose units were put in another order on the way.
    """
    if not sites:
        return {}
    rows = {
        site.name: torch.arange(dense.tensors[site.tensor].shape[site_dims(site)[0]])
        for site in sites
    }
    current = dense
    try:
        for kept, rearranged in removals(program.history[len(dense.history) :]):
            groups = axis_groups(current)
            moved = {(o.tensor, o.dim) for name in rearranged for o in groups[name].occurrences}
            for site in sites:
                place = site.tensor, site_dims(site)[0]
                if place in moved:
                    rows.pop(site.name, None)
                elif site.name in rows:
                    rows[site.name] = rows[site.name][groups.indices(*place, kept)]
            current = shrink(current, kept)
    except UnsupportedError:
        return {}  # a pass in between has renamed what the record speaks of
    return {
        site.name: _of_group(site, rows[site.name], dense) for site in sites if site.name in rows
    }


def _of_group(site: LinearSite, rows: Tensor, dense: Program) -> Tensor:
    """Output units of a weight as those of a site's own group of a convolution."""
    if site.group is None:
        return rows
    index, count = site.group
    size = dense.tensors[site.tensor].shape[site_dims(site)[0]] // count
    return rows[rows // size == index] - index * size
