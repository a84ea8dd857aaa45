"""Removal that looks at data: groups in execution order, each on what the cuts before it leave.

For every group: stream the calibration batches to the sites that consume it, take their Gram
matrices, choose the units, and fit the kept columns of those weights to the old output
(compensation). All at the old shapes; one `ctx.shrink` afterwards removes what is zero by then.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graphprune.axes import AxisGroup, AxisGroups
from graphprune.axes.sites import (
    LinearSite,
    consumers,
    contractions,
    linear_sites,
    passes_through,
)
from graphprune.calibration.gram import Gram
from graphprune.calibration.stream import Stream
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.ir.program import Program
from graphprune.passes.solvers.held_out import Moments, Residual
from graphprune.passes.solvers.obs import Problem, damped, idle_features, loss
from graphprune.passes.structural.patches import KeptPatches
from graphprune.pipeline.base import Context
from graphprune.suggest import suggest

log = logging.getLogger(__name__)

COMPENSATIONS = ("none", "bias", "least-squares")


@dataclass(frozen=True, slots=True)
class Consumer:
    """One weight that reads the units, with what its inputs were.

    Attributes:
        site: the product.
        units: the unit of each input feature, -1 for none; int64 [in].
        gram: second moments of its inputs.
        residual: what its output is to gain, with the bias's column last; None where it is to stay.
        patches: what least squares fits to instead, where taps count apart.
    """

    site: LinearSite
    units: Tensor
    gram: Gram
    residual: Residual | None = None
    patches: KeptPatches | None = None

    def columns(self, size: int) -> Tensor:
        """Input features of each unit, int64 [size, features per unit]."""
        order = self.units.argsort(stable=True)
        return order[int((self.units < 0).sum()) :].reshape(size, -1)

    def weight(self, program: Program) -> Tensor:
        """The weight, float64 [out, in], with the bias as last column where there is one.

        Raises:
            UnsupportedError: nothing was seen, or something of it is not finite.
        """
        weight = self.site.matrix(program).to("cpu", torch.float64)
        if not self.gram.count:
            raise UnsupportedError(
                f"no calibration row reaches {self.site.name!r}: all of them are padding, or are "
                "routed elsewhere; give more batches"
            )
        if not bool(weight.isfinite().all() & self.gram.matrix.isfinite().all()):
            raise UnsupportedError(
                f"the weight {self.site.name!r}, or the squares of its inputs, hold NaN or "
                "infinity; repair the weights or scale the inputs first"
            )
        bias = self.site.bias_column(program)
        return weight if bias is None else torch.cat([weight, bias[:, None]], 1)

    def problem(self, program: Program, size: int, damping: float) -> Problem:
        """Weight and damped Gram matrix, with the bias as a column of ones that never goes.

        Raises:
            UnsupportedError: nothing was seen, or something of it is not finite.
        """
        weight, ones = self.weight(program), self.site.bias is not None
        idle = idle_features(weight[:, : len(self.units)], self.gram.matrix)
        if ones:
            idle = torch.cat([idle, idle.new_zeros(1)])
        return Problem(weight, damped(self.seen, damping, ones=ones), self.columns(size), idle)

    def kept(self, units: Tensor) -> Tensor:
        """Columns of `weight` that stay when these units do; int64."""
        stays = torch.isin(self.units, units) | (self.units < 0)
        extra = [len(self.units)] if self.site.bias is not None else []
        return torch.cat([stays.nonzero().flatten(), torch.tensor(extra, dtype=torch.int64)])

    @property
    def seen(self) -> Tensor:
        """The Gram matrix, with a constant one as last feature where there is a bias."""
        return self.gram.matrix if self.site.bias is None else self.gram.with_ones()

    @property
    def moments(self) -> Moments:
        """What fits are made by and evaluated by."""
        ones, held = self.site.bias is not None, self.gram.held
        if held is None or held.count in (0, self.gram.count):  # as of an expert's rows
            return Moments(self.seen, None, ones)
        return Moments(self.seen, held.with_ones() if ones else held.matrix, ones)

    def damping(self, program: Program, units: Tensor, least: float) -> float:
        """The damping with which these units alone are closest to the output, on rows held out."""
        return self.moments.damping(self.weight(program), self.kept(units), least)


def gather(
    stream: Stream,
    program: Program,
    groups: AxisGroups,
    group: AxisGroup,
    ctx: Context,
    *,
    held: bool = False,
) -> list[Consumer]:
    """Stream up to a group's consumers and take their statistics.

    Args:
        stream: of the calibration batches.
        program: the tensors to run with.
        groups: of the program.
        group: whose units are read.
        ctx: for the progress.
        held: whether weights will be fitted, so that those of batches held out are wanted too.

    Raises:
        UnsupportedError: something that is no linear site sums over the group.
    """
    every = consumers(groups, group)
    linear = {site.node for site, _ in every}
    # Another entry reads by the same weights; the batches go through this one.
    found = [(site, units) for site, units in every if site.node in stream.number]
    for entry, contraction in contractions(groups, group):
        if contraction.node in linear or passes_through(groups, entry, contraction, group):
            continue
        raise UnsupportedError(
            f"{group.id!r} is summed over by `{contraction.node.name}`, which is no product with "
            "a weight: its statistics do not say what a unit is worth; use score='magnitude' or "
            "'taylor', and compensate='none', for it"
        )
    moments = stream.moments(
        program,
        [site for site, _ in found],
        lambda done, total: ctx.progress(done, total, "batches"),
        held=held,
    )
    grams: dict[str, Gram] = {}
    for (site, _), gram in zip(found, moments, strict=True):
        # A weight at several places has the rows of all of them.
        grams[site.name] = grams[site.name] + gram if site.name in grams else gram
    biases: dict[str, set[str | None]] = {}
    for site, _ in found:
        biases.setdefault(site.name, set()).add(site.bias)
    parts = {}
    for site, units in found:
        # One weight used with several biases is fitted once, and none of them is.
        own = site if len(biases[site.name]) == 1 else replace(site, bias=None)
        parts[site.name] = Consumer(own, units, grams[site.name])
    return list(parts.values())


def with_patches(
    stream: Stream, program: Program, part: Consumer, groups: AxisGroups, keep: Tensor
) -> Consumer:
    """The consumer with the patches of the kept channels, where its taps count apart.

    A weight at several places is fitted tap by tap.
    """
    places = sum(site.name == part.site.name for site in linear_sites(groups, part.site.entry))
    if part.site.window is None or not part.site.window.apart or places > 1:
        return part
    stays = torch.isin(part.units, keep) | (part.units < 0)
    return replace(part, patches=KeptPatches.collect(stream, program, part.site, stays))


def compensate(
    program: Program,
    group: AxisGroup,
    parts: Sequence[Consumer],
    keep: Tensor,
    method: str,
    damping: float,
) -> tuple[Program, float]:
    """Zero the removed units' columns in every consumer, and compensate in the kept ones.

    none            the columns go, nothing else changes
    bias            b += W_removed · mean of the removed inputs: the mean output stays (FLAP)
    least-squares   the kept columns (and the bias) are fitted to the old output; with more damping
                    than asked where that is closer on batches held out (`Moments`), but for whole
                    patches

    Returns:
        The program with the new weights, and the output error: Σ|ΔW x|² / Σ|W x|² over the rows.
    """
    error = energy = 0.0
    for part in parts:
        if part.patches is not None and method == "least-squares":
            program, lost = part.patches.fit(program, damping)
            error, energy = error + lost, energy + part.patches.energy
            continue
        old, seen = part.weight(program), part.seen
        features, index = len(part.units), part.kept(keep)
        if method == "least-squares":
            new = part.moments.refit(old, index, damping, part.residual)
        else:
            new = torch.zeros_like(old)
            new[:, index] = old[:, index]
            stays = torch.isin(torch.arange(features), index)
            if method == "bias" and part.site.bias is not None:
                new[:, -1] += old[:, :features][:, ~stays] @ part.gram.mean[~stays]
        error += loss(old, new, seen)  # as it is on the rows, without damping
        energy += loss(old, torch.zeros_like(old), seen)
        bias = new[:, -1] if part.site.bias is not None else None
        program = part.site.with_matrix(program, new[:, :features], bias)
    return program, error / max(energy, 1e-300)


def in_execution_order(groups: AxisGroups, chosen: Sequence[AxisGroup]) -> list[AxisGroup]:
    """Groups by the first place that sums over them: a later one sees the earlier ones pruned."""
    number = {
        node: i
        for entry in groups.program.entries.values()
        for i, node in enumerate(entry.graph.nodes)
    }
    first = {g.id: min(number[c.node] for _, c in contractions(groups, g)) for g in chosen}
    return sorted(chosen, key=lambda g: first[g.id])


def check_compensation(name: str) -> None:
    """Raise RecipeError for an unknown way of compensating."""
    if name not in ("auto", *COMPENSATIONS):
        raise RecipeError(f"there is no compensation {name!r}; {suggest(name, COMPENSATIONS)}")
