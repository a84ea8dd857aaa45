"""Memory that values of a graph share: what a write through one of them means for the others.

part = x[:, :2]; part.add_(1)       x     is read as   slice_scatter(x, part + 1, 1, 0, 2)
flat = x.view(-1); x.mul_(2)        flat  is read as   view(x * 2, -1)
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from graphprune.errors import CaptureError
from graphprune.ir.graph import bound_arguments, op_name

_aten = torch.ops.aten
# Views whose write-back is an operator of its own.
_SCATTER = {"slice": "slice_scatter", "select": "select_scatter", "diagonal": "diagonal_scatter"}
# Views that are undone by the same call.
_INVOLUTIONS = {"transpose", "swapaxes", "swapdims", "t", "numpy_T", "mT", "mH", "adjoint"}
# The same elements in the same order; or all of what they are given, where the shape is the same.
_RESHAPES = {
    "view", "reshape", "_unsafe_view", "flatten", "ravel", "unflatten", "unsqueeze", "squeeze",
    "view_as", "reshape_as", "atleast_1d", "atleast_2d", "atleast_3d",
}  # fmt: skip
_DROPOUT = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
_SAME = _DROPOUT | {
    "alias", "detach", "contiguous", "to", "type_as", "positive", "real", "resolve_conj",
    "resolve_neg", "expand", "broadcast_to", "expand_as",
}  # fmt: skip
# Operators that cut a value in pieces, and the dimension where that is no argument.
_PIECES = {
    "split": 0, "split_with_sizes": 0, "chunk": 0, "unsafe_split": 0, "unsafe_split_with_sizes": 0,
    "unsafe_chunk": 0, "tensor_split": 0, "hsplit": 1, "vsplit": 0, "dsplit": 2,
}  # fmt: skip

# What a value is read as: a node, or why there is none.
_Held = fx.Node | CaptureError


class Memory:
    """The content of each value of a graph, at the current place of a walk over the graph.

    Which values share memory is read off the fake tensors that torch.export traced with: it is what
    happened, also where an operator copies for some strides only.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._place = next(iter(graph.nodes))
        self._base: dict[fx.Node, fx.Node] = {}  # a view -> what it was made of
        self._call: dict[fx.Node, tuple[Any, Any]] = {}  # a view -> its arguments as traced
        self._same: dict[fx.Node, fx.Node] = {}  # an in-place call -> what it wrote to
        self._held: dict[fx.Node, _Held] = {}
        self._seen: dict[fx.Node, _Held] = {}  # a view -> the base of which it holds a part

    def enter(self, node: fx.Node) -> None:
        """Go on to a node, the next one: it reads what its arguments hold there.

        Raises:
            CaptureError: one of them was written to through a view that cannot be followed back.
        """
        self._place = node
        base = self._view_of(node)
        if base is not None:
            self._base[node], self._call[node] = base, (node.args, node.kwargs)
            self._seen[node] = self._now(base)
        node.args, node.kwargs = self._resolved((node.args, node.kwargs))

    def is_shared(self, node: fx.Node) -> bool:
        """Whether a value is a view, or another one is a view of it."""
        node = self._own(node)
        return node in self._base or any(self._own(b) is node for b in self._base.values())

    def root(self, node: fx.Node) -> fx.Node:
        """The value whose memory a value is a part of."""
        node = self._same.get(node, node)
        while node in self._base:
            node = self._own(self._base[node])
        return node

    def write(self, call: fx.Node, target: fx.Node, new: fx.Node) -> None:
        """Record an in-place call: its target holds `new`, and so do all that see it.

        Raises:
            CaptureError: the target holds some elements several times, which the call changes as
                often.
        """
        target = self._own(target)
        bound = bound_arguments(target) if op_name(target) == "unfold" else {"step": 0, "size": 0}
        if bound["step"] < bound["size"]:
            raise self._refusal(new, target, target)
        self._same[call] = target
        self._put(target, new)

    def _own(self, node: fx.Node) -> fx.Node:
        """A value itself, for what an in-place call returned."""
        return self._same.get(node, node)

    def _resolved(self, arguments: Any) -> Any:
        return fx.node.map_arg(arguments, self._read)

    def _read(self, node: fx.Node) -> fx.Node:
        now = self._now(node)
        if isinstance(now, CaptureError):
            raise now
        return now

    def _now(self, node: fx.Node) -> _Held:
        """The node that holds a value here; a view of what has changed since is recomputed."""
        node = self._own(node)
        held = self._held.get(node, node)
        if node not in self._base:
            return held
        base = self._now(self._base[node])
        if base is self._seen[node]:
            return held
        made: _Held = base
        if isinstance(base, fx.Node):
            args, kwargs = self._resolved(self._call[node])
            made = self._made(node.target, args, dict(node.meta), kwargs)
        self._held[node], self._seen[node] = made, base
        return made

    def _put(self, node: fx.Node, new: _Held) -> None:
        """A value holds something new: so does what it is a view of."""
        if node in self._base:
            view, base = node, self._own(self._base[node])
            if op_name(node) == "getitem":
                view, base = base, self._own(self._base[base])
            old = self._now(base)
            whole = new if isinstance(new, CaptureError) else self._put_back(node, view, old, new)
            self._put(base, whole)
            self._seen[node] = self._now(self._base[node])
        self._held[node] = new

    def _put_back(self, node: fx.Node, view: fx.Node, old: _Held, new: fx.Node) -> _Held:
        """The old base with a view of it, or one piece of those that the view cuts, replaced."""
        if isinstance(old, CaptureError):
            return old
        piece = self._piece(node, view, old, new) if node is not view else None
        made = piece or self._inverse(view, old, new)
        if made is not None:
            return made
        return self._refusal(new, node, view)

    def _refusal(self, new: fx.Node, node: fx.Node, view: fx.Node) -> CaptureError:
        return CaptureError(
            f"{new.name!r} writes through {node.name!r} ({op_name(view)}), which has no functional "
            "form; rewrite that line of the model without the in-place operator"
        )

    def _piece(self, node: fx.Node, cut: fx.Node, old: fx.Node, new: fx.Node) -> fx.Node | None:
        number, bound, meta = node.args[1], bound_arguments(cut), dict(old.meta)
        rank = old.meta["val"].dim()
        if op_name(cut) == "unbind":
            return self._made(
                _aten.select_scatter.default, (old, new, bound.get("dim", 0), number), meta
            )
        if op_name(cut) not in _PIECES:
            return None
        dim = bound.get("dim", min(_PIECES[op_name(cut)], rank - 1))
        now = self._read(cut)
        values = now.meta["val"]
        pieces = [
            new if i == number else self._made(operator.getitem, (now, i), {"val": value})
            for i, value in enumerate(values)
        ]
        return self._made(_aten.cat.default, (pieces, dim), meta)

    def _inverse(self, view: fx.Node, old: fx.Node, new: fx.Node) -> fx.Node | None:
        """The value that has `new` where the view of it is, and is like the old one elsewhere."""
        name, bound, meta = op_name(view), bound_arguments(view), dict(old.meta)
        before, after = old.meta["val"], view.meta["val"]
        rest = [value for key, value in bound.items() if key != "self"]
        if not isinstance(after, Tensor) or before.dtype is not after.dtype:
            return None
        if name in _SCATTER:
            target = getattr(_aten, _SCATTER[name]).default
            return self._made(target, (old, new, *rest), meta)
        if name == "narrow" and not isinstance(bound["start"], fx.Node | Tensor):
            end = self._end(bound["start"], bound["length"])
            args = (old, new, bound["dim"], bound["start"], end)
            return self._made(_aten.slice_scatter.default, args, meta)
        if name in _INVOLUTIONS:
            return self._made(view.target, (new, *rest), meta)
        if name == "permute":
            rank = before.dim()
            dims = [d % rank for d in bound["dims"]]
            return self._made(
                _aten.permute.default, (new, [dims.index(d) for d in range(rank)]), meta
            )
        if name in ("movedim", "moveaxis"):
            return self._made(view.target, (new, bound["destination"], bound["source"]), meta)
        if name == "unfold":
            return self._unfolded(bound, old, new)
        if name in _SAME | _RESHAPES and _sizes(before) == _sizes(after):
            return new
        if name in _RESHAPES:
            return self._made(_aten.reshape.default, (new, self._shape(old)), meta)
        return None

    def _unfolded(self, bound: dict[str, Any], old: fx.Node, new: fx.Node) -> fx.Node | None:
        """Windows that touch each other and do not overlap, put back from the first one on."""
        dim, size = bound["dimension"] % max(old.meta["val"].dim(), 1), bound["size"]
        if size != bound["step"] or not old.meta["val"].dim():
            return None
        beside = self._made(_aten.movedim.int, (new, -1, dim + 1), {})
        flat = self._made(_aten.flatten.using_ints, (beside, dim, dim + 1), {})
        count = self._size(new, dim)
        end = (
            self._made(operator.mul, (count, size), {})
            if isinstance(count, fx.Node)
            else count * size
        )
        args = (old, flat, dim, 0, end)
        return self._made(_aten.slice_scatter.default, args, dict(old.meta))

    def _end(self, start: Any, length: Any) -> Any:
        if isinstance(length, fx.Node):
            if start < 0:
                return self._made(operator.sub, (length, -start), {})
            return self._made(operator.add, (length, start), {}) if start else length
        return start + length if start >= 0 or start + length < 0 else sys.maxsize

    def _shape(self, node: fx.Node) -> list[Any]:
        return [self._size(node, d) for d in range(node.meta["val"].dim())]

    def _size(self, node: fx.Node, dim: int) -> Any:
        size = node.meta["val"].shape[dim]
        if not isinstance(size, torch.SymInt):
            return size
        return self._made(_aten.sym_size.int, (node, dim), {"val": size})

    def _made(
        self, target: Any, args: tuple[Any, ...], meta: dict[str, Any], kwargs: Any = None
    ) -> fx.Node:
        with self.graph.inserting_before(self._place):
            made = self.graph.call_function(target, args, kwargs)
        made.meta = meta
        return made

    def _view_of(self, node: fx.Node) -> fx.Node | None:
        """The operand that a value shares memory with; None for none."""
        if node.op != "call_function" or "val" not in node.meta or writes(node):
            return None
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node):
            if op_name(node) == "getitem":
                return first if first in self._base else None
            bound = bound_arguments(node) if op_name(node) in _DROPOUT else {}
            if bound and (not bound["train"] or bound["p"] == 0):
                return first  # traced as a copy; it is none
        mine = _storages(node.meta["val"])
        sharing = (n for n in node.all_input_nodes if _storages(n.meta.get("val")) & mine)
        return next(sharing, None)


def writes(node: fx.Node) -> bool:
    """Whether a call writes to an argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _storages(value: Any) -> set[int]:
    tensors = (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
    # A sparse tensor has no storage; it is refused later, by the operator that made it.
    return {t.untyped_storage()._cdata for t in tensors if t.layout is torch.strided}


def _sizes(value: Tensor) -> list[Any]:
    """Sizes that compare without a guess about symbols."""
    return [s.node.expr if isinstance(s, torch.SymInt) else s for s in value.shape]
