"""Records of zeroed matrices, and the JSON that a pass reports of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import final

from graphprune.ir.program import JSON


@final
@dataclass(frozen=True, slots=True)
class MatrixSparsity:
    """The record of one zeroed matrix.

    Attributes:
        name: of the site.
        shape: outputs and inputs.
        sparsity: fraction of its weights that is zero.
        pattern: what was zeroed together.
        seconds: for this matrix alone.
        error: relative squared error of its output on the calibration rows; None without any.
        error_masked: the same, had the kept weights stayed as they were.
        block_errors: of the block that it is part of, round after round; empty where it is in none.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    pattern: str
    seconds: float
    error: float | None = None
    error_masked: float | None = None
    block_errors: tuple[float, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def to_json(self) -> dict[str, JSON]:
        found: dict[str, JSON] = {
            "name": self.name,
            "shape": list(self.shape),
            "sparsity": self.sparsity,
            "pattern": self.pattern,
        }
        if self.error is not None:
            found |= {"error": self.error, "error_masked": self.error_masked}
        if self.block_errors:
            errors = list(self.block_errors)
            found |= {"block_errors": errors, "round": errors.index(min(errors))}
        return {**found, "seconds": self.seconds}


@final
@dataclass(frozen=True, slots=True)
class MatrixFit:
    """How one matrix was fitted to the dense model's.

    Attributes:
        name: of the site.
        shape: outputs and inputs.
        error_before, error: relative squared error of its output on the calibration rows.
        fitted: whether it was taken; else the weight is as it was.
        steps: of conjugate gradients; 0 by Cholesky.
        seconds: its own, and its share of those that went into running the models.
    """

    name: str
    shape: tuple[int, ...]
    error_before: float
    error: float
    fitted: bool
    steps: int
    seconds: float = 0.0

    def to_json(self) -> dict[str, JSON]:
        return {**asdict(self), "shape": list(self.shape)}


@final
@dataclass(frozen=True, slots=True)
class ZeroingReport:
    """The record of a pass that zeroes weights.

    Attributes:
        matrices: in the order in which they were pruned.
        skipped: name -> why a matrix was left alone.
        warnings: sentences.
        calibration_rows: rows that a matrix saw at most, padding left out.
        parameters_before, parameters_after: of the whole model.
        seconds: of each stage; empty where there was one only.
    """

    matrices: Sequence[MatrixSparsity]
    skipped: Mapping[str, str]
    warnings: Sequence[str]
    calibration_rows: int
    parameters_before: int
    parameters_after: int
    seconds: Mapping[str, float]

    def to_json(self) -> dict[str, JSON]:
        total = sum(m.size for m in self.matrices)
        fraction = sum(m.sparsity * m.size for m in self.matrices) / max(total, 1)
        found: dict[str, JSON] = {
            "summary": f"{fraction:.1%} of {total:,} weights in {len(self.matrices)} matrices",
            "sparsity": fraction,
            "sites": [matrix.to_json() for matrix in self.matrices],
            "skipped": skipped_json(self.skipped),
            "warnings": list(self.warnings),
            "calibration_rows": self.calibration_rows,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
        }
        return {**found, "seconds": dict(self.seconds)} if self.seconds else found


def skipped_json(skipped: Mapping[str, str]) -> list[dict[str, JSON]]:
    """Why matrices were left alone, as the reports of these passes list it."""
    return [{"name": name, "reason": reason} for name, reason in skipped.items()]
