"""GradualMagnitude: zero the smallest weights, a few more at a time, while training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from graphprune.axes.sites import LinearSite
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.ir.program import Program
from graphprune.passes.sparsity.allocation import global_sparsities
from graphprune.passes.sparsity.sparsity_pattern import (
    lowest,
    parse_pattern,
    removed_count,
    removed_mask,
)
from graphprune.passes.sparsity.zeroing import PatternPass, with_zeroed
from graphprune.passes.training.schedule import scheduled
from graphprune.passes.training.training_pass import GradualPass, trained_report
from graphprune.pipeline.base import Context, PassResult
from graphprune.pipeline.registry import register
from graphprune.training.loop import Hooks, fit
from graphprune.validate import check_number, check_whole


@register
@final
@dataclass(frozen=True, slots=True)
class GradualMagnitude(PatternPass, GradualPass):
    """Train, and zero the weights of smallest absolute value on the way (arXiv 1710.01878).

    1. The sparsity follows a schedule from `initial` to `final`, which it reaches exactly; the
       steps after `end` are for recovery.
    2. What is zero once stays zero: masks only grow. Zeros of earlier passes count among them.
    3. Blocks go by their L2 norms, whole: the norm's square is what a block adds to the outputs
       where inputs are uncorrelated and equally large.
    4. An n:m pattern grows too: of every m the weights that it would take are candidates, and
       the smallest of all candidates go first.

    Zeros alone make nothing faster in ONNX Runtime: remove structure, or quantize, for speed.

    Attributes:
        final: fraction of the weights that is zero in the end, in [0, 1); not with an n:m pattern.
        initial: fraction that is zero from the first step on, at most `final`.
        every: steps from one choice of weights to the next.
        allocation: "uniform" (the sparsity in every matrix) or "global" (one ranking of all).
    """

    name: ClassVar[str] = "gradual-magnitude"
    allocations: ClassVar[tuple[str, ...]] = ("uniform", "global")

    final: float | None = None
    schedule: str = "cubic"
    initial: float = 0.0
    every: int = 10
    pattern: str = "unstructured"
    _: KW_ONLY
    epochs: int = 3

    def __post_init__(self) -> None:
        GradualPass.__post_init__(self)
        PatternPass.__post_init__(self)
        pattern = parse_pattern(self.pattern)
        if pattern.sparsity is not None and self.final not in (None, pattern.sparsity):
            raise RecipeError(
                f"pattern {self.pattern!r} keeps {pattern.keep} of {pattern.of}, which is a "
                f"sparsity of {pattern.sparsity:g}, not {self.final!r}: leave final out"
            )
        if pattern.sparsity is None:
            if self.final is None:
                raise RecipeError(
                    f"pattern {self.pattern!r} needs a final sparsity, such as final=0.8"
                )
            check_number("final", self.final, "the final fraction of zeros among the weights, at "
                         "least 0 and below 1", low=0, high=1, open_high=True)  # fmt: skip
        check_number("initial", self.initial, "a fraction of the weights, 0 to final",
                     low=0, high=self._last())  # fmt: skip
        check_whole("every", self.every)

    def run(self, program: Program, ctx: Context) -> PassResult:
        sites, skipped = self.sites(program, ctx)
        for site in sites:
            if site.tensor not in program.parameters:
                skipped[site.name] = "it is no parameter of the model, and does not train"
        sites = [site for site in sites if site.tensor in program.parameters]
        if not sites:
            raise UnsupportedError(
                f"pass {ctx.running!r} zeroes weights while they train, and none of those it may "
                "take is a parameter of the model; magnitude zeroes them without training"
            )
        masking = _Growing(self, program, sites, self._last())
        fitted = fit(
            program,
            ctx.training,
            ctx,
            self.plan(),
            Hooks(masking=masking, after_epoch=masking.after_epoch),
            distillation=self.distillation(),
            settings={
                "final": self._last(),
                "pruning": [self.schedule, self.initial, self.begin, self.end, self.every],
                "pattern": [self.pattern, self.allocation],
                "sites": [site.name for site in sites],
            },
        )
        result = with_zeroed(fitted.program, sites)
        trained = trained_report(fitted)
        part = _sparsity(result, sites)
        epochs = [
            {**record, "sparsity": sparsity}
            for record, sparsity in zip(trained["epochs"], masking.reached, strict=True)
        ]
        report = {
            **trained,
            "summary": f"{part:.1%} of the weights in {len(sites)} matrices, {trained['summary']}",
            "epochs": epochs,
            "sparsity": part,
            # Not under "sites": a page of matrices wants more of each than there is to say here.
            "matrices": [
                {
                    "name": site.name,
                    "shape": list(site.matrix(result).shape),
                    "sparsity": _sparsity(result, [site]),
                }
                for site in sites
            ],
            "skipped": {**trained.get("skipped", {}), **skipped},
        }
        return PassResult(result, True, report)

    def _last(self) -> float:
        """The sparsity in the end: the one asked for, or the pattern's own."""
        own = parse_pattern(self.pattern).sparsity
        last = self.final if own is None else own
        assert last is not None
        return last


