"""Records of a sensitivity analysis (`graphprune.passes.structural.sensitivity` makes them)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import final

from graphprune.pipeline.events import JSON


@final
@dataclass(frozen=True, slots=True)
class Cost:
    """One group cut alone.

    Attributes:
        group: its id.
        role: its role.
        size: units it has.
        kept: units that stayed.
        ratio: part that was asked to go.
        error: relative error of the model's outputs, |y' - y| / |y| over all calibration rows.
    """

    group: str
    role: str
    size: int
    kept: int
    ratio: float
    error: float


@final
@dataclass(frozen=True, slots=True)
class Time:
    """All groups of a role cut at one ratio, in ONNX Runtime, beside the dense model."""

    role: str
    ratio: float
    ms: float
    dense_ms: float


@final
@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Costs of all groups and times of all roles.

    Attributes:
        score: how units were chosen; `compensation` how the others made up for them.
        samples: calibration samples that the outputs were compared on.
        costs: one for every group and ratio, in execution order.
        times: one for every role and ratio; empty without a clock.
        skipped: group id -> why it could not be looked at.
    """

    score: str
    compensation: str
    samples: int
    costs: tuple[Cost, ...]
    times: tuple[Time, ...]
    skipped: Mapping[str, str]

    def to_json(self) -> dict[str, JSON]:
        """Plain data."""
        data: dict[str, JSON] = asdict(self)
        return {**data, "costs": list(data["costs"]), "times": list(data["times"])}

    @property
    def ratios(self) -> list[float]:
        """The ratios that were looked at, ascending."""
        return sorted({c.ratio for c in self.costs})
