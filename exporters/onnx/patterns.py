"""Patterns around an attention in a graph: heads split, joined, repeated, or left alone.

All of it reads shapes from fresh metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.ir.graph import bound_arguments, is_op, value_of

_aten = torch.ops.aten


def heads_together(node: fx.Node) -> Callable[[], fx.Node] | None:
    """Undo a split into heads: a function that gives [batch, length, heads x width].

    None where [batch, heads, length, width] is not made by swapping the two middle dimensions.
    """
    if not _swaps_middle(node):
        return None
    apart = unchanged(_source(node))
    shape = value_of(apart).shape
    if is_op(apart, "view", "reshape", "unflatten"):
        joined = unchanged(_source(apart))
        old = value_of(joined).shape
        if len(old) == 3 and same(old[:2], shape[:2]):
            return lambda: joined
    return lambda: node.graph.call_function(_aten.flatten.using_ints, (apart, 2, 3))


def rejoined(split: fx.Node) -> list[fx.Node]:
    """Users that turn [batch, heads, length, width] into [batch, length, heads x width]."""
    batch, heads, length, width = value_of(split).shape
    found = []
    for user in _users(split):
        for last in _users(user) if _swaps_middle(user) else []:
            if is_op(last, "view", "reshape", "flatten", "_unsafe_view"):
                new = value_of(last).shape
                if len(new) == 3 and same(new, (batch, length, heads * width)):
                    found.append(last)
    return found


def _users(node: fx.Node) -> list[fx.Node]:
    """Users, and users of users that only repeat the node's values."""
    found: list[fx.Node] = []
    for user in node.users:
        found += [user, *(_users(user) if _repeats_input(user) else [])]
    return found


def _swaps_middle(node: fx.Node) -> bool:
    if not is_op(node, "transpose", "swapaxes", "permute") or "val" not in node.meta:
        return False
    if value_of(node).dim() != 4:
        return False
    a = list(bound_arguments(node).values())
    if is_op(node, "permute"):
        return [d % 4 for d in a[1]] == [0, 2, 1, 3]
    return sorted(d % 4 for d in a[1:3]) == [1, 2]


def unchanged(node: fx.Node) -> fx.Node:
    """The node whose values this one repeats."""
    while _repeats_input(node):
        node = _source(node)
    return node


_COPIES = ("contiguous", "clone", "alias", "detach", "dropout", "slice", "view", "reshape", "to")


def _repeats_input(node: fx.Node) -> bool:
    if not is_op(node, *_COPIES) or (is_op(node, "dropout") and bound_arguments(node)["train"]):
        return False
    new, old = node.meta.get("val"), _source(node).meta.get("val")
    if not isinstance(new, Tensor) or not isinstance(old, Tensor):
        return False
    return new.dtype is old.dtype and same(new.shape, old.shape)


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def same(a: Any, b: Any) -> bool:
    """Whether two shapes are the same, without a guard, which `==` on symbolic sizes would add."""
    return len(a) == len(b) and [expression(x) for x in a] == [expression(y) for y in b]


def expression(size: Any) -> Any:
    """A size as something to compare and hash: an integer, or sympy's expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def shared(key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Key and value before they are repeated for grouped queries, where both are."""
    k, v = _unrepeated(unchanged(key)), _unrepeated(unchanged(value))
    if k is not None and v is not None and value_of(k).shape[1] == value_of(v).shape[1]:
        return k, v
    return unchanged(key), unchanged(value)


def _unrepeated(node: fx.Node) -> fx.Node | None:
    """[batch, heads, ...] from [batch, heads x n, ...] whose neighbors are n copies of one."""
    if is_op(node, "repeat_interleave"):
        a = bound_arguments(node)
        if not isinstance(a.get("repeats"), int) or a.get("dim") not in (1, -3):
            return None
        old = unchanged(_source(node))
        return old if value_of(old).dim() == 4 else None
    if not is_op(node, "view", "reshape", "flatten"):
        return None
    expanded = unchanged(_source(node))
    lifted = unchanged(_source(expanded)) if is_op(expanded, "expand") else expanded
    if not is_op(lifted, "unsqueeze") or bound_arguments(lifted)["dim"] not in (2, -3):
        return None
    old = unchanged(_source(lifted))
    before, copies, after = (value_of(x).shape for x in (old, expanded, node))
    if len(before) != 4 or len(copies) != 5 or len(after) != 4:
        return None
    repeated = same((*before[:2], *before[2:]), (*copies[:2], *copies[3:]))
    joined = same(after, (before[0], before[1] * copies[2], *before[2:]))
    return old if repeated and joined else None
