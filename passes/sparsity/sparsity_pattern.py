"""Which weights go together (single ones, n of m, blocks, rows, columns), and the lowest of them.

Scores are of a matrix [out, in]: rows are output units, columns input features. Counting is the
same everywhere: of n units, floor(sparsity · n + 0.5) go, the lowest scores first, exactly so many
whatever the ties; one at least stays.

A unit is scored by the L2 norm of its weights' scores. Zeroing a block B changes the outputs by
tr(W_B H_BB W_Bᵀ) in all, H the Gram matrix of the inputs; for uncorrelated inputs that is
Σ w² ‖x‖², the square of the norm of |w| · ‖x‖, and of |w| where inputs are equally large too.

Blocks at the lower and right edge hold what is left where their shape does not divide the matrix's.
They count as whole ones, because a kernel takes as long for them, and their norm is of fewer
weights, because that is what they cost.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from graphprune.errors import RecipeError

_N_OF_M = re.compile(r"(\d+):(\d+)")
_BLOCK = re.compile(r"(\d+)x(\d+)")


@final
@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern: which weights go together.

    Attributes:
        text: as it was written: "unstructured", "2:4", "32x4", "rows", "columns".
        height: outputs of a block; 0 for a whole column.
        width: inputs of a block; 0 for a whole row.
        keep: of `of` consecutive inputs in a row so many stay; 0 where that is not the pattern.
        of: see `keep`.
    """

    text: str
    height: int = 1
    width: int = 1
    keep: int = 0
    of: int = 0

    @property
    def sparsity(self) -> float | None:
        """The sparsity that the pattern alone fixes, if it does."""
        return 1 - self.keep / self.of if self.of else None

    @property
    def is_block(self) -> bool:
        """Whether blocks of several weights go together."""
        return self.height * self.width > 1

    @property
    def transposed(self) -> Pattern:
        """The same blocks of the transposed matrix."""
        return replace(self, height=self.width, width=self.height)

    def obstacle(self, rows: int, columns: int) -> str:
        """Why a matrix of this shape cannot take the pattern; empty where it can."""
        if self.of and columns % self.of:
            return f"its {columns} inputs are no multiple of {self.of}"
        if self.is_block and rows <= self.height and columns <= self.width:
            return f"all of its {rows} outputs and {columns} inputs are one block"
        return ""

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """How many units there are along outputs and along inputs."""
        return math.ceil(rows / (self.height or rows)), math.ceil(columns / (self.width or columns))

    def units(self, scores: Tensor) -> Tensor:
        """The L2 norm of the scores [..., out, in] of each unit, float64 [..., *shape].

        Of single weights the scores as they are.
        """
        if self.height == self.width == 1:
            return scores
        return torch.linalg.vector_norm(self.tiles(scores.double()), dim=(-3, -1))

    def tiles(self, matrix: Tensor) -> Tensor:
        """A matrix [..., out, in] by units, [..., units, height, units, width], zeros beyond it."""
        rows, columns = matrix.shape[-2:]
        height, width = self.height or rows, self.width or columns
        padded = F.pad(matrix, (0, -columns % width, 0, -rows % height))
        return padded.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))

    def spread(self, units: Tensor, rows: int, columns: int) -> Tensor:
        """A value a unit as a value a weight, [..., out, in]."""
        height, width = self.height or rows, self.width or columns
        wide = units.repeat_interleave(height, -2).repeat_interleave(width, -1)
        return wide[..., :rows, :columns]


def parse_pattern(text: str) -> Pattern:
    """Read a pattern.

    Raises:
        RecipeError: it is none of the known forms.
    """
    if text == "unstructured":
        return Pattern(text)
    if text == "single":
        raise RecipeError("the pattern of single weights is called 'unstructured', not 'single'")
    if text == "rows":
        return Pattern(text, 1, 0)
    if text == "columns":
        return Pattern(text, 0, 1)
    if isinstance(text, str) and (found := _N_OF_M.fullmatch(text)):
        keep, of = int(found[1]), int(found[2])
        if not 0 < keep < of:
            raise RecipeError(
                f"pattern {text!r} keeps {keep} of {of} weights: write n:m with 0 < n < m, as 2:4"
            )
        return Pattern(text, 1, 1, keep, of)
    if isinstance(text, str) and (found := _BLOCK.fullmatch(text)):
        height, width = int(found[1]), int(found[2])
        if height and width:
            return Pattern(text, height, width)
    raise RecipeError(
        f"there is no pattern {text!r}: write 'unstructured', 'n:m' (keeps n of m, as 2:4), "
        "'OUTxIN' blocks (as 32x4), 'rows' or 'columns'"
    )


def removed_mask(scores: Tensor, sparsity: float, pattern: Pattern, per_row: bool) -> Tensor:
    """The weights to remove: the lowest scores under a pattern; bool [out, in].

    Args:
        scores: [out, in], 0 or more, higher is more important.
        sparsity: fraction of the units to remove; an n:m pattern has its own.
        pattern: what goes together; it must fit the shape.
        per_row: choose the same number in every row of units, instead of over the whole matrix;
            not where a row is one unit, which leaves nothing to choose.
    """
    rows, columns = scores.shape
    if pattern.of:
        return lowest(scores.reshape(-1, pattern.of), pattern.of - pattern.keep).reshape(
            rows, columns
        )
    units = pattern.units(scores)
    table = units if per_row and units.shape[1] > 1 else units.reshape(1, -1)
    gone = lowest(table, removed_count(sparsity, table.shape[1]))
    return pattern.spread(gone.reshape(units.shape), rows, columns)


def removed_count(sparsity: float, size: int) -> int:
    """How many of `size` units go: at least one stays."""
    return min(math.floor(sparsity * size + 0.5), size - 1)


def lowest(scores: Tensor, count: int) -> Tensor:
    """The `count` lowest of each row of scores, of equal ones the first; bool, same shape."""
    gone = torch.zeros(scores.shape, dtype=torch.bool)
    order = torch.argsort(scores, dim=1, stable=True)
    return gone.scatter_(1, order[:, :count], True)
