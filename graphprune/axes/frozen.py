"""Frozen axes that cost: what a smaller model cannot lose because an operator has no rule for it.

Axes that every model keeps are left out: its inputs and outputs, tables and the sides of kernels,
what a normalization computes statistics over, and a factor of a dimension beside which another one
can go, as the 3 of a fused query, key and value is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from graphprune.axes import algebra
from graphprune.axes.algebra import Axis
from graphprune.axes.groups import AxisGroup, AxisGroups
from graphprune.axes.roles import between_weights

_REAL = 0.005  # of all parameters; less is not worth a line
_INTERFACE = ("input ", "output of the model")
_KEPT_ROLES = ("vocab", "expert")
_NO_RULE = re.compile(r"no rule for '(?P<op>\w+)'|made by '(?P<maker>\w+)', which has no rule")
_CALL = re.compile(r"`(?P<op>\w+)` at .*$")


@dataclass(frozen=True, slots=True)
class Frozen:
    """The axes that one operator freezes, for one reason.

    Attributes:
        op: the operator.
        reason: why, with the operator and without the place.
        groups: ids of the axis groups.
        parameters: parameters of the program in slices along these groups, each counted once.
        share: their fraction of all parameters.
        text: all of it as a sentence.
    """

    op: str
    reason: str
    groups: tuple[str, ...]
    parameters: int
    share: float
    text: str

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON."""
        return {**asdict(self), "groups": list(self.groups)}


def frozen_parameters(groups: AxisGroups) -> list[Frozen]:
    """Find the axes between weights that operators freeze, the most parameters first.

    Only what holds a relevant fraction of the program's parameters.
    """
    candidates = [group for group in groups if _could_go(groups, group)]
    if not candidates:
        return []
    hidden = between_weights(groups.axes)
    found: dict[tuple[str, str], list[AxisGroup]] = {}
    for group in candidates:
        if cause := _cause(group, hidden):
            found.setdefault(cause, []).append(group)
    result = [_summed(groups, *cause, some, hidden) for cause, some in found.items()]
    real = [frozen for frozen in result if frozen.share >= _REAL]
    return sorted(real, key=lambda frozen: -frozen.parameters)


def _could_go(groups: AxisGroups, group: AxisGroup) -> bool:
    """Whether only operators inside the model freeze a group."""
    if not group.frozen or group.normalized or group.role in _KEPT_ROLES:
        return False
    outside = any(reason.startswith(_INTERFACE) for reason in group.frozen)
    return not outside and not _beside_free(groups, group)


def _cause(group: AxisGroup, hidden: set[Axis]) -> tuple[str, str] | None:
    """(operator, reason); None where the group is of tables, kernels or positions."""
    for reason in group.frozen:
        if match := _NO_RULE.search(reason):
            op = match["op"] or match["maker"]
            return op, f"no rule for `{op}`"
    call = _CALL.search(group.frozen[0])
    if call is None or algebra.find(group.axis) not in hidden:
        return None
    return call["op"], _CALL.sub(f"`{call['op']}`", group.frozen[0])


def _beside_free(groups: AxisGroups, group: AxisGroup) -> bool:
    """Whether all dimensions of the group have another factor that is free."""
    leaf = algebra.find(group.axis)
    return all(
        any(not other.frozen for other in term if other is not leaf)
        for place in group.occurrences
        for term in algebra.terms(groups.axes.tensors[place.tensor][place.dim])
        if leaf in term
    )


def _summed(
    groups: AxisGroups, op: str, reason: str, some: Sequence[AxisGroup], hidden: set[Axis]
) -> Frozen:
    parameters = _parameters(groups, some)
    share = parameters / max(groups.program.num_parameters(), 1)
    what = _subject(groups, op, some, hidden)
    text = f"{what} ({100 * share:.1f} % of parameters) stay: {reason}"
    return Frozen(op, reason, tuple(g.id for g in some), parameters, share, text)


def _subject(groups: AxisGroups, op: str, some: Sequence[AxisGroup], hidden: set[Axis]) -> str:
    """The units in words, by where they are: "32 channels before and 8 after `pixel_shuffle`"."""
    counts: dict[str, int] = {}
    for group in some:
        if algebra.find(group.axis) in hidden:
            where = "at"
            if any(_NO_RULE.search(reason) for reason in group.frozen):
                made = any(reason.startswith("made by") for reason in group.frozen)
                where = "after" if made else "before"
            counts[where] = counts.get(where, 0) + group.size
    if not counts:
        return f"weights of `{op}`"
    tensors = [groups.program.tensors[name] for group in some for name in group.tensors]
    unit = "channels" if any(tensor.dim() > 2 for tensor in tensors) else "units"
    places = [f"{n:,} {unit} {where}" for where, n in counts.items()]
    return f"{' and '.join([places[0], *(p.replace(f' {unit}', '') for p in places[1:])])} `{op}`"


def _parameters(groups: AxisGroups, some: Sequence[AxisGroup]) -> int:
    """Parameters in slices along some of the groups, each counted once."""
    frozen = [algebra.find(group.axis) for group in some]
    total = 0
    for name in groups.program.parameters:
        size = rest = groups.program.tensors[name].numel()
        for axis in groups.axes.tensors[name]:
            inside = set(algebra.leaves(axis))
            labels = [algebra.unit_labels(axis, leaf) for leaf in frozen if leaf in inside]
            if labels:
                free = int((torch.stack(labels) < 0).all(0).sum())
                rest = rest // int(axis.size) * free
        total += size - rest
    return total
