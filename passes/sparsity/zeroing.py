"""What the passes that zero weights share: options, sites, shares, streaming, the report."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Protocol, final

import torch
from torch import Tensor, fx

from graphprune.axes import axis_groups
from graphprune.axes.sites import LinearSite, is_output_head, linear_sites
from graphprune.calibration.gram import Gram, Remarks
from graphprune.calibration.stream import Stream
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.ir.program import Program
from graphprune.ir.quantization import refuse_quantised
from graphprune.passes.name_patterns import TensorNames, check_patterns, refuse_unmatched
from graphprune.passes.solvers.sparsegpt import Inputs, relative_error
from graphprune.passes.sparsity.allocation import (
    blocks_of,
    check_allocation,
    global_sparsities,
    outlier_ratio,
    owl_offsets,
    within_bounds,
)
from graphprune.passes.sparsity.feedforward import find_feedforwards
from graphprune.passes.sparsity.sparsity_pattern import Pattern, parse_pattern, removed_mask
from graphprune.pipeline.base import Context, Pass, PassResult
from graphprune.pipeline.events import JSON

log = logging.getLogger(__name__)

_EXTREME = 0.95  # a matrix that a ranking leaves less of is pointed out

Skipped = list[tuple[str, str]]


@final
@dataclass(frozen=True, slots=True)
class Share:
    """What one site is asked for: part to remove, and what goes together."""

    sparsity: float
    pattern: Pattern


@final
@dataclass(slots=True)
class Visit:
    """The sites of one region of the model, with what their inputs were, about to be pruned.

    Attributes:
        program: the weights as they are; a method leaves its result here.
        sites: in execution order.
        shares: site name -> what is asked of it.
        grams: site name -> second moments of its inputs; empty without calibration.
        rows: site name -> all rows of its inputs, for the sites a method asked to keep.
        damping: see the passes.
        reports: site name -> what was done there.
        warnings: sentences for the report.
        remarks: what there is to say of several sites alike.
    """

    program: Program
    sites: Sequence[LinearSite]
    shares: Mapping[str, Share]
    grams: Mapping[str, Gram]
    rows: dict[str, list[Tensor]]
    damping: float
    reports: dict[str, dict[str, JSON]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    remarks: Remarks = field(default_factory=Remarks)
    _inputs: dict[int, Inputs] = field(default_factory=dict)
    _own: set[str] = field(default_factory=set)

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

    def inputs(self, site: LinearSite) -> Inputs:
        """The solver's view of a site's inputs, made once for all sites that read the same."""
        gram = self.grams[site.name]
        if id(gram) not in self._inputs:
            if not bool(gram.matrix.isfinite().all()):
                raise UnsupportedError(
                    f"the squares of the inputs of {site.name!r} are too large for float32: scale "
                    "the inputs, or repair the weights before it"
                )
            self._inputs[id(gram)] = made = Inputs.of(gram.matrix, self.damping)
            if made.damping > self.damping:
                how = "its eigenvalues were clamped"
                if math.isfinite(made.damping):
                    how = f"damping was raised from {self.damping:g} to {made.damping:g}"
                self.remarks.add(
                    site.name, f"its inputs do not span its {len(made.gram)} features; {how}"
                )
        return self._inputs[id(gram)]

    def warn(self, sentence: str) -> None:
        """Say something once, in the log and in the report."""
        log.warning("%s", sentence)
        self.warnings.append(sentence)

    def put(self, site: LinearSite, weight: Tensor, seconds: float, **more: JSON) -> None:
        """Take a site's new weight, and note what it means on the rows that were seen."""
        old, share = self.matrix(site), self.shares[site.name]
        report: dict[str, JSON] = {
            "shape": list(weight.shape),
            "sparsity": float((weight == 0).double().mean()),
            "pattern": share.pattern.text,
        }
        gram = self.grams.get(site.name)
        if gram is not None and gram.count:
            report["error"] = relative_error(old, weight, gram.matrix)
            masked = torch.where(weight == 0, 0.0, old)
            same = torch.equal(masked, weight)
            report["error_masked"] = (
                report["error"] if same else relative_error(old, masked, gram.matrix)
            )
        self.reports[site.name] = {**report, **more, "seconds": seconds}
        if site.expert is None:
            self.program = site.with_matrix(self.program, weight)
            return
        if site.tensor not in self._own:  # copied once for all of its experts
            copy = self.program.tensors[site.tensor].clone()
            self.program = self.program.with_tensors({site.tensor: copy})
            self._own.add(site.tensor)
        site.matrix(self.program).copy_(weight)


