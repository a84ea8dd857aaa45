"""Which axis groups a pass works on: by role, by id, and by the names of the tensors they reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from graphprune.axes import AxisGroup, AxisGroups, frozen_parameters
from graphprune.errors import UnsupportedError
from graphprune.ir.program import Program
from graphprune.passes.name_patterns import TensorNames, matches, refuse_unmatched


@dataclass(frozen=True, slots=True)
class Selector:
    """Conditions on axis groups; all must hold.

    Attributes:
        roles: roles of the groups; empty takes every role.
        groups: patterns of group ids; empty takes every id.
        targets: patterns of tensor names, of which a group must reach one; empty takes all.
        ignore: patterns of tensor names, of which a group must reach none.
        normalized: whether to take groups whose statistics a normalization computes.
    """

    roles: tuple[str, ...]
    groups: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    normalized: bool = False


@dataclass(frozen=True, slots=True)
class Selection:
    """Groups to work on, and those left out with the reason in words."""

    groups: tuple[AxisGroup, ...]
    skipped: tuple[tuple[AxisGroup, str], ...]


def select(program: Program, groups: AxisGroups, wanted: Selector) -> Selection:
    """The groups that a selector takes and that can be cut.

    Of several groups of one role that are factors of one dimension, 16 = 4 × 4 channels, one is
    taken, so that a ratio is a fraction of the dimension: the one with the most units, for counts
    that come nearest to the ratio, and of equal ones the outer one. Groups named by id are all
    taken.

    Raises:
        RecipeError: a pattern of targets, ignore or groups matches nothing.
        UnsupportedError: nothing has the role, or all that was asked for is frozen or normalized;
            the reason is named.
    """
    chosen = _by_role_and_id(groups, wanted)
    names = TensorNames(program)
    refuse_unmatched("targets", wanted.targets, names.all())
    refuse_unmatched("ignore", wanted.ignore, names.all())
    if wanted.targets:
        chosen = [g for g in chosen if _reaches(names, g, wanted.targets)]
    if not chosen:
        raise UnsupportedError(
            f"{_asked(wanted)} reaches no tensor that matches {list(wanted.targets)}; "
            f"{_overview(groups)}"
        )
    usable: list[AxisGroup] = []
    skipped: list[tuple[AxisGroup, str]] = []
    refused: list[tuple[AxisGroup, str]] = []
    for group in chosen:
        if _reaches(names, group, wanted.ignore):
            skipped.append((group, "ignored on request"))
        elif reason := _obstacle(group, wanted):
            refused.append((group, reason))
        else:
            usable.append(group)
    if refused and not usable:
        raise UnsupportedError(_refusal(refused, wanted))
    if not wanted.groups:
        beside = _second_factors(groups, usable)
        usable = [g for g in usable if g.id not in beside]
        refused += [(groups[name], reason) for name, reason in beside.items()]
    return Selection(tuple(usable), (*skipped, *refused))


def _second_factors(groups: AxisGroups, usable: Sequence[AxisGroup]) -> dict[str, str]:
    """Groups whose channels lose another factor already, with the reason in words."""
    taken: dict[str, str] = {}  # factor of some channels -> the one of them that is cut
    beside: dict[str, str] = {}
    # A stable sort leaves the outer one of equal factors first.
    for group in sorted(usable, key=lambda g: -g.size):
        channels = groups.channels(group)
        if group.id in taken:
            shared = next(c for c in channels if taken[group.id] in c.factors)
            sizes = " × ".join(str(groups[factor].size) for factor in shared.factors)
            beside[group.id] = (
                f"it is a factor of {shared.size} = {sizes} channels; {taken[group.id]!r} is the "
                "one that the ratio is taken from; name this one in prune-axis's groups to cut it"
            )
            continue
        for factor in (factor for c in channels for factor in c.factors):
            taken.setdefault(factor, group.id)
    return beside


def _by_role_and_id(groups: AxisGroups, wanted: Selector) -> list[AxisGroup]:
    chosen = [g for g in groups if not wanted.roles or g.role in wanted.roles]
    if not chosen:
        raise UnsupportedError(
            f"there is no {_asked(wanted)} in this model; {_overview(groups)}; prune-axis cuts any "
            "role"
        )
    refuse_unmatched("groups", wanted.groups, [g.id for g in groups], _matches_id)
    if wanted.groups:
        chosen = [g for g in chosen if any(_matches_id(p, g.id) for p in wanted.groups)]
    if not chosen:
        raise UnsupportedError(
            f"no {_asked(wanted)} has an id that matches {list(wanted.groups)}; {_overview(groups)}"
        )
    return chosen


def _matches_id(pattern: str, group_id: str) -> bool:
    # Ids hold brackets, which a glob would read as a character class.
    return pattern == group_id or matches(pattern.replace("[", "[[]"), group_id)


def _obstacle(group: AxisGroup, wanted: Selector) -> str:
    if group.frozen:
        reasons = "; ".join(group.frozen)
        # Reasons read "frozen by `topk` at layer.3" or "output of the model".
        return f"its axis is {reasons if reasons.startswith('frozen') else f'frozen: {reasons}'}"
    if group.normalized and not wanted.normalized:
        return "a normalization computes statistics over it, so that cutting it is not exact"
    if group.size < 2:
        return "it has a single unit"
    return ""


def _refusal(refused: Sequence[tuple[AxisGroup, str]], wanted: Selector) -> str:
    group, reason = refused[0]
    more = f" ({len(refused) - 1} other groups likewise)" if len(refused) > 1 else ""
    wayout = ""
    if any(g.normalized and not g.frozen for g, _ in refused):
        wayout = "; prune-axis does it with normalized=True"
    return f"cannot prune {_plural(group.role)} of {group.id!r}: {reason}{more}{wayout}"


def _reaches(names: TensorNames, group: AxisGroup, patterns: Sequence[str]) -> bool:
    return any(names.match(o.tensor, patterns) for o in group.occurrences)


def _asked(wanted: Selector) -> str:
    roles = " or ".join(role.replace("_", " ") for role in wanted.roles)
    return f"axis group with role {roles}" if roles else "axis group"


def _overview(groups: AxisGroups) -> str:
    """Describe what could be pruned instead: "free are neuron (6), residual (1)"."""
    counts = Counter(g.role for g in groups if not g.frozen)
    if not counts:
        why = [frozen.text for frozen in frozen_parameters(groups)[:1]]
        return ": ".join(["every axis of it is frozen", *why])
    return "free are " + ", ".join(f"{role} ({n})" for role, n in sorted(counts.items()))


_NO_PLURAL = {"pooled", "residual", "vocab", "other", "queries_per_group"}


def _plural(role: str) -> str:
    word = role.replace("_", " ")
    return word if role in _NO_PLURAL else f"{word}s"