@final
@dataclass(slots=True)
class _Growing:
    """Chooses ever more weights to zero. Zeros are the smallest weights: they go again first.

    Attributes:
        options: the pass.
        program: whose tensors the sites name.
        sites: what to prune, each tensor once.
        last: the sparsity in the end.
        reached: the sparsity after each epoch.
    """

    options: GradualMagnitude
    program: Program
    sites: Sequence[LinearSite]
    last: float
    reached: list[float] = field(default_factory=list)
    scored: Sequence[str] | None = None

    def choose(
        self, parameters: Mapping[str, nn.Parameter], step: int, total: int
    ) -> Mapping[str, Tensor] | None:
        """Where weights may live after step `step`; None where the choice is not due."""
        own = self.options
        due = step % own.every == 0 or self.settled(step + 1, total)
        if (self.settled(step, total) and step) or not due:
            return None
        done = (step + 1) / total
        sparsity = scheduled(done, own.begin, own.end, own.initial, self.last, own.schedule)
        return self._masks(parameters, sparsity) if sparsity else None

    def settled(self, step: int, total: int) -> bool:
        return step / total >= self.options.end

    def state(self) -> Mapping[str, Tensor]:
        return {"reached": torch.tensor(self.reached, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.reached = state["reached"].tolist()

    def after_epoch(self, program: Program, epoch: int) -> tuple[Program, None]:
        """Write down how sparse it is now."""
        self.reached.append(_sparsity(program, self.sites))
        return program, None

    def _masks(self, parameters: Mapping[str, nn.Parameter], sparsity: float) -> dict[str, Tensor]:
        names = {site.tensor for site in self.sites}
        now = self.program.with_tensors({n: parameters[n].detach() for n in names})
        masks = {n: torch.ones_like(parameters[n], dtype=torch.bool) for n in names}
        alive = self.program.with_tensors(masks)
        scores = {site.name: site.matrix(now).abs().cpu() for site in self.sites}
        removed = self._removed(scores, sparsity)
        for site in self.sites:
            # A view of the mask, whatever the storage.
            site.matrix(alive).copy_(~removed[site.name])
        return masks

    def _removed(self, scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        pattern = parse_pattern(self.options.pattern)
        if pattern.of:
            # Case 4: what the pattern would leave comes last, and the count does not reach it.
            chosen = {n: removed_mask(s, sparsity, pattern, False) for n, s in scores.items()}
            last = {n: s.masked_fill(~chosen[n], torch.inf) for n, s in scores.items()}
            counts = {n: removed_count(sparsity, s.numel()) for n, s in scores.items()}
            return {
                n: lowest(s.reshape(1, -1), counts[n]).reshape(s.shape) for n, s in last.items()
            }
        parts = dict.fromkeys(scores, sparsity)
        if self.options.allocation == "global":
            parts = global_sparsities({n: pattern.units(s) for n, s in scores.items()}, sparsity)
        return {n: removed_mask(s, parts[n], pattern, False) for n, s in scores.items()}


def _sparsity(program: Program, sites: Sequence[LinearSite]) -> float:
    """The fraction of the sites' weights that is zero."""
    matrices = [site.matrix(program) for site in sites]
    return sum(int((m == 0).sum()) for m in matrices) / sum(m.numel() for m in matrices)
