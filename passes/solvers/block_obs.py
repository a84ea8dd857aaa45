"""Exact removal of blocks: structured optimal brain surgeon (`obs`), strip by strip.

A matrix W [out, in] falls into strips of `height` outputs, and a strip into units of `width`
inputs; a unit of a strip is a block. All outputs of a strip lose the same inputs, so that a strip
is a problem of `obs` of its own, with its own inverse: every other weight of the strip compensates,
to the left too, where `sparsegpt` compensates to the right alone. For the columns G of a block

    cost    tr(W_:G (H⁻¹_GG)⁻¹ W_:Gᵀ)         the rise of tr(ΔW H ΔWᵀ) after compensation
    update  W -= v uᵀ,  H⁻¹ -= u uᵀ,          u = H⁻¹_:G R⁻ᵀ, v = W_:G R⁻ᵀ, R Rᵀ = H⁻¹_GG

In every strip the cheapest block goes, then the cheapest of those left, until none is. Strips are
independent: the cheapest next block of the matrix is the cheapest next one of some strip, so that
one ranking of all strips' sequences gives the greedy order of the whole. In the end each strip is
fitted to the whole matrix's outputs on the columns that stay: least squares, exact for the blocks
chosen.

Strips go in lockstep, S of them at a time: tensors begin with S. Updates are collected in U and V
and applied once in a while, as in `obs`. Of `inverse` and `weight` m units are held: those left,
and some that are gone, which are forgotten once they are a quarter when updates are applied.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from graphprune.passes.solvers.obs import refit
from graphprune.passes.sparsity.sparsity_pattern import Pattern, lowest, removed_count

_COLLECTED = 64  # columns of U before they are applied
_BYTES = 256 * 2**20  # of inverses at a time


def cheapest_blocks(weight: Tensor, inverse: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    """Choose blocks to remove, one after another, always the one that costs least.

    Args:
        weight: [out, in], float64.
        inverse: of the inputs' Gram matrix, damped, float64 [in, in].
        sparsity: fraction of the blocks to remove; one at least stays.
        pattern: of blocks.

    Returns:
        Where the weights go, bool [out, in].
    """
    rows, columns = weight.shape
    strips, units = pattern.shape(rows, columns)
    order, costs = sequences(weight, inverse, pattern)
    # A step that a costlier one comes before is not reached without it: with the running maximum
    # the lowest are the first ones of each strip.
    levels = costs.cummax(1).values
    first = lowest(levels.reshape(1, -1), removed_count(sparsity, strips * units))
    gone = torch.zeros(strips, units, dtype=torch.bool).scatter(
        1, order, first.reshape(strips, units)
    )
    return pattern.spread(gone, rows, columns)


def fitted_blocks(weight: Tensor, gram: Tensor, gone: Tensor, pattern: Pattern) -> Tensor:
    """Fit a weight without some blocks to the outputs of the whole, strip by strip; [out, in].

    Args:
        weight: [out, in].
        gram: of the inputs, damped, float64 [in, in].
        gone: whole blocks, bool [out, in].
        pattern: of blocks.

    Raises:
        UnsupportedError: the Gram matrix is not positive definite.
    """
    result = torch.zeros_like(weight)
    for start in range(0, len(weight), pattern.height):
        strip = slice(start, start + pattern.height)
        keep = (~gone[start]).nonzero().flatten()
        if len(keep):
            result[strip] = refit(weight[strip], gram, keep)
    return result


def sequences(weight: Tensor, inverse: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The greedy order of every strip until it is empty, and what each block costs in it.

    Returns:
        Units in the order of removal, int64 [strips, units]; the costs, float64 [strips, units].
    """
    columns = weight.shape[1]
    more = -columns % pattern.width
    # Features beyond the last add nothing, and are correlated with nothing.
    inverse = F.pad(inverse, (0, more, 0, more))
    inverse.diagonal()[columns:] = 1
    strips = F.pad(weight, (0, more, 0, -len(weight) % pattern.height))
    strips = strips.unflatten(0, (-1, pattern.height))
    many = max(1, _BYTES // (8 * inverse.numel()))
    found = [_sequences(some, inverse, pattern.width) for some in strips.split(many)]
    return torch.cat([o for o, _ in found]), torch.cat([c for _, c in found])


def _sequences(weight: Tensor, inverse: Tensor, width: int) -> tuple[Tensor, Tensor]:
    state = _State(weight, inverse, width)
    steps = [state.remove() for _ in range(weight.shape[2] // width)]
    return torch.stack([unit for unit, _ in steps], 1), torch.stack([cost for _, cost in steps], 1)


class _State:
    """Some strips while blocks go, of each as many.

    With U and V of the removals since `apply`, the inverse is inverse - U Uᵀ, the weight is
    weight - V Uᵀ.

    Attributes:
        weight: [S, height, m width].
        inverse: [S, m width, m width].
        units: which unit of the matrix each of those held is, [S, m].
        hessians: H⁻¹_GG of every unit, up to date, [S, m, width, width].
        products: W_:Gᵀ W_:G of every unit, up to date, as `hessians`.
        gone: of the units held, [S, m].
        u: [S, m width, room], of which the first `collected` columns count.
        v: [S, height, room], likewise.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, width: int) -> None:
        self.width, self.all = width, torch.arange(len(weight))
        self.weight, self.inverse = weight, inverse.expand(len(weight), -1, -1).clone()
        self.units = torch.arange(weight.shape[2] // width).expand(len(weight), -1)
        self.gone = torch.zeros(self.units.shape, dtype=torch.bool)
        self._hold()

    def _hold(self) -> None:
        """Begin to collect, with what follows from inverse and weight."""
        strips, height, columns = self.weight.shape
        parts = self.weight.unflatten(2, (-1, self.width))
        self.products = torch.einsum("shua,shub->suab", parts, parts)
        tiles = self.inverse.unflatten(2, (-1, self.width)).unflatten(1, (-1, self.width))
        diagonal = tiles.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        self.hessians = diagonal.clone(memory_format=torch.contiguous_format)
        self._spare()
        room = _COLLECTED + self.width - 1
        self.u = self.weight.new_empty(strips, columns, room)
        self.v = self.weight.new_empty(strips, height, room)
        self.collected = 0

    def remove(self) -> tuple[Tensor, Tensor]:
        """Take the cheapest block out of each strip; which unit it was, and its cost, [S] each."""
        costs = _traces(self.hessians, self.products).masked_fill(self.gone, torch.inf)
        cost, unit = costs.min(1)
        removed = self.units[self.all, unit]
        self._update(unit)
        if self.collected >= _COLLECTED:
            self._apply()
        return removed, cost

    def _update(self, unit: Tensor) -> None:
        each = self.all[:, None]
        at = unit[:, None] * self.width + torch.arange(self.width)
        # Columns G of H⁻¹ and W, with the collected removals.
        all_u, all_v = self.u[:, :, : self.collected], self.v[:, :, : self.collected]
        back = all_u[each, at].mT
        hessian = self.inverse[each, at].mT - all_u @ back  # it is symmetric
        weight = self.weight.mT[each, at].mT - all_v @ back
        root = torch.linalg.cholesky(hessian[each, at])
        u = torch.linalg.solve_triangular(root, hessian.mT, upper=False).mT
        v = torch.linalg.solve_triangular(root, weight.mT, upper=False).mT
        projected = v.mT @ self.weight - (v.mT @ all_v) @ all_u.mT  # vᵀ W before it
        mine = u.unflatten(1, (-1, self.width))  # u_G of every unit, [S, m, width, width]
        theirs = projected.unflatten(2, (-1, self.width)).permute(0, 2, 3, 1)  # W_:Gᵀ v
        # (W_:G - v u_Gᵀ)ᵀ (W_:G - v u_Gᵀ) = W_:Gᵀ W_:G - cross - crossᵀ + u_G vᵀ v u_Gᵀ
        cross = theirs @ mine.mT
        self.products += mine @ (v.mT @ v)[:, None] @ mine.mT - cross - cross.mT
        self.hessians -= mine @ mine.mT
        self.gone[self.all, unit] = True
        self._spare()
        more = slice(self.collected, self.collected + self.width)
        self.u[:, :, more], self.v[:, :, more] = u, v
        self.collected += self.width

    def _spare(self) -> None:
        """What is gone has a Hessian of zero; the identity keeps its cost defined."""
        self.hessians[self.gone] = torch.eye(self.width, dtype=self.hessians.dtype)

    def _apply(self) -> None:
        """Apply the collected removals; forget what is gone once that is a quarter."""
        u, v = self.u[:, :, : self.collected], self.v[:, :, : self.collected]
        self.weight = self.weight - v @ u.mT
        self.inverse.baddbmm_(u, u.mT, alpha=-1)
        if 4 * int((~self.gone[0]).sum()) <= 3 * self.gone.shape[1]:
            self._forget()
        self._hold()

    def _forget(self) -> None:
        each = self.all[:, None]
        left = (~self.gone).nonzero()[:, 1].reshape(len(self.all), -1)
        at = (left[:, :, None] * self.width + torch.arange(self.width)).flatten(1)
        inverse = self.inverse.new_empty(len(at), at.shape[1], at.shape[1])
        for old, new, rows, units in zip(self.inverse, inverse, at, left, strict=True):
            # Columns by unit: numbers that lie side by side are copied together.
            some = old.index_select(0, rows).unflatten(1, (-1, self.width))
            torch.index_select(some, 1, units, out=new.unflatten(1, (-1, self.width)))
        self.inverse, self.weight = inverse, self.weight.mT[each, at].mT
        self.units = self.units[each, left]
        self.gone = torch.zeros(self.units.shape, dtype=torch.bool)


def _traces(matrices: Tensor, others: Tensor) -> Tensor:
    """tr(A⁻¹ B) of small positive definite A and symmetric B, [..., n, n] each; [...].

    Elimination over all at once: LAPACK, called matrix by matrix, takes several times as long.
    """
    left, right = matrices.clone(), others.clone()
    size = matrices.shape[-1]
    for i in range(size):
        pivot = left[..., i, i].reciprocal()
        factor = left[..., :, i] * pivot[..., None]
        factor[..., i] = 1 - pivot
        left -= factor[..., :, None] * left[..., None, i, :].clone()
        right -= factor[..., :, None] * right[..., None, i, :].clone()
    return right.diagonal(dim1=-2, dim2=-1).sum(-1)