@final
@dataclass(slots=True)
class Done:
    """How far a pass is.

    Attributes:
        program: with the weights as they are by now.
        reports: site name -> what was done there.
        warnings: sentences for the report.
        remarks: what there is to say of several sites alike.
        rows: calibration rows that a matrix saw at most, padding left out.
        collecting: seconds that went into running the model.
    """

    program: Program
    reports: dict[str, dict[str, JSON]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    remarks: Remarks = field(default_factory=Remarks)
    rows: int = 0
    collecting: float = 0.0

    def visit(self, method: Method, visit: Visit) -> None:
        """Prune some sites; only the program and the reports are kept."""
        method.prune(visit)
        self.program = visit.program
        self.reports |= visit.reports
        self.warnings += visit.warnings


class Method(Protocol):
    """How a pass prunes the sites of a region."""

    def keep_rows(self, sites: Sequence[LinearSite]) -> set[str]:
        """Names of the sites whose input rows the method needs, not only their moments."""

    def prune(self, visit: Visit) -> None:
        """Prune every site of the visit."""


@final
@dataclass(frozen=True, slots=True)
class SiteBySite:
    """A method that treats every matrix alone.

    Attributes:
        solve: (weight [out, in] float64, inputs' moments or None, the solver's view of them, share)
            -> pruned weight.
    """

    solve: Callable[[Tensor, Gram | None, Callable[[], Inputs], Share], Tensor]

    def keep_rows(self, sites: Sequence[LinearSite]) -> set[str]:
        return set()

    def prune(self, visit: Visit) -> None:
        self.prune_sites(visit, visit.sites)

    def prune_sites(self, visit: Visit, sites: Sequence[LinearSite]) -> None:
        """Prune some sites of a visit, one after another."""
        for site in sites:
            start = time.perf_counter()
            weight, gram, share = visit.matrix(site), None, visit.shares[site.name]
            if visit.grams:
                gram = visit.grams[site.name]
            if gram is not None and not gram.count:
                visit.warn(
                    f"{site.name}: no calibration row reaches it; pruned by the size of its weights"
                )
                new = weight.masked_fill(
                    removed_mask(weight.abs(), share.sparsity, share.pattern, False), 0
                )
            else:
                new = self.solve(weight, gram, partial(visit.inputs, site), share)
            visit.put(site, new, time.perf_counter() - start)


@final
@dataclass(frozen=True, slots=True)
class Zeroing:
    """How much to zero, in what pattern, where; the options that all these passes have."""

    sparsity: float | None
    pattern: str = "single"
    allocation: str = "uniform"
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    indivisible: str = "refuse"
    damping: float = 0.01
    owl_threshold: float = 5.0
    owl_spread: float = 0.08

    @classmethod
    def of(cls, step: Pass) -> Zeroing:
        """The options that a pass has under the same names.

        Raises:
            RecipeError: one of them has no meaning.
        """
        mine = (f.name for f in fields(cls))
        return cls(**{name: getattr(step, name) for name in mine if hasattr(step, name)})

    def __post_init__(self) -> None:
        pattern = parse_pattern(self.pattern)
        check_allocation(self.allocation)
        for option in ("targets", "ignore"):
            check_patterns(option, getattr(self, option))
        if self.sparsity is None and pattern.sparsity is None:
            raise RecipeError(f"pattern {self.pattern!r} needs a sparsity, such as 0.5")
        if self.sparsity is not None:
            _check_number("sparsity", self.sparsity, "the part of the weights to zero, at least 0 "
                          "and below 1", lambda s: 0 <= s < 1)  # fmt: skip
            own = pattern.sparsity
            if own is not None and abs(self.sparsity - own) > 1e-6:
                raise RecipeError(
                    f"pattern {self.pattern!r} keeps {pattern.keep} of {pattern.of}, which is a "
                    f"sparsity of {own:g}, not {self.sparsity:g}: leave sparsity out"
                )
        if self.indivisible not in ("refuse", "skip"):
            raise RecipeError(f"indivisible is 'refuse' or 'skip', got {self.indivisible!r}")
        _check_number("damping", self.damping, "0 or more", lambda d: 0 <= d < math.inf)
        _check_number("owl_threshold", self.owl_threshold, "above 0", lambda m: 0 < m < math.inf)
        _check_number("owl_spread", self.owl_spread, "above 0", lambda m: 0 < m < math.inf)
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
        if pattern.of and self.allocation == "owl" and self.owl_spread < 0.5:
            raise RecipeError(
                f"with pattern {self.pattern!r} owl_spread counts weights of each {pattern.of}: "
                f"{self.owl_spread:g} moves none; give 1 or more"
            )

    def needs_calibration(self, method: bool) -> bool:
        """Whether activations decide: by the method, or by the allocation."""
        return method or self.allocation == "owl"

    def run(self, program: Program, ctx: Context, method: Method, *, data: bool) -> PassResult:
        """Zero weights by a method, region after region.

        Args:
            program: what to prune.
            ctx: with calibration, where activations decide.
            method: how.
            data: whether the method looks at activations, and a global ranking too.

        Raises:
            RecipeError: a pattern of names matches nothing, or calibration is missing.
            UnsupportedError: no weight is left to prune, one does not fit the pattern, or one is
                not finite.
        """
        refuse_quantised(program, ctx.running)
        if self.needs_calibration(data) and ctx.calibration is None:
            raise RecipeError(
                f"pass {ctx.running!r} looks at activations and needs calibration batches: give "
                "compile(..., calibration=batches), or --calibration FILE"
            )
        # Said before the work: it is what most people would want to know first.
        log.warning(
            "%s: zeros make the exported model no faster, ONNX Runtime multiplies by them like by "
            "any other number; for speed remove structure (prune-heads, prune-neurons) or quantize",
            ctx.running,
        )
        began = time.perf_counter()
        sites, skipped = self.sites(program, ctx)
        shares = self._shares(program, sites, ctx, data)
        planned = time.perf_counter()
        done = Done(program, warnings=_extremes(shares, self.allocation))
        if data:
            self._stream(done, sites, shares, method, ctx)
        else:
            done.visit(method, Visit(program, sites, shares, {}, {}, self.damping))
        done.warnings += done.remarks.warn(log)
        report = _report(program, sites, done, skipped)
        if data:
            whole = time.perf_counter() - began
            spent = {"allocation": planned - began, "calibration": done.collecting}
            report["seconds"] = {**spent, "solving": whole - sum(spent.values())}
        tensors = {site.tensor for site in sites}
        if all(torch.equal(done.program.tensors[t], program.tensors[t]) for t in tensors):
            return PassResult(program, False, report)
        return PassResult(noted(done.program, sites), True, report)

    def _stream(
        self,
        done: Done,
        sites: Sequence[LinearSite],
        shares: Mapping[str, Share],
        method: Method,
        ctx: Context,
    ) -> None:
        """Region after region: collect what the pruned ones before it make, prune, go on."""
        stream = Stream(done.program, ctx.calibration or ())
        shared = _shared_grams(done.program, shares, ctx)
        # Of all sites: what is left out moves no cut between a block's weights.
        chosen = set(sites)
        whole = _joined(stream.regions(linear_sites(ctx.get(axis_groups, done.program))))
        regions = [some for r in whole if (some := [site for site in r if site in chosen])]
        for i, region in enumerate(regions):
            ctx.progress(i, len(regions), "regions")
            start = time.perf_counter()
            wanted = method.keep_rows(region)
            grams, rows = _collected(stream, done.program, region, wanted, shared)
            done.collecting += time.perf_counter() - start
            done.rows = max(done.rows, *(gram.count for gram in grams.values()))
            visit = Visit(
                done.program, region, shares, grams, rows, self.damping, remarks=done.remarks
            )
            _remark_if_few(visit)
            done.visit(method, visit)
        ctx.progress(len(regions), len(regions), "regions")

    def sites(self, program: Program, ctx: Context) -> tuple[list[LinearSite], Skipped]:
        """The sites to prune, each tensor once, and what is left out and why."""
        names = TensorNames(program)
        for option in ("targets", "ignore"):
            refuse_unmatched(option, getattr(self, option), names.all())
        pattern = parse_pattern(self.pattern)
        sites: dict[str, LinearSite] = {}
        skipped: Skipped = []
        every = linear_sites(ctx.get(axis_groups, program))
        ways: dict[str, set[bool]] = {}
        for site in every:
            ways.setdefault(site.name, set()).add(site.transposed)
        for site in every:
            if site.name in sites or any(site.name == name for name, _ in skipped):
                continue
            named = names.match(site.tensor, self.targets)
            if self.targets and not named:
                continue
            rows, columns = site.matrix(program).shape
            obstacle = pattern.obstacle(rows, columns)
            if names.match(site.tensor, self.ignore):
                skipped.append((site.name, "ignored on request"))
            elif is_output_head(site, program) and not named:
                skipped.append((site.name, "an output head: left alone unless targets names it"))
            elif len(ways[site.name]) > 1:
                skipped.append((site.name, "it is multiplied both as it is and transposed"))
            elif obstacle and self.indivisible == "skip":
                skipped.append((site.name, f"pattern {self.pattern!r} does not fit: {obstacle}"))
            elif obstacle:
                raise UnsupportedError(
                    f"pattern {self.pattern!r} does not fit {site.name!r}: {obstacle}; name it in "
                    "ignore, give indivisible='skip', or choose another pattern"
                )
            else:
                sites[site.name] = site
        if not sites:
            reasons = "; ".join(f"{name}: {why}" for name, why in skipped[:2])
            raise UnsupportedError(
                "there is no weight to prune: the model multiplies no activation by a weight that "
                f"these options take{f' ({reasons})' if reasons else ''}"
            )
        return list(sites.values()), skipped

    def _shares(
        self, program: Program, sites: Sequence[LinearSite], ctx: Context, data: bool
    ) -> dict[str, Share]:
        pattern = parse_pattern(self.pattern)
        asked = self.sparsity if pattern.sparsity is None else pattern.sparsity
        assert asked is not None
        if self.allocation == "uniform" or asked == 0:
            return {site.name: Share(asked, pattern) for site in sites}
        norms = None
        if self.allocation == "owl" or data:
            norms = _norms(program, sites, ctx)
        if self.allocation == "owl":
            assert norms is not None
            return self._owl(program, sites, norms, asked, pattern)
        scores = {}
        shares = {site.name: Share(asked, pattern) for site in sites}
        for site in sites:
            score = site.matrix(program).abs().float()
            if norms is not None:
                if not bool(norms[site.name].any()):
                    continue  # no row reaches it: nothing to rank it by
                # Layers compare only relative to themselves: their inputs have scales of their own.
                score = score * norms[site.name].float()
                score = score / score.mean().clamp_min(1e-30)
            scores[site.name] = pattern.units(score)
        parts = global_sparsities(scores, asked)
        return shares | {name: Share(part, pattern) for name, part in parts.items()}

    def _owl(
        self,
        program: Program,
        sites: Sequence[LinearSite],
        norms: Mapping[str, Tensor],
        asked: float,
        pattern: Pattern,
    ) -> dict[str, Share]:
        members: dict[str, list[LinearSite]] = {}
        blocks = blocks_of([site.tensor for site in sites])
        for site in sites:
            members.setdefault(blocks[site.tensor], []).append(site)
        ratios, sizes = {}, {}
        for block, inside in members.items():
            scores = [s.matrix(program).abs().float() * norms[s.name].float() for s in inside]
            ratios[block] = outlier_ratio(scores, self.owl_threshold)
            sizes[block] = sum(s.numel() for s in scores)
        spread = self.owl_spread / 2 if pattern.of else self.owl_spread
        shares: dict[str, Share] = {}
        offsets = owl_offsets(ratios, sizes, spread)
        parts = within_bounds({b: asked - offset for b, offset in offsets.items()}, sizes, asked)
        for block, offset in offsets.items():
            if pattern.of:
                keep = min(max(pattern.keep + round(offset), 1), pattern.of)
                kept = Pattern(f"{keep}:{pattern.of}", 1, 1, keep, pattern.of)
                share = Share(1 - keep / pattern.of, kept)
            else:
                share = Share(parts[block], pattern)
            shares |= {site.name: share for site in members[block]}
        return shares


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


def noted(program: Program, sites: Sequence[LinearSite]) -> Program:
    """The program with the names of its zeroed tensors, for passes that train: zeros stay zero."""
    return replace(program, zeroed=program.zeroed.union(site.tensor for site in sites))


def _check_number(name: str, value: object, rule: str, holds: Callable[[float], bool]) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not holds(float(value)):  # type: ignore[arg-type]
        raise RecipeError(f"{name} must be {rule}, got {value!r}")


def _joined(regions: Sequence[list[LinearSite]]) -> list[list[LinearSite]]:
    """Regions that cut no feed-forward block in two: a narrow one looks like the end of a block."""
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


def _collected(
    stream: Stream,
    program: Program,
    region: Sequence[LinearSite],
    wanted: set[str],
    shared: Mapping[str, Gram],
) -> tuple[dict[str, Gram], dict[str, list[Tensor]]]:
    """Moments of every site's inputs, one for all that read the same, and rows where wanted."""
    made: dict[tuple[fx.Node, int | None], Gram] = {}
    grams: dict[str, Gram] = {}
    first: set[str] = set()
    rows: dict[str, list[Tensor]] = {}
    for site in region:
        key = (site.operand, site.expert)
        if key not in made:
            made[key] = Gram.empty(site.matrix(program).shape[1])
            first.add(site.name)
        grams[site.name] = shared.get(site.name, made[key])

    def observe(site: LinearSite, seen: Tensor) -> None:
        if site.name in first:
            made[site.operand, site.expert].add(seen)
        if site.name in wanted:
            rows.setdefault(site.name, []).append(seen.float())

    stream.collect(program, region, observe)
    return grams, rows


def _shared_grams(program: Program, names: Collection[str], ctx: Context) -> dict[str, Gram]:
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
    grams = {s.name: Gram.empty(s.matrix(program).shape[1]) for s in repeated}
    assert ctx.calibration is not None
    Stream(program, ctx.calibration).collect(
        program, repeated, lambda site, rows: grams[site.name].add(rows)
    )
    return grams


def _norms(program: Program, sites: Sequence[LinearSite], ctx: Context) -> dict[str, Tensor]:
    """L2 norm of every input feature of every site of the dense model, float64 [in]."""
    squares = {s.name: torch.zeros(s.matrix(program).shape[1], dtype=torch.float64) for s in sites}

    def observe(site: LinearSite, rows: Tensor) -> None:
        squares[site.name] += rows.float().square().sum(0)

    assert ctx.calibration is not None
    Stream(program, ctx.calibration).collect(
        program,
        sites,
        observe,
        lambda done, total: ctx.progress(done, total, "batches for the allocation"),
    )
    return {name: total.sqrt() for name, total in squares.items()}


def _remark_if_few(visit: Visit) -> None:
    """Say where there are fewer calibration rows than features, once for all that read the same."""
    seen: set[int] = set()
    for site in visit.sites:
        gram = visit.grams[site.name]
        if id(gram) not in seen:
            visit.remarks.add(site.name, gram.shortage())
            seen.add(id(gram))


def _report(
    before: Program, sites: Sequence[LinearSite], done: Done, skipped: Skipped
) -> dict[str, JSON]:
    reports = done.reports
    total = sum(math.prod(r["shape"]) for r in reports.values())
    zeros = sum(r["sparsity"] * math.prod(r["shape"]) for r in reports.values())
    part = zeros / max(total, 1)
    return {
        "summary": f"{part:.1%} of {total:,} weights in {len(sites)} matrices",
        "sparsity": part,
        "sites": [{"name": name, **report} for name, report in reports.items()],
        "skipped": [{"name": name, "reason": why} for name, why in skipped],
        "warnings": done.warnings,
        "calibration_rows": done.rows,
        "parameters_before": before.num_parameters(),
        "parameters_after": done.program.num_parameters(),
    }
