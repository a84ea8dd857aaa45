"""Removed units, as the history of a program records them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graphprune.ir.program import JSON


def kept_indices(history: Sequence[JSON]) -> dict[str, list[int]]:
    """For each axis that was cut: which of its original indices are left.

    An axis whose units were put in another order is not among them: each head may have kept others.
    """
    kept: dict[str, list[int]] = {}
    lost: set[str] = set()
    for cut, rearranged in removals(history):
        lost |= rearranged
        for name, indices in cut.items():
            before = kept.get(name)
            kept[name] = indices if before is None else [before[i] for i in indices]
    return {name: indices for name, indices in kept.items() if name not in lost}


def removals(history: Sequence[JSON]) -> Iterator[tuple[dict[str, list[int]], set[str]]]:
    """Yield removals, oldest first: axis group -> units that stay, and groups put in order.

    The units of those were in another order by then, the removed ones last: a line "rearranged" of
    the history, before the line "removed", says which they are.
    """
    rearranged: set[str] = set()
    for record in history:
        rearranged |= set(record.get("rearranged", ()))
        if "removed" in record:
            yield {name: list(cut["kept"]) for name, cut in record["removed"].items()}, rearranged
            rearranged = set()
        yield from removals(record.get("steps", ()))
