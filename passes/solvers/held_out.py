"""Least squares evaluated on batches held out: how much damping, how much of a residual.

A weight W [out, in] keeps the features K; H = Σ x xᵀ of its inputs is known. A fit to its own
output is closest on the rows that it was made from with little damping μ, and on others often with
more. Where the output is to gain r as well, S = Σ r xᵀ is known, and the new weight is a sum,

    V(μ)_K = (W (H + μ I))_:K (H_KK + μ I)⁻¹,    R(λ)_K = S_:K (H_KK + λ I)⁻¹

both zero outside of K. What r and x have in common by chance is fitted too, and where many layers
follow one residual that is most of it: the error vanishes on the calibration rows, and grows on
others. So every fourth batch, with H' and S', is held out. On the rest V and R are fitted;
μ is chosen first, then λ and how much of the gain is taken, 0 ≤ a ≤ 1. With D = V - W the squared
error on the rows held out is a parabola in a:

    Σ' |(D + a R) x - r|² = Σ' |D x - r|² - 2 a n + a² d,    least at a = n / d
    n = tr(R S'ᵀ) - tr(D H' Rᵀ),    d = tr(R H' Rᵀ)

What is returned is fitted to all rows, with these μ, λ and a.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from graphprune.passes.solvers.obs import damped, few_rows_explained, loss, refit

OWN = (1, 3, 10, 30, 100, 300)  # μ, as multiples of the damping that is asked for
RIDGES = (0.01, 0.1, 1.0, 10.0)  # λ, as fractions of the mean squared input


@final
@dataclass(frozen=True, slots=True)
class Residual:
    """What an output is to gain, r, as moments of the rows; a constant input may come last.

    Attributes:
        slope: S = Σ r xᵀ of all rows, [out, in], float64.
        held: S' of the rows held out.
    """

    slope: Tensor
    held: Tensor

    @staticmethod
    def empty(rows: int, features: int) -> Residual:
        """Nothing seen yet."""
        slope, held = (torch.zeros(rows, features, dtype=torch.float64) for _ in range(2))
        return Residual(slope, held)

    def add(self, residual: Tensor, inputs: Tensor, *, held: bool) -> None:
        """Add rows of r, [n, out], and x, [n, in]."""
        product = residual.double().T @ inputs.double()
        self.slope.add_(product)
        if held:
            self.held.add_(product)


@final
@dataclass(frozen=True, slots=True)
class Moments:
    """What fits are made by, and what they are evaluated by.

    Attributes:
        gram: H of all rows, without damping, float64 [in, in].
        held: H' of the rows held out; None for none, and nothing is moments.
        ones: whether the last feature is a constant one, that a bias reads; it is not damped.
    """

    gram: Tensor
    held: Tensor | None
    ones: bool = False

    def damping(self, weight: Tensor, keep: Tensor, least: float) -> float:
        """The damping with which a weight, fitted to its own output, is closest on rows held out.

        Args:
            weight: W, [out, in].
            keep: K, indices, int64.
            least: as a fraction of the mean squared input; it is taken where it is 0, or no rows
                are held out.

        Raises:
            UnsupportedError: H_KK is not positive definite.
        """
        if self.held is None or not least:
            return least
        held, others = self.held, self.gram - self.held

        def error(level: float) -> float:
            return loss(weight, self._own(weight, others, keep, level), held)

        return min(dict.fromkeys(least * factor for factor in OWN), key=error)

    def refit(
        self, weight: Tensor, keep: Tensor, damping: float, residual: Residual | None = None
    ) -> Tensor:
        """Fit a weight with the features K = `keep` alone to its output, and to what it is to gain.

        Without rows held out nothing says how much of a residual is chance, and none is gained.

        Args:
            weight: W, [out, in].
            keep: K, indices, int64.
            damping: the least μ, as a fraction of the mean squared input.
            residual: of the same rows.

        Returns:
            V(μ) + a R(λ), float64 [out, in].

        Raises:
            UnsupportedError: H_KK is not positive definite.
        """
        weight = weight.to(torch.float64)
        damping = self.damping(weight, keep, damping)
        result = self._own(weight, self.gram, keep, damping)
        if self.held is None or residual is None:
            return result
        others, slope = self.gram - self.held, residual.slope - residual.held
        # Without damping fewer rows may not span what all of them do.
        fit = self._own(weight, others, keep, damping or RIDGES[0])
        towards = (residual.held - (fit - weight) @ self.held)[:, keep]
        seen = self.held[keep][:, keep]
        best = 0.0, RIDGES[0], 0.0  # how much less the error is, λ and a
        for level in RIDGES:
            gain = self._ridge(slope, others, keep, level)
            n, d = float((gain * towards).sum()), float(((gain @ seen) * gain).sum())
            part = min(max(n / max(d, 1e-300), 0.0), 1.0)
            best = max(best, (2 * part * n - part**2 * d, level, part))
        _, level, part = best
        if part:
            result[:, keep] += part * self._ridge(residual.slope, self.gram, keep, level)
        return result

    def _own(self, weight: Tensor, gram: Tensor, keep: Tensor, level: float) -> Tensor:
        return refit(weight, damped(gram, level, ones=self.ones), keep)

    def _ridge(self, slope: Tensor, gram: Tensor, keep: Tensor, level: float) -> Tensor:
        with few_rows_explained():
            factor = torch.linalg.cholesky(damped(gram, level, ones=self.ones)[keep][:, keep])
        return torch.cholesky_solve(slope[:, keep].T, factor).T
