"""Which weights go together (single ones, n of m, blocks, rows, columns), and the lowest of them.

Scores are of a matrix [out, in]: rows are output units, columns input features. Counting is the
same everywhere: of n units, floor(sparsity · n + 0.5) go, the lowest scores first, exactly so many
whatever the ties; one at least stays.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

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

    def obstacle(self, rows: int, columns: int) -> str:
        """Why a matrix of this shape cannot take the pattern; empty where it can."""
        if self.of and columns % self.of:
            return f"its {columns} inputs are no multiple of {self.of}"
        if self.height and rows % self.height:
            return f"its {rows} outputs are no multiple of {self.height}"
        if self.width and columns % self.width:
            return f"its {columns} inputs are no multiple of {self.width}"
        return ""

    def units(self, scores: Tensor) -> Tensor:
        """Scores of the units that go together: sums over blocks, [out / height, in / width]."""
        rows, columns = scores.shape
        height, width = self.height or rows, self.width or columns
        return scores.reshape(rows // height, height, columns // width, width).sum((1, 3))

    def spread(self, units: Tensor, rows: int, columns: int) -> Tensor:
        """A value a unit as a value a weight, [out, in]."""
        height, width = self.height or rows, self.width or columns
        return units.repeat_interleave(height, 0).repeat_interleave(width, 1)


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
        scores: [out, in], higher is more important.
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
