"""Structured optimal brain surgeon: which columns of a weight to remove, with compensation.

W [out, in] is a weight, H = Σ x xᵀ [in, in] the Gram matrix of its inputs, damped and positive
definite, and G the g columns of a unit. A change ΔW [out, in] moves the outputs by Σ |ΔW x|² =
tr(ΔW H ΔWᵀ). Removing the unit asks for ΔW_:G = -W_:G; the other columns are free to compensate.
With Lagrange multipliers Λ [out, g] the minimum has ΔW H = Λ E, E = rows G of the identity, so

    ΔW = Λ H⁻¹_G:    and from its columns G    Λ = -W_:G (H⁻¹_GG)⁻¹
    cost    tr(ΔW H ΔWᵀ) = tr(Λ H⁻¹_GG Λᵀ) = tr(W_:G (H⁻¹_GG)⁻¹ W_:Gᵀ)
    update  W   -= W_:G (H⁻¹_GG)⁻¹ H⁻¹_G:
    then    H⁻¹ -= H⁻¹_:G (H⁻¹_GG)⁻¹ H⁻¹_G:        the inverse without G, a Schur complement

(ZipLM, arXiv 2302.04089; g = 1 is the optimal brain surgeon). Removing one unit after another
gives, in any order, the joint least-squares solution on the columns left, and the costs add up to
its loss. Units are chosen greedily; all costs are computed again after each removal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphprune.errors import UnsupportedError

_BLOCK = 64  # columns whose downdates are kept factored before one matrix product applies them


@dataclass(frozen=True, slots=True)
class Problem:
    """One consumer of the units.

    Attributes:
        weight: [out, in], float64.
        gram: [in, in], float64; damped and positive definite.
        columns: the input features of each unit, int64 [units, features per unit].
        idle: features that add nothing to the output, bool [in]; None for none.
    """

    weight: Tensor
    gram: Tensor
    columns: Tensor
    idle: Tensor | None = None

    @property
    def used(self) -> Tensor:
        """The weight with zeros for idle features, which cost nothing to remove; [out, in]."""
        return self.weight if self.idle is None else self.weight.masked_fill(self.idle, 0)


def idle_features(weight: Tensor, gram: Tensor) -> Tensor:
    """Features that add nothing to the output on the rows that a Gram matrix has seen; bool [in].

    Zero on every row, as a dead ReLU is, or so small that float32 loses them beside the others, as
    a SiLU of -20 is.

    Args:
        weight: [out, in].
        gram: [in, in], without damping.
    """
    added = gram.diagonal() * weight.to(torch.float64).square().sum(0)
    return added <= torch.finfo(torch.float32).eps ** 2 * added.sum()


def damped(gram: Tensor, damping: float, *, ones: bool = False) -> Tensor:
    """Make a Gram matrix positive definite: add a fraction of the mean diagonal to the diagonal.

    The mean is over the live features. Dead ones, zero on every row, get the mean itself too: they
    are correlated with nothing, so any positive number keeps their weights as they are. It does not
    measure what they cost.

    Args:
        gram: [in, in], of any float type.
        damping: the fraction, 0 or more.
        ones: whether the last feature is a constant one, that a bias reads; it is not damped.

    Returns:
        A new matrix, float64 [in, in].
    """
    gram = gram.to(torch.float64).clone()
    diagonal = gram.diagonal()[: len(gram) - ones]
    dead = diagonal <= 0
    level = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    diagonal[dead] = level
    diagonal += damping * level
    return gram


def greedy(problems: Sequence[Problem], count: int) -> tuple[list[int], list[float]]:
    """Choose `count` units to remove, one after another, always the cheapest.

    A unit's cost is the sum over all problems. Idle features cost nothing, so units that have no
    others go first.

    Args:
        problems: the weights that read the units; each lists the same units in the same order.
        count: at most the number of units.

    Returns:
        The units in the order of removal, and the cost of each: their running sum is the rise of
        the loss, the sum over problems of tr(ΔW H ΔWᵀ).

    Raises:
        UnsupportedError: a Gram matrix is not positive definite.
    """
    with few_rows_explained():
        return _greedy([_State(p) for p in problems], count)


def _greedy(states: Sequence[_State], count: int) -> tuple[list[int], list[float]]:
    order: list[int] = []
    costs: list[float] = []
    for _ in range(count):
        total = states[0].costs()
        for state in states[1:]:
            total = total + state.costs()
        unit = int(total.argmin())
        order.append(unit)
        costs.append(float(total[unit]))
        for state in states:
            state.remove(unit)
    return order, costs


@contextlib.contextmanager
def few_rows_explained() -> Iterator[None]:
    """Turn a failed Cholesky factorization into an UnsupportedError that names the way out."""
    try:
        yield
    except torch.linalg.LinAlgError as e:  # type: ignore[attr-defined]
        raise UnsupportedError(
            "the calibration inputs of a layer do not span its features, and damping is too small "
            "to fill in: raise damping (0.01 is usual), or give more batches"
        ) from e


def refit(weight: Tensor, gram: Tensor, keep: Tensor) -> Tensor:
    """Fit a weight with the features K = `keep` alone to the outputs of the whole: least squares.

    Σ |V x - W x|² = tr((V - W) H (V - W)ᵀ); with V zero outside of K its minimum solves
    V_K H_KK = W H_:K.

    Args:
        weight: W, [out, in].
        gram: H, damped, float64 [in, in].
        keep: K, indices, int64.

    Returns:
        V, float64 [out, in].

    Raises:
        UnsupportedError: H_KK is not positive definite.
    """
    weight = weight.to(torch.float64)
    target = weight @ gram[:, keep]
    with few_rows_explained():
        factor = torch.linalg.cholesky(gram[keep][:, keep])
    result = torch.zeros_like(weight)
    result[:, keep] = torch.cholesky_solve(target.T, factor).T
    return result


def loss(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    """Return tr(ΔW H ΔWᵀ), the squared output error over all rows that the Gram matrix has seen."""
    difference = weight.to(torch.float64) - other
    return float(((difference @ gram) * difference).sum())


class _State:
    """One problem while units go.

    With R Rᵀ = H⁻¹_GG, u = H⁻¹_:G R⁻ᵀ [in, g] and v = W_:G R⁻ᵀ [out, g], a removal is H⁻¹ -= u uᵀ
    and W -= v uᵀ. The columns u and v are collected in U and V and applied once in a while:
    H⁻¹ = inverse - U Uᵀ and W = weight - V Uᵀ. Costs need only the blocks of each unit, which every
    removal brings up to date.

    Attributes:
        inverse: H⁻¹ before the collected removals, [in, in].
        weight: W before the collected removals, [out, in].
        u: U, [in, collected columns].
        v: V, [out, collected columns].
        gone: units removed, bool [units].
        hessians: H⁻¹_GG of every unit, [units, g, g].
        products: W_:Gᵀ W_:G of every unit, [units, g, g].
    """

    def __init__(self, problem: Problem) -> None:
        self.columns = problem.columns
        self.width = problem.columns.shape[1]
        factor = torch.linalg.cholesky(problem.gram)
        self.inverse = torch.cholesky_inverse(factor)
        self.weight = problem.used.to(torch.float64).clone()
        rows = problem.gram.shape[0]
        self.u = torch.zeros(rows, 0, dtype=torch.float64)
        self.v = torch.zeros(self.weight.shape[0], 0, dtype=torch.float64)
        self.gone = torch.zeros(len(problem.columns), dtype=torch.bool)
        blocks = self.columns
        self.hessians = self.inverse[blocks[:, :, None], blocks[:, None, :]]
        gathered = self.weight[:, blocks.reshape(-1)].reshape(len(self.weight), *blocks.shape)
        self.products = torch.einsum("oug,ouh->ugh", gathered, gathered)

    def costs(self) -> Tensor:
        """Cost of removing each unit next, [units]; infinite for those that are gone."""
        # tr(W_:G (H⁻¹_GG)⁻¹ W_:Gᵀ) = tr((H⁻¹_GG)⁻¹ (W_:Gᵀ W_:G))
        if self.width == 1:
            result = self.products[:, 0, 0] / self.hessians[:, 0, 0]
        else:
            solved = torch.linalg.solve(self.hessians, self.products)
            result = solved.diagonal(dim1=1, dim2=2).sum(1)
        return result.masked_fill(self.gone, torch.inf)

    def remove(self, unit: int) -> None:
        """Take a unit out, and bring every other unit's blocks up to date."""
        at = self.columns[unit]
        # Columns G of H⁻¹ and W, with the collected removals applied.
        hessian = self.inverse[:, at] - self.u @ self.u[at].T
        weight = self.weight[:, at] - self.v @ self.u[at].T
        root = torch.linalg.cholesky(hessian[at])
        u = torch.linalg.solve_triangular(root, hessian.T, upper=False).T
        v = torch.linalg.solve_triangular(root, weight.T, upper=False).T
        # vᵀ W for the current W, before this removal; [g, in].
        projected = v.T @ self.weight - (v.T @ self.v) @ self.u.T
        mine = u[self.columns]  # rows of u of every unit: [units, width, width of the removed unit]
        theirs = projected[:, self.columns].permute(1, 2, 0)  # W_:Gᵀ v of every unit, as `mine`
        # (W_:G - v u_Gᵀ)ᵀ (W_:G - v u_Gᵀ) = W_:Gᵀ W_:G - cross - crossᵀ + u_G vᵀ v u_Gᵀ
        cross = theirs @ mine.transpose(1, 2)
        inner = mine @ (v.T @ v) @ mine.transpose(1, 2)
        self.products += inner - cross - cross.transpose(1, 2)
        self.hessians -= mine @ mine.transpose(1, 2)
        self.gone[unit] = True
        # Its block is zero now; the identity keeps `solve` defined, and `costs` masks the result.
        self.hessians[self.gone] = torch.eye(self.width, dtype=torch.float64)
        self.u = torch.cat([self.u, u], 1)
        self.v = torch.cat([self.v, v], 1)
        if self.u.shape[1] >= _BLOCK:
            self.inverse -= self.u @ self.u.T
            self.weight -= self.v @ self.u.T
            self.u, self.v = self.u[:, :0], self.v[:, :0]
