"""Statistics of activations as small accumulators: streamed in float64, merged by addition."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@dataclass(slots=True)
class Gram:
    """Second moments of rows x [n, in]: the sum of x xᵀ, the sum of x, and how many.

    Everything that least squares, OBS, FLAP and Wanda need of a layer's inputs is in it. Two are
    merged by adding, so calibration can be spread over processes.

    Attributes:
        matrix: Σ x xᵀ, float64 [in, in].
        total: Σ x, float64 [in].
        count: number of rows.
        held: the same of those of the rows that a fit is to be evaluated on; None for none.
    """

    matrix: Tensor
    total: Tensor
    count: int = 0
    held: Gram | None = None

    @staticmethod
    def empty(features: int) -> Gram:
        """Nothing seen yet, for rows of this many features."""
        return Gram(
            torch.zeros(features, features, dtype=torch.float64),
            torch.zeros(features, dtype=torch.float64),
        )

    def add(self, rows: Tensor) -> None:
        """Add rows, [n, in] of any float type."""
        # One batch's product in float32 is exact enough; the sum over batches is not.
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.matrix += wide.T @ wide
        self.total += wide.sum(0, dtype=torch.float64)
        self.count += len(rows)

    def __add__(self, other: Gram) -> Gram:
        parts = [part.held for part in (self, other) if part.held is not None]
        held = parts[0] + parts[1] if len(parts) == 2 else next(iter(parts), None)
        return Gram(
            self.matrix + other.matrix, self.total + other.total, self.count + other.count, held
        )

    @property
    def mean(self) -> Tensor:
        """Mean of each feature, float64 [in]."""
        return self.total / max(self.count, 1)

    @property
    def variance(self) -> Tensor:
        """Variance of each feature (population), float64 [in]."""
        return (self.matrix.diagonal() / max(self.count, 1) - self.mean.square()).clamp_min(0)

    @property
    def norm(self) -> Tensor:
        """L2 norm of each feature over all rows, float64 [in]."""
        return self.matrix.diagonal().sqrt()

    def shortage(self) -> str:
        """A remark where fewer rows were seen than there are features; empty else, or of none."""
        if not 0 < self.count < len(self.total):
            return ""
        return (
            f"{self.count} calibration rows for {len(self.total)} features; "
            "more batches would do better"
        )

    def with_ones(self) -> Tensor:
        """The Gram matrix of rows with a constant one appended, float64 [in + 1, in + 1]."""
        top = torch.cat([self.matrix, self.total[:, None]], 1)
        last = torch.cat([self.total, torch.tensor([float(self.count)], dtype=torch.float64)])
        return torch.cat([top, last[None]], 0)


@final
class Remarks:
    """Remarks about sites; one that fits several is logged once."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}
        self._short: dict[str, tuple[float, str]] = {}

    def add(self, name: str, remark: str) -> None:
        """Add a remark about a site; an empty one is ignored."""
        if remark:
            self._names.setdefault(remark, []).append(name)

    def add_shortage(self, name: str, gram: Gram) -> None:
        """Add the remark that a site has seen few rows; the shortest stands for all of them."""
        if remark := gram.shortage():
            self._short[name] = gram.count / len(gram.total), remark

    def warn(self, log: logging.Logger) -> list[str]:
        """Log one sentence for each remark, which names the first site and counts the others."""
        found = []
        every = dict(self._names)
        if self._short:
            first = min(self._short, key=lambda name: self._short[name][0])
            others = [name for name in self._short if name != first]
            every[self._short[first][1]] = [first, *others]
        for remark, names in every.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            found.append(f"{names[0]}{more}: {remark}")
            log.warning("%s", found[-1])
        return found
