"""Least squares over the patches of the kept channels, for kernels whose taps count apart.

Of a wide kernel the Gram matrix of all columns is too large, so that units are chosen by channels
at single positions (`axes.sites.WIDEST`). What stays is narrower, and its neighbors say more: with
x [kept columns] of a patch, y [out] what the whole weight W gives on it, H = Σ x xᵀ, T = Σ y xᵀ,

    V = argmin Σ |y - V x|² + tr((V - W_K) D (V - W_K)ᵀ)        D the damping, diagonal
    V (H + D) = T + W_K D
    Σ |y - V x|² = Σ |y|² - 2 tr(V Tᵀ) + tr(V H Vᵀ)

which is `obs.refit` without the columns of H that go. The bias is a last column of ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from graphprune.axes.sites import LinearSite
from graphprune.calibration.gram import Gram
from graphprune.calibration.lagged import LaggedGram
from graphprune.calibration.stream import Stream
from graphprune.ir.program import Program
from graphprune.passes.solvers.obs import damped, few_rows_explained

FITTED = 8192
"""Columns that stay at most, 0.5 GiB of second moments."""
_ROWS = 2  # for each column at least: fewer are fitted by chance


@final
@dataclass(frozen=True, slots=True)
class KeptPatches:
    """Second moments of the patches that stay, and of the outputs that they are to give.

    Attributes:
        site: the product over whole patches.
        columns: those of its weight that stay, int64 [kept].
        gram: of these columns.
        target: T, with the bias's column last where there is one; float64 [out, kept (+ 1)].
        energy: Σ |y|².
    """

    site: LinearSite
    columns: Tensor
    gram: Gram
    target: Tensor
    energy: float

    @classmethod
    def collect(
        cls, stream: Stream, program: Program, site: LinearSite, stays: Tensor
    ) -> KeptPatches | None:
        """Read the batches; None where the columns are too many, or the rows too few.

        Args:
            stream: in front of the site.
            program: with the weight as it was.
            site: a convolution whose taps count apart, alone in reading its weight.
            stays: input channels, bool [in].
        """
        assert site.window is not None
        site = replace(site, window=(window := replace(site.window, apart=False)))
        columns = window.columns(stays).nonzero().flatten()
        if not 0 < len(columns) <= FITTED:
            return None
        weight, bias = site.matrix(program), site.bias_column(program)
        gram = stream.accumulator(site, len(columns))
        target = torch.zeros(len(weight), len(columns) + (bias is not None), dtype=torch.float64)
        energy = 0.0
        for i, _, values in stream.before(program, {site.node}):
            if isinstance(gram, LaggedGram):
                x = site.channels(values[site.operand])
                channel = x.dim() - len(window.kernel) - 1
                gram.add(x.index_select(channel, stays.nonzero().flatten().to(x.device)))
            for rows in stream.inputs(site, values, i):
                y = rows @ weight.T
                kept = rows[:, columns]
                if isinstance(gram, Gram):
                    gram.add(kept)
                if bias is not None:
                    y = y + bias.to(y)
                    kept = torch.cat([kept, kept.new_ones(len(kept), 1)], 1)
                target += (y.T @ kept).double().cpu()
                energy += float(y.square().sum(dtype=torch.float64))
        done = gram.gram() if isinstance(gram, LaggedGram) else gram
        if done.count < _ROWS * len(columns):
            return None
        return cls(site, columns, done, target, energy)

    def fit(self, program: Program, damping: float) -> tuple[Program, float]:
        """The program with the fitted weight, and Σ |y - V x|².

        Raises:
            UnsupportedError: H + D is not positive definite.
        """
        kept, moments = len(self.columns), self.gram.matrix
        matrix = damped(moments, damping)
        old = self.site.matrix(program).to("cpu", torch.float64)
        wanted = self.target.clone()
        wanted[:, :kept] += old[:, self.columns] * (matrix.diagonal() - moments.diagonal())
        if self.site.bias is not None:
            moments = self.gram.with_ones()
            matrix = replace(self.gram, matrix=matrix).with_ones()
        with few_rows_explained():
            factor = torch.linalg.cholesky(matrix)
        found = torch.cholesky_solve(wanted.T, factor).T
        error = self.energy - float((found * (2 * self.target - found @ moments)).sum())
        weight = torch.zeros_like(old)
        weight[:, self.columns] = found[:, :kept]
        bias = found[:, -1] if self.site.bias is not None else None
        return self.site.with_matrix(program, weight, bias), max(error, 0.0)
