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
from graphprune.passes.solvers.obs import Problem, damped, idle_features, loss, refit
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
        slope: Σ r xᵀ for what its output is to gain, r, with the bias's column last; [out, in]
            or [out, in + 1], float64. None where it is to stay.
        patches: what least squares fits to instead, where taps count apart.
    """

    site: LinearSite
    units: Tensor
    gram: Gram
    slope: Tensor | None = None
    patches: KeptPatches | None = None

    def columns(self, size: int) -> Tensor:
        """Input features of each unit, int64 [size, features per unit]."""
        order = self.units.argsort(stable=True)
        return order[int((self.units < 0).sum()) :].reshape(size, -1)

    def problem(self, program: Program, size: int, damping: float) -> Problem:
        """Weight and damped Gram matrix, with the bias as a column of ones that never goes.

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
        gram = damped(self.gram.matrix, damping)
        idle = idle_features(weight, self.gram.matrix)
        bias = self.site.bias_column(program)
        if bias is not None:
            weight = torch.cat([weight, bias[:, None]], 1)
            whole = self.gram.with_ones()
            whole[:-1, :-1] = gram
            gram, idle = whole, torch.cat([idle, idle.new_zeros(1)])
        return Problem(weight, gram, self.columns(size), idle)


def gather(
    stream: Stream, program: Program, groups: AxisGroups, group: AxisGroup, ctx: Context
) -> list[Consumer]:
    """Stream up to a group's consumers and take their statistics.

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
    least-squares   the kept columns (and the bias) are fitted to the old output

    Returns:
        The program with the new weights, and the output error: Σ|ΔW x|² / Σ|W x|² over the rows.
    """
    error = energy = 0.0
    for part in parts:
        if part.patches is not None and method == "least-squares":
            program, lost = part.patches.fit(program, damping)
            error, energy = error + lost, energy + part.patches.energy
            continue
        problem = part.problem(program, group.size, damping)
        old = problem.weight
        features = len(part.units)
        stays = torch.isin(part.units, keep) | (part.units < 0)
        if method == "least-squares":
            extra = [features] if part.site.bias is not None else []
            index = torch.cat([stays.nonzero().flatten(), torch.tensor(extra, dtype=torch.int64)])
            new = refit(old, problem.gram, index, part.slope)
        else:
            new = old.clone()
            new[:, :features][:, ~stays] = 0
            if method == "bias" and part.site.bias is not None:
                new[:, -1] += old[:, :features][:, ~stays] @ part.gram.mean[~stays]
        seen = part.gram.matrix if part.site.bias is None else part.gram.with_ones()
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
