"""Which rows of an activation are padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from torch import Tensor, fx

from graphprune.axes.algebra import equal
from graphprune.axes.facts import size_of
from graphprune.ir.graph import is_op
from graphprune.ir.program import Entry


def rows_without_padding(entry: Entry, flat: Sequence[Tensor]) -> Rows:
    """How to read the rows [n, features] of a node's value for one batch, padded ones left out."""
    placeholders = [n for n in entry.graph.nodes if n.op == "placeholder"]
    return Rows(placeholders, dict(zip(placeholders, flat, strict=True)))


@final
class Rows:
    """Which rows of an activation are padding, from the batch's own masks."""

    def __init__(self, placeholders: Sequence[fx.Node], state: Mapping[fx.Node, Any]) -> None:
        self.masks = {
            tuple(_sizes(node)): state[node].bool()
            for node in placeholders
            if _is_mask(node, state[node])
        }

    def __call__(self, node: fx.Node, value: Tensor) -> Tensor:
        """The rows [n, features] of a value, padded positions left out."""
        rows = value.reshape(-1, value.shape[-1])
        kept = self._kept(tuple(_sizes(node)[:-1]))
        return rows if kept is None else rows[kept.to(rows.device)]

    def kept_positions(self, node: fx.Node) -> Tensor | None:
        """Which positions of a value [n, channels, positions] are none of padding; None for all.

        Returns:
            bool [n · positions].
        """
        sizes = _sizes(node)
        return self._kept((sizes[0], sizes[2])) if len(sizes) == 3 else None

    def _kept(self, lead: tuple[Any, ...]) -> Tensor | None:
        """Which rows are none of padding, of a value with these sizes before its features.

        A mask belongs to a value by the symbols of its sizes: a decoder's length may happen to be
        the encoder's.
        """
        for (batch, length), mask in self.masks.items():
            if lead == (batch, length) or (len(lead) == 1 and equal(lead[0], batch * length)):
                return mask.reshape(-1)
            if lead == (length, batch):
                return mask.T.reshape(-1)
        return None


def _sizes(node: fx.Node) -> list[Any]:
    return [size_of(s) for s in node.meta["val"].shape]


def _is_mask(node: fx.Node, value: Tensor) -> bool:
    """Whether an input is a padding mask: zeros and ones that no table is indexed with."""
    if value.dim() != 2 or bool(((value != 0) & (value != 1)).any()):
        return False
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if is_op(user, "embedding", "gather", "index_select"):
            return False
        if is_op(user, "to", "clone", "contiguous", "detach", "alias"):
            stack += user.users
    return True
