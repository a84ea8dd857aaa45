"""SparseGPT's solver (arXiv 2301.00774): remove weights of one matrix, with error compensation.

W [out, in] is a weight, H [in, in] the damped Gram matrix of its inputs. Columns are visited from
left to right; a weight that is kept at its turn is frozen, and columns to the right compensate. So
at column j the inverse that counts is B = (H restricted to the columns from j on)⁻¹. With U the
upper Cholesky factor of the inverse, Uᵀ U = H⁻¹, the Schur complement that eliminates the columns
before j leaves B = U[j:, j:]ᵀ U[j:, j:], whose first row is U[j, j] · U[j, j:]. The optimal brain
surgeon's formulas (`obs`, one column) with B become, for an entry w of column j,

    e = w / U[j, j]
    cost    w² / B[0, 0] = e²                      the rise of tr(ΔW H ΔWᵀ)
    update  W[row, j:] -= e · U[j, j:]             zero at j, compensation to the right

All rows share U. The sum of all e² is tr(ΔW H ΔWᵀ).

Columns to the left are frozen because every row has zeros of its own, and exact compensation would
take an inverse a row. Where many rows lose the same columns, as in blocks of many outputs, it takes
an inverse for all of them: `block_obs` compensates with all columns, and chooses by that.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from graphprune.passes.solvers.block_obs import cheapest_blocks, fitted_blocks
from graphprune.passes.solvers.obs import Problem, damped, greedy, loss, refit
from graphprune.passes.sparsity.sparsity_pattern import Pattern, lowest, removed_count

log = logging.getLogger(__name__)

BLOCK = 128  # columns whose mask is chosen together, and whose updates of the rest are applied once
TALL = 8  # outputs of a block from which on compensation is exact
# Multiply-adds (strips · in³) up to which the choice is exact too: minutes a matrix, on one core.
_AFFORDABLE = 4e12


@final
@dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs of a matrix, made ready for the solver; shared by matrices that read them.

    Attributes:
        gram: second moments, damped, float64 [in, in].
        added: what damping has added to them, [in, in].
        upper: the upper Cholesky factor of its inverse, [in, in].
        dead: features that were never anything but zero, bool [in].
        damping: what was added to the diagonal, as a fraction of its mean; infinite where that was
            not enough and eigenvalues were clamped.
    """

    gram: Tensor
    added: Tensor
    upper: Tensor
    dead: Tensor
    damping: float

    @staticmethod
    def of(gram: Tensor, damping: float) -> Inputs:
        """Damp a Gram matrix [in, in], and factor its inverse.

        Where Cholesky fails, damping is raised tenfold, up to 1. A matrix that is still singular,
        which only rounding does, has its eigenvalues clamped to 1e-6 of the largest.
        """
        dead = gram.diagonal() <= 0
        level = damping
        while True:
            matrix = damped(gram, level)
            factor, bad = torch.linalg.cholesky_ex(matrix)
            if not int(bad):
                upper, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
                if not int(bad):
                    return Inputs(matrix, matrix - gram, upper, dead, level)
            level = max(level * 10, 1e-6)
            if level > max(1, damping):
                break
        values, vectors = torch.linalg.eigh(damped(gram, damping))
        values = values.clamp_min(float(values.abs().max()) * 1e-6)
        inverse = (vectors / values) @ vectors.T
        upper = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)
        clamped = (vectors * values) @ vectors.T
        return Inputs(clamped, clamped - gram, upper, dead, math.inf)


def sparsegpt(
    weight: Tensor,
    inputs: Inputs,
    sparsity: float,
    pattern: Pattern,
    *,
    mask: Tensor | None = None,
    block: int = BLOCK,
    exact: bool = True,
) -> Tensor:
    """Prune a weight; float64 [out, in].

    1. Unstructured, and blocks of few outputs: in every `block` of columns the lowest fraction
       goes, over all rows together; a block of weights is scored by the cost of removing it whole.
    2. Blocks of `TALL` outputs and more: structured OBS in every strip of outputs, greedily, then
       least squares on what stays. In very large matrices they are chosen as in case 1, and
       wherever it should be fast (not `exact`).
    3. n:m: in every row and every m columns, when the sweep comes there.
    4. Columns: structured OBS, greedily, then least squares on the columns that stay.
    5. Rows: those that cost least; nothing compensates for a whole row.

    Args:
        weight: [out, in].
        inputs: of the same features.
        sparsity: fraction to remove; the pattern's own where it has one.
        pattern: must fit the shape.
        mask: weights to remove, bool [out, in], instead of choosing; unstructured only.
        block: columns a step, rounded up to hold the pattern.
        exact: whether tall blocks are chosen one after another.

    Raises:
        UnsupportedError: for columns and tall blocks, the Gram matrix is not positive definite.
    """
    weight = weight.to(torch.float64).clone()
    if mask is None and sparsity == 0 and not pattern.of:
        return weight
    weight[:, inputs.dead] = 0
    if mask is None and pattern.text == "columns":
        return _columns(weight, inputs, sparsity)
    if mask is None and pattern.text == "rows":
        costs = ((weight @ inputs.gram) * weight).sum(1)[None]
        gone = lowest(costs, removed_count(sparsity, len(weight)))[0]
        weight[gone] = 0
        return weight
    if mask is None and pattern.is_block and pattern.height >= TALL:
        return _blocks(weight, inputs, sparsity, pattern, exact)
    return swept(weight, inputs, sparsity, pattern, mask, block)


