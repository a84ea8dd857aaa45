"""One operator call, as a rule and a rewriter see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.axes import algebra
from graphprune.axes.algebra import Axis, Size
from graphprune.axes.facts import Contraction, Dims, Facts, frozen_like, size_of
from graphprune.ir.graph import bound_arguments, location, op_name, place, set_bound


class RuleContext:
    """One operator call, for its rule."""

    def __init__(self, node: fx.Node, facts: Facts) -> None:
        self.node = node
        self.facts = facts
        self.arguments = bound_arguments(node)
        self.value = node.meta["val"]

    @property
    def op(self) -> str:
        """The base name of the operator."""
        return op_name(self.node)

    @property
    def where(self) -> str:
        """The place of this call, for reasons: operator and module path."""
        return place(self.node)

    def get(self, name: str, default: Any = None) -> Any:
        """An argument by its schema name."""
        return self.arguments.get(name, default)

    def dims(self, argument: Any) -> Dims:
        """The axes of a tensor argument; empty for scalars and None."""
        if not isinstance(argument, fx.Node):
            return ()
        found = self.facts.dims.get(argument, ())
        return found if isinstance(found, tuple) else ()

    def static(self, name: str, default: Any = None) -> Any:
        """An argument with every symbolic size replaced by its value in the metadata."""
        return resolve(self.get(name, default))

    def dim(self, rank: int, name: str = "dim", default: Any = None) -> int:
        """A dimension argument, made non-negative."""
        index = self.get(name, default)
        return int(index) % rank if rank else 0

    def dim_list(self, rank: int, name: str = "dim") -> list[int]:
        """A list of dimensions, made non-negative; None or empty means all."""
        given = self.get(name)
        if given is None or (isinstance(given, (list, tuple)) and not given):
            return list(range(rank))
        return [int(d) % rank for d in ([given] if isinstance(given, int) else given)]

    def unify(self, a: Axis, b: Axis) -> None:
        algebra.unify(a, b, self.where)

    def freeze(self, axes: Axis | Sequence[Axis], why: str = "") -> None:
        """Freeze axes, with this call as the reason."""
        for axis in [axes] if isinstance(axes, Axis) else axes:
            algebra.freeze(axis, f"{why or 'fixed by'} {self.where}")

    def is_frozen(self, axis: Axis) -> bool:
        """Whether the axis cannot lose units anyway, so that its structure need not be known."""
        parts = list(algebra.leaves(axis))
        return all(part.frozen for part in parts) or any(not isinstance(p.size, int) for p in parts)

    def fresh(self, index: int | None = None) -> Dims:
        """New leaves of the output's sizes (of output `index`, when there are several)."""
        value = self.value if index is None else self.value[index]
        return tuple(algebra.leaf(size_of(s)) for s in value.shape)

    def sizes(self, index: int | None = None) -> tuple[Size, ...]:
        """The sizes of the output."""
        value = self.value if index is None else self.value[index]
        return tuple(size_of(s) for s in value.shape)

    def broadcast(self, *operands: Dims, sizes: Sequence[Size] | None = None) -> Dims:
        """Align axes from the right and unify those of equal size; size-1 dimensions stay free."""
        wanted = self.sizes() if sizes is None else sizes
        result: list[Axis] = []
        for i, size in enumerate(reversed(wanted)):
            found: Axis | None = None
            for dims in operands:
                if i < len(dims):
                    axis = dims[len(dims) - 1 - i]
                    if algebra.equal(axis.size, size):
                        if found is None:
                            found = axis
                        elif size != 1:
                            self.unify(found, axis)
            result.append(found if found is not None else algebra.leaf(size))
        return tuple(reversed(result))

    def cut(self, axis: Axis, sizes: Sequence[Size]) -> list[Axis]:
        """Cut an axis in consecutive pieces of these sizes."""
        pieces = [algebra.leaf(s) for s in sizes]
        self.unify(axis, algebra.concat(pieces))
        return pieces

    def recut(self, axes: Sequence[Axis], sizes: Sequence[Size]) -> Dims:
        """The axes of a reshape; what lies between two common boundaries is cut for itself.

        Where a boundary inside cannot be placed, all that lies there is frozen.
        """
        result: list[Axis] = []
        for part, wanted in algebra.aligned(axes, sizes):
            cut = algebra.recut(part, wanted, self.where)
            if cut is None:
                reason = (
                    f"the reshape {[a.size for a in part]} -> {list(wanted)} cuts through an axis "
                    "at"
                )
                self.freeze(part, reason)
                cut = [algebra.leaf(s) for s in wanted]
                self.freeze(cut, reason)
            result += cut
        return tuple(result)

    def contract(self, slot: str, dim: int, other: str | None = None) -> None:
        """Record that dimension `dim` of argument `slot` is summed over here.

        Args:
            slot: schema name of the operand; "name:i" for the i-th of a list of tensors.
            dim: its dimension, non-negative.
            other: schema name of the operand it is contracted with; None for a reduction.
        """
        operand = self.operand(slot)
        axis = self.dims(operand)[dim]
        kind = "reduction"
        if other is not None:
            both = {operand, self.operand(other)}
            kind = "weights" if both & self.facts.weights else "activations"
        self.facts.contractions.append(Contraction(self.node, operand, slot, dim, axis, kind))

    def operand(self, slot: str) -> fx.Node:
        name, _, index = slot.partition(":")
        value = self.get(name)
        node = value[int(index)] if index else value
        assert isinstance(node, fx.Node)
        return node

    def remember(self, **axes: Axis) -> None:
        """Keep axes for this call's rewriter."""
        self.facts.extra.setdefault(self.node, {}).update(axes)

    def attention(self, role: str, axis: Axis) -> None:
        """Record the part an axis plays in attention: "head", "qk_dim" or "v_dim"."""
        self.facts.attention.append((self.node, role, axis))

    def unknown(self) -> Any:
        """Freeze all that this call touches: the answer for an operator without a rule."""
        name = op_name(self.node)
        for node in self.node.all_input_nodes:
            for dims in _flat(self.facts.dims.get(node, ())):
                for axis in dims:
                    algebra.freeze(axis, f"no rule for {name!r} at {location(self.node)}")
        outputs = frozen_like(
            self.value, f"made by {name!r}, which has no rule, at {location(self.node)}"
        )
        return outputs


