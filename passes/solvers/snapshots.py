"""A weight at every number of kept units, from the order of removal and the Gram matrix alone.

W [out, in] is a weight, H [in, in] the damped Gram matrix of its inputs, K the features kept.
Removing units one after another leaves, in any order, the least-squares solution on K (`obs`):

    V_K H_KK = W H_:K    so    V_K = T_:K (H_KK)⁻¹    with T = W H

Nothing is stored for each level. With features sorted by how long they stay, K are the first |K|,
and for H = L Lᵀ the leading block of the lower triangular L is the Cholesky factor of the leading
block of H: H_KK = L_KK L_KKᵀ. One factorization serves all levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from graphprune.passes.solvers.obs import Problem, few_rows_explained


@final
@dataclass(frozen=True, slots=True)
class Snapshots:
    """One consumer's weight at any number of kept units.

    Attributes:
        whole: the weight, with the bias as last column where it has one; [out, in], float64.
        features: the input features, those that stay longest first; int64 [in].
        factor: L of the damped Gram matrix with features in that order; [in, in].
        target: W H in that order; [out, in].
        always: how many features are of no unit, and stay.
        width: features of a unit.
    """

    whole: Tensor
    features: Tensor
    factor: Tensor
    target: Tensor
    always: int
    width: int

    @classmethod
    def of(cls, problem: Problem, order: Sequence[int]) -> Snapshots:
        """Snapshots of a weight with the damped Gram matrix of its inputs.

        Args:
            problem: both.
            order: all units in the order in which they go.

        Raises:
            UnsupportedError: the Gram matrix is not positive definite.
        """
        stays = problem.columns[list(reversed(order))].reshape(-1)
        always = torch.ones(len(problem.gram), dtype=torch.bool)
        always[stays] = False
        features = torch.cat([always.nonzero().flatten(), stays])
        gram = problem.gram[features][:, features]
        with few_rows_explained():
            factor = torch.linalg.cholesky(gram)
        return cls(
            problem.weight,
            features,
            factor,
            problem.weight[:, features] @ gram,
            int(always.sum()),
            problem.columns.shape[1],
        )

    def weight(self, kept: int) -> Tensor:
        """The weight [out, in] with zeros for all but the last `kept` units of the order; float64.

        With all units kept it is the weight that there was.
        """
        count = self.always + kept * self.width
        if count == len(self.features):
            return self.whole
        factor = self.factor[:count, :count]
        result = torch.zeros_like(self.whole)
        solved = torch.cholesky_solve(self.target[:, :count].T, factor).T
        result[:, self.features[:count]] = solved
        return result

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors by name."""
        counts = torch.tensor([self.always, self.width])
        return {
            "whole": self.whole,
            "features": self.features,
            "factor": self.factor,
            "target": self.target,
            "counts": counts,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Snapshots:
        """Read what `tensors` gave."""
        always, width = tensors["counts"].tolist()
        return cls(
            tensors["whole"],
            tensors["features"],
            tensors["factor"],
            tensors["target"],
            always,
            width,
        )