def _blocks(
    weight: Tensor, inputs: Inputs, sparsity: float, pattern: Pattern, exact: bool
) -> Tensor:
    """Blocks of many outputs, with exact compensation."""
    rows, columns = weight.shape
    if exact and pattern.shape(rows, columns)[0] * columns**3 <= _AFFORDABLE:
        gone = cheapest_blocks(weight, inputs.upper.T @ inputs.upper, sparsity, pattern)
    else:
        gone = swept(weight.clone(), inputs, sparsity, pattern) == 0
        gone = pattern.spread(pattern.units(~gone) == 0, rows, columns)
    return fitted_blocks(weight, inputs.gram, gone, pattern)


def swept(
    weight: Tensor,
    inputs: Inputs,
    sparsity: float,
    pattern: Pattern,
    mask: Tensor | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Prune a weight in place, in one sweep from left to right; see `sparsegpt`."""
    rows, columns = weight.shape
    step = pattern.of or pattern.width or 1
    block = math.ceil(block / step) * step
    upper = inputs.upper
    done = 0
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        here, factor = weight[:, start:stop], upper[start:stop, start:stop].contiguous()
        if mask is not None:
            gone = mask[:, start:stop].clone()
        elif pattern.of:
            gone = torch.zeros(here.shape, dtype=torch.bool)
        else:
            # Counted over the whole matrix, so that rounding does not add up over the blocks.
            wanted = _count(sparsity, rows, stop, pattern)
            gone = _cheapest(here, factor, pattern, wanted - done)
            done = wanted
        here = _sweep(here, factor, gone, pattern if mask is None else None)
        # In the block W changed by -E U, so its errors E [out, block] are solved for, and the same
        # E updates all columns to the right at once.
        errors = torch.linalg.solve_triangular(
            factor, weight[:, start:stop] - here, upper=True, left=False
        )
        weight[:, start:stop] = here
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight


def _sweep(weight: Tensor, factor: Tensor, gone: Tensor, pattern: Pattern | None) -> Tensor:
    """One block of columns from left to right; chooses n of m as it comes to them."""
    # Column by column the memory is contiguous this way round.
    turned = weight.T.clone(memory_format=torch.contiguous_format)  # of one row too
    gone = gone.T.contiguous()
    diagonal = factor.diagonal()
    for j in range(len(turned)):
        if pattern is not None and pattern.of and j % pattern.of == 0:
            near = slice(j, j + pattern.of)
            # Costs e² with the weights as updated so far.
            scores = (turned[near] / diagonal[near, None]).square()
            gone[near] = lowest(scores.T, pattern.of - pattern.keep).T
        error = torch.where(gone[j], turned[j] / diagonal[j], 0.0)
        turned[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1)
    turned[gone] = 0
    return turned.T


def _cheapest(weight: Tensor, factor: Tensor, pattern: Pattern, count: int) -> Tensor:
    """The `count` units of a block of columns whose removal costs least; bool, as the weight."""
    rows, columns = weight.shape
    if pattern.width == 1:
        errors = weight / factor.diagonal()
    else:
        # Removing the consecutive features G one after another gives errors e with e U[G, G] = w_G:
        # |e|² is the cost of all of them. Features beyond the last are zero.
        more = -columns % pattern.width
        factor = F.pad(factor, (0, more, 0, more))
        factor.diagonal()[columns:] = 1
        parts = F.pad(weight, (0, more)).unflatten(1, (-1, pattern.width))
        index = torch.arange(columns + more).reshape(-1, pattern.width)
        corners = factor[index[:, :, None], index[:, None, :]]
        errors = torch.linalg.solve_triangular(
            corners, parts.transpose(0, 1), upper=True, left=False
        )
        errors = errors.transpose(0, 1).flatten(1)[:, :columns]
    units = pattern.units(errors.abs())
    gone = lowest(units.reshape(1, -1), count).reshape(units.shape)
    return pattern.spread(gone, rows, columns)


def _count(sparsity: float, rows: int, columns: int, pattern: Pattern) -> int:
    return removed_count(sparsity, math.prod(pattern.shape(rows, columns)))


def _columns(weight: Tensor, inputs: Inputs, sparsity: float) -> Tensor:
    columns = weight.shape[1]
    problem = Problem(weight, inputs.gram, torch.arange(columns)[:, None])
    removed, _ = greedy([problem], removed_count(sparsity, columns))
    stays = torch.ones(columns, dtype=torch.bool)
    stays[removed] = False
    return refit(weight, inputs.gram, stays.nonzero().flatten())


def output_error(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    """Return Σ |ΔW x|² / Σ |W x|² over the rows that a Gram matrix has seen; `weight` is W."""
    zero = torch.zeros_like(weight)
    return loss(weight, other, gram) / max(loss(weight, zero, gram), 1e-300)