class RewriteContext:
    """One operator call, for its rewriter, after axes shrank.

    Sizes come from the axes of the call's output, never from looking for equal numbers.
    """

    def __init__(
        self, node: fx.Node, facts: Facts, keep: dict[Axis, Tensor], symbols: Callable[[Size], Any]
    ) -> None:
        self.node = node
        self.facts = facts
        self.keep = keep
        self._symbols = symbols
        self.arguments = bound_arguments(node)

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)

    def dims(self, node: Any) -> Dims:
        found = self.facts.dims.get(node, ()) if isinstance(node, fx.Node) else ()
        return found if isinstance(found, tuple) else ()

    @property
    def output(self) -> Any:
        return self.facts.dims.get(self.node, ())

    def extra(self, name: str) -> Axis | None:
        return self.facts.extra.get(self.node, {}).get(name)

    def changed(self, axis: Axis | None) -> bool:
        """Whether the axis lost units."""
        return axis is not None and any(a in self.keep for a in algebra.leaves(axis))

    def size(self, axis: Axis) -> Any:
        """The new size as an int, or as a graph node when it depends on the inputs."""
        return self._symbols(algebra.new_size(axis, self.keep))

    def static_size(self, axis: Axis) -> int:
        """The new size of an axis that no input size enters."""
        return int(algebra.new_size(axis, self.keep))

    def resize(self, sizes: Sequence[Any], dims: Sequence[Axis]) -> list[Any]:
        """Size arguments with those of shrunk axes replaced."""
        return [
            self.size(a) if self.changed(a) and s != 1 else s
            for s, a in zip(sizes, dims, strict=True)
        ]

    def set(self, **arguments: Any) -> None:
        """Replace arguments by their schema names."""
        set_bound(self.node, arguments)

    def scale_after(self, factor: float) -> None:
        """Multiply the result by a number, to pin what was derived from the old size.

        The product takes over the call's name and axes: it is what the call computed before.
        """
        graph, name = self.node.graph, self.node.name
        with graph.inserting_after(self.node):
            scaled = graph.call_function(torch.ops.aten.mul.Tensor, (self.node, factor))
        scaled.meta = dict(self.node.meta)
        self.node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        self.node.name, scaled.name = scaled.name, name
        self.facts.dims[scaled] = self.facts.dims[self.node]


def resolve(value: Any) -> Any:
    """Graph nodes inside an argument replaced by their symbolic values."""
    return torch.utils._pytree.tree_map(
        lambda v: v.meta["val"] if isinstance(v, fx.Node) else v, value
    )


def _flat(dims: Any) -> list[Dims]:
    return [dims] if isinstance(dims, tuple) else [d for part in dims for d in _flat(part)]
