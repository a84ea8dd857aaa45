"""Structured optimal brain surgeon: which columns of a weight to remove, with compensation.

For a weight W [out, in] with inputs of Gram matrix H [in, in], removing the columns G of a unit
costs least when the others are updated with the inverse Hessian (ZipLM, arXiv 2302.04089):

    cost    tr(W_G (H⁻¹_GG)⁻¹ W_Gᵀ)              the exact rise of tr(ΔW H ΔWᵀ)
    update  W   -= W_G (H⁻¹_GG)⁻¹ H⁻¹_G:
    then    H⁻¹ -= H⁻¹_:G (H⁻¹_GG)⁻¹ H⁻¹_G:

Removing one unit after another gives, in any order, the joint least-squares solution on what is
left. Units are chosen greedily, all costs anew after each removal.
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


def damped(gram: Tensor, damping: float) -> Tensor:
    """A Gram matrix made positive definite: every feature gets a part of the live ones' mean.

    Dead features, zero on every row, get that mean itself beside it: with any number on the
    diagonal their weights stay as they are, for they are correlated with nothing. It is no measure
    of what they cost.

    Args:
        gram: [in, in].
        damping: part of the live features' mean diagonal that is added to each diagonal entry.
    """
    gram = gram.to(torch.float64).clone()
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    level = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    diagonal[dead] = level
    diagonal += damping * level
    return gram


def greedy(problems: Sequence[Problem], count: int) -> tuple[list[int], list[float]]:
    """Remove `count` units one after another, always the cheapest; the costs of several add up.

    Idle features cost nothing, so units that have no others go first.

    Returns:
        The units in the order of removal, and the cost of each: their running sum is the rise of
        the loss sum over problems of tr(ΔW H ΔWᵀ).
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
    """Say what helps when a Gram matrix has too little rank."""
    try:
        yield
    except torch.linalg.LinAlgError as e:  # type: ignore[attr-defined]
        raise UnsupportedError(
            "the calibration inputs of a layer do not span its features, and damping is too small "
            "to fill in: raise damping (0.01 is usual), or give more batches"
        ) from e


def refit(weight: Tensor, gram: Tensor, keep: Tensor, slope: Tensor | None = None) -> Tensor:
    """The weight with only `keep` features that comes closest on the inputs: least squares.

    argmin over V of tr((V - W) H (V - W)ᵀ) with V zero outside `keep`; [out, in] float64. With
    S = Σ r xᵀ for a residual r that W leaves, closest to W x + r: of that less 2 tr(V Sᵀ).
    """
    weight = weight.to(torch.float64)
    target = weight @ gram[:, keep]
    if slope is not None:
        target = target + slope[:, keep]
    with few_rows_explained():
        factor = torch.linalg.cholesky(gram[keep][:, keep])
    result = torch.zeros_like(weight)
    result[:, keep] = torch.cholesky_solve(target.T, factor).T
    return result


def loss(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    """tr(ΔW H ΔWᵀ): the squared output error over all rows that the Gram matrix has seen."""
    difference = weight.to(torch.float64) - other
    return float(((difference @ gram) * difference).sum())


class _State:
    """One problem while units go. H⁻¹ and W lag behind by factored downdates U Uᵀ and V Uᵀ."""

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
        """Cost of removing each unit next; infinite for those that are gone. [units]"""
        if self.width == 1:
            result = self.products[:, 0, 0] / self.hessians[:, 0, 0]
        else:
            solved = torch.linalg.solve(self.hessians, self.products)
            result = solved.diagonal(dim1=1, dim2=2).sum(1)
        return result.masked_fill(self.gone, torch.inf)

    def remove(self, unit: int) -> None:
        """Take a unit out, and bring every other unit's blocks up to date."""
        at = self.columns[unit]
        hessian = self.inverse[:, at] - self.u @ self.u[at].T
        weight = self.weight[:, at] - self.v @ self.u[at].T
        root = torch.linalg.cholesky(hessian[at])
        u = torch.linalg.solve_triangular(root, hessian.T, upper=False).T
        v = torch.linalg.solve_triangular(root, weight.T, upper=False).T
        # vᵀ W for the current W, before this removal.
        projected = v.T @ self.weight - (v.T @ self.v) @ self.u.T
        mine = u[self.columns]  # [units, width, width of the removed unit]
        theirs = projected[:, self.columns].permute(1, 2, 0)
        cross = theirs @ mine.transpose(1, 2)
        inner = mine @ (v.T @ v) @ mine.transpose(1, 2)
        self.products += inner - cross - cross.transpose(1, 2)
        self.hessians -= mine @ mine.transpose(1, 2)
        self.gone[unit] = True
        self.hessians[self.gone] = torch.eye(self.width, dtype=torch.float64)
        self.u = torch.cat([self.u, u], 1)
        self.v = torch.cat([self.v, v], 1)
        if self.u.shape[1] >= _BLOCK:
            self.inverse -= self.u @ self.u.T
            self.weight -= self.v @ self.u.T
            self.u, self.v = self.u[:, :0], self.v[:, :0]
