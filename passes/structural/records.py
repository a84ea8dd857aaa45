"""Records of passes that remove units; `to_json` makes the report of a PassResult."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from graphprune.axes import AxisGroup, AxisGroups
from graphprune.axes.frozen import Frozen
from graphprune.pipeline.events import JSON


@dataclass(frozen=True, slots=True)
class ChannelsCut:
    """A dimension that a cut group is a factor of: its id, its size before and after."""

    id: str
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class GroupCut:
    """A group that lost units: its id and role, units before and after, and its channels."""

    id: str
    role: str
    before: int
    after: int
    channels: tuple[ChannelsCut, ...]

    def to_json(self) -> dict[str, JSON]:
        """Plain data; channels only where there are some."""
        data = asdict(self)
        channels = list(data.pop("channels"))
        return {**data, "channels": channels} if channels else data


@dataclass(frozen=True, slots=True)
class Skipped:
    """A group that was left alone.

    Attributes:
        id: its id.
        role: its role.
        size: units it has.
        reason: why, in words.
        units: how many of them it is about; None for all.
    """

    id: str
    role: str
    size: int
    reason: str
    units: int | None = None

    @classmethod
    def of(cls, group: AxisGroup, reason: str, units: int | None = None) -> Skipped:
        """The record of a group."""
        return cls(group.id, group.role, group.size, reason, units)

    def to_json(self) -> dict[str, JSON]:
        """Plain data; units only where they are given."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Unread:
    """Input features that none of some weights reads.

    Attributes:
        read_by: names of the weights.
        features: how many they are.
        of: features there are.
    """

    read_by: list[str]
    features: int
    of: int


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Measurements on calibration batches.

    Attributes:
        output_error: group id -> Σ|ΔW x|² / Σ|W x|² of what reads it, after compensation.
        score_curves: group id -> scores in the order of removal, as fractions of the largest.
        warnings: sentences.
    """

    output_error: Mapping[str, float]
    score_curves: Mapping[str, list[float]]
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class Cuts:
    """The record of a StructuralPass.

    Attributes:
        groups: those that lost units.
        kept: group id -> indices of the units that stay.
        skipped: groups that the pass was to cut, and did not.
        frozen: what operators freeze.
        parameters_before: of the program given.
        parameters_after: of the program returned.
        calibrated: what calibration measured; None without it, or where nothing was cut.
        verification: as `Context.shrink` reports it; None where nothing was cut.
    """

    groups: tuple[GroupCut, ...]
    kept: Mapping[str, list[int]]
    skipped: tuple[Skipped, ...]
    frozen: tuple[Frozen, ...]
    parameters_before: int
    parameters_after: int
    calibrated: Calibrated | None = None
    verification: Mapping[str, JSON] | None = None

    def to_json(self) -> dict[str, JSON]:
        """The report of the pass."""
        data: dict[str, JSON] = {
            "groups": [group.to_json() for group in self.groups],
            "kept": dict(self.kept),
            "skipped": [skipped.to_json() for skipped in self.skipped],
            "frozen": [frozen.to_json() for frozen in self.frozen],
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
        }
        if self.calibrated is not None:
            data |= asdict(self.calibrated)
        if self.verification is not None:
            data["verification"] = dict(self.verification)
        return data


@dataclass(frozen=True, slots=True)
class Sublayer:
    """A residual branch, or a block of them.

    Attributes:
        id: of the branch, or of the block's first.
        branches: ids of all.
        kind: of the first.
        score: the lowest goes first; None where it was not scored.
    """

    id: str
    branches: tuple[str, ...]
    kind: str
    score: float | None

    def to_json(self) -> dict[str, JSON]:
        """Plain data."""
        return {**asdict(self), "branches": list(self.branches)}


@dataclass(frozen=True, slots=True)
class DroppedSublayers:
    """The record of DropSublayers.

    Attributes:
        dropped: in the order of removal.
        left: those that could have gone.
        skipped: id -> why it was left alone.
        summary: a line in words.
        parameters_before: of the program given.
        parameters_after: of the program returned.
        verification: as `Context.drop` reports it; None where nothing was dropped.
    """

    dropped: tuple[Sublayer, ...]
    left: tuple[Sublayer, ...]
    skipped: Mapping[str, str]
    summary: str
    parameters_before: int
    parameters_after: int
    verification: Mapping[str, JSON] | None = None

    def to_json(self) -> dict[str, JSON]:
        """The report of the pass."""
        data: dict[str, JSON] = {
            "summary": self.summary,
            # As other passes that drop branches report them.
            "dropped": [name for sublayer in self.dropped for name in sublayer.branches],
            "sublayers": [sublayer.to_json() for sublayer in self.dropped],
            "left": [sublayer.to_json() for sublayer in self.left],
            "skipped": dict(self.skipped),
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
        }
        if self.verification is not None:
            data["verification"] = dict(self.verification)
        return data


def group_cuts(groups: AxisGroups, cut: Mapping[str, Tensor]) -> tuple[GroupCut, ...]:
    """The records of cut groups, in the order of `cut`: group id -> units that stay."""

    def after(name: str) -> int:
        return len(cut[name]) if name in cut else groups[name].size

    def of(group: AxisGroup) -> GroupCut:
        channels = tuple(
            ChannelsCut(c.id, c.size, math.prod(map(after, c.factors)))
            for c in groups.channels(group)
        )
        return GroupCut(group.id, group.role, group.size, after(group.id), channels)

    return tuple(of(groups[name]) for name in cut)
