"""Linear sites: every product of an activation with a weight, in one view whatever the storage.

Rows are output units, columns are input features: `linear`, `addmm` and `matmul` with a weight on
either side of a transpose, each expert of a grouped product, and each group of a convolution, whose
features are (channel, tap), all look the same. A depthwise convolution is none: it sums over no
channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.axes import AxisGroup, AxisGroups, algebra
from graphprune.axes.facts import Contraction
from graphprune.axes.windows import Window
from graphprune.ir.graph import bound_arguments, flat_outputs, is_op, op_name, weight_of
from graphprune.ir.program import Program

_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "convolution"}
_TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}

WIDEST = 6144
"""Features of a patch at most, 0.3 GiB of second moments; of wider ones taps count apart."""


@dataclass(frozen=True, slots=True)
class LinearSite:
    """One product of an activation with a weight of the program.

    Attributes:
        name: the weight's tensor name; "name[e]" for expert or group e.
        entry: the entry graph it is in.
        node: the operator.
        operand: the activation that is multiplied, [..., in]; of a convolution [n, channels, ...].
        tensor: name of the weight.
        transposed: the weight is stored [in, out].
        bias: name of the bias tensor, if the operator adds one directly.
        expert: index of the expert, for a grouped product.
        offsets: the node with each expert's last row, for a grouped product.
        window: which inputs an output position reads, for a convolution.
        group: index of the group and their number, for a convolution in groups.
    """

    name: str
    entry: str
    node: fx.Node = field(repr=False)
    operand: fx.Node = field(repr=False)
    tensor: str
    transposed: bool
    bias: str | None = None
    expert: int | None = None
    offsets: fx.Node | None = field(default=None, repr=False)
    window: Window | None = None
    group: tuple[int, int] | None = None

    @property
    def reads(self) -> tuple[object, ...]:
        """A key for the rows that it reads: equal for sites with the same ones."""
        return self.operand, self.expert, self.window, self.group

    def matrix(self, program: Program) -> Tensor:
        """The weight as [out, in], a view where the storage allows it.

        Of a convolution whose taps count apart [out · taps, in]: a row is an output of one tap.
        """
        return self.as_matrix(program.tensors[self.tensor])

    def as_matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape, such as a mask of it, as `matrix` is."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.window is not None:
            return self.window.matrix(self._own(tensor, 0))
        return tensor.T if self.transposed else tensor

    def bias_column(self, program: Program) -> Tensor | None:
        """What the operator adds to each row of `matrix`, float64 [out]; None for nothing."""
        if self.bias is None:
            return None
        bias = self._own(program.tensors[self.bias], 0).to("cpu", torch.float64)
        if self.window is not None and self.window.apart:  # the taps' outputs add up
            return bias.repeat_interleave(self.window.taps) / self.window.taps
        return bias

    def with_matrix(self, program: Program, matrix: Tensor, bias: Tensor | None = None) -> Program:
        """The program with another weight [out, in] (and bias [out]) at this site."""
        old = program.tensors[self.tensor]
        if self.window is not None:
            new = self._convolution_weight(old, matrix)
        else:
            new = (matrix.T if self.transposed else matrix).to(old.dtype).contiguous()
        if self.expert is not None:
            whole = old.clone()
            whole[self.expert] = new
            new = whole
        changed = {self.tensor: new}
        if bias is not None:
            assert self.bias is not None
            before = program.tensors[self.bias]
            if self.window is not None and self.window.apart:
                bias = bias.unflatten(0, (-1, self.window.taps)).sum(1)
            changed[self.bias] = before.clone()
            self._own(changed[self.bias], 0).copy_(bias)
        return program.with_tensors(changed)

    def channels(self, value: Tensor) -> Tensor:
        """The channels of the operand that it reads: those of its group."""
        assert self.window is not None
        return self._own(value, value.dim() - len(self.window.kernel) - 1)

    def _own(self, tensor: Tensor, dim: int) -> Tensor:
        """The part of a dimension that is of this site's group; a view."""
        if self.group is None:
            return tensor
        index, count = self.group
        size = tensor.shape[dim] // count
        return tensor.narrow(dim, index * size, size)

    def _convolution_weight(self, old: Tensor, matrix: Tensor) -> Tensor:
        assert self.window is not None
        new = old.clone(memory_format=torch.contiguous_format)
        mine = self._own(new, 0)
        channels = mine.shape[0] if self.window.transposed else mine.shape[1]
        mine.copy_(self.window.weight(matrix, channels))
        return new


def linear_sites(groups: AxisGroups, entry: str = "forward") -> list[LinearSite]:
    """Every linear site of an entry graph, in execution order; experts one by one."""
    facts = groups.axes.facts[entry]
    found = [s for c in facts.contractions for s in sites_of(entry, c, groups.program)]
    number = {n: i for i, n in enumerate(groups.program.entries[entry].graph.nodes)}
    return sorted(found, key=lambda site: number[site.node])  # stable: experts keep their order


# What may lie between a product and an output of the model that are one thing to the user: casts,
# cuts, and what is done to each value alone (a cap on logits, a sigmoid).
_OUTWARD = {
    "to", "contiguous", "clone", "alias", "view", "reshape", "unsqueeze", "squeeze", "flatten",
    "slice", "select", "add", "sub", "mul", "div", "tanh", "sigmoid", "softmax", "log_softmax",
}  # fmt: skip


def is_output_head(site: LinearSite, program: Program) -> bool:
    """Whether the product is an output of the model: logits, a vocabulary's or of classes.

    True too for a weight that a table lookup shares: the embedding that is also the output head.
    """
    graph = program.entries[site.entry].graph
    for node in graph.nodes:
        if (
            is_op(node, "embedding")
            and weight_of(bound_arguments(node)["weight"])[0] == site.tensor
        ):
            return True
    return bool(outputs_of(site.node))


def outputs_of(product: fx.Node) -> set[int]:
    """Numbers of the flat outputs that are this product, to a person who uses the model."""
    found: set[int] = set()
    stack, seen = [product], set()
    while stack:
        node = stack.pop()
        for user in node.users:
            if user.op == "output":
                found |= {i for i, r in enumerate(flat_outputs(user.graph)) if r is node}
                continue
            others = [n for n in user.all_input_nodes if n.op != "get_attr"]
            if op_name(user) in _OUTWARD and len(others) == 1 and user not in seen:
                seen.add(user)
                stack.append(user)
    return found


def consumers(groups: AxisGroups, group: AxisGroup) -> list[tuple[LinearSite, Tensor]]:
    """The sites that contract a group, in execution order, with the unit of each input feature.

    Returns:
        (site, units) pairs; units is int64 [in], -1 where a feature is of no unit of the group.
        Contractions that are no linear site (attention scores) are not listed, nor convolutions
        whose groups are units: their outputs go with them.
    """
    leaf = algebra.find(groups[group.id].axis)
    found = []
    for entry, facts in groups.axes.facts.items():
        for contraction in facts.contractions:
            if leaf not in set(algebra.leaves(contraction.axis)):
                continue
            if passes_through(groups, entry, contraction, group):
                continue
            units = algebra.unit_labels(contraction.axis, leaf)
            for site in sites_of(entry, contraction, groups.program):
                if site.window is None:
                    found.append((site, units))
                else:
                    found.append((site, site.window.columns(site._own(units, 0))))
    return found


def passes_through(
    groups: AxisGroups, entry: str, contraction: Contraction, group: AxisGroup
) -> bool:
    """Whether units are groups of a convolution: each output of a unit reads that unit alone."""
    own = groups.axes.facts[entry].extra.get(contraction.node, {}).get("groups")
    if own is None:
        return False
    return algebra.find(groups[group.id].axis) in set(algebra.leaves(own))


def contractions(groups: AxisGroups, group: AxisGroup) -> list[tuple[str, Contraction]]:
    """Every place where the group is summed over, linear site or not: (entry, contraction)."""
    leaf = algebra.find(groups[group.id].axis)
    return [
        (entry, contraction)
        for entry, facts in groups.axes.facts.items()
        for contraction in facts.contractions
        if leaf in set(algebra.leaves(contraction.axis))
    ]


def sites_of(entry: str, contraction: Contraction, program: Program) -> Sequence[LinearSite]:
    """The linear sites of one contraction: none, one, or one for each expert."""
    node = contraction.node
    bound = bound_arguments(node)
    if is_op(node, *_CONVOLUTIONS, *_TRANSPOSED):
        return _convolution_sites(entry, contraction, bound, program)
    value = contraction.operand.meta["val"]
    if contraction.dim != value.dim() - 1:
        return ()
    if is_op(node, "linear"):
        tensor, flipped = weight_of(bound["weight"])
        columns_last = True
    elif is_op(node, "addmm", "mm", "matmul", "grouped_mm"):
        names = {"addmm": "mat2", "mm": "mat2", "matmul": "other", "grouped_mm": "weight"}
        tensor, flipped = weight_of(bound[names[op_name(node)]])
        columns_last = False
        if bound.get("alpha", 1) != 1 or bound.get("beta", 1) != 1:
            return ()  # `addmm` scales: the product is not that of the weight
    else:
        return ()
    if tensor is None:
        return ()
    transposed = flipped == columns_last
    if is_op(node, "grouped_mm"):
        count = program.tensors[tensor].shape[0]
        return [
            LinearSite(
                f"{tensor}[{e}]", entry, node, contraction.operand, tensor, transposed,
                expert=e, offsets=bound["offs"],
            )
            for e in range(count)
        ]  # fmt: skip
    if program.tensors[tensor].dim() != 2:
        return ()
    bias, _ = weight_of(bound.get("bias", bound.get("self") if is_op(node, "addmm") else None))
    if bias is not None and program.tensors[bias].dim() != 1:
        bias = None
    return [LinearSite(tensor, entry, node, contraction.operand, tensor, transposed, bias)]


def _convolution_sites(
    entry: str, contraction: Contraction, bound: Mapping[str, Any], program: Program
) -> Sequence[LinearSite]:
    """The site of a convolution, or one for each of its groups."""
    node = contraction.node
    tensor, flipped = weight_of(bound["weight"])
    if tensor is None or flipped or contraction.slot != "input" or bound.get("transposed"):
        return ()
    weight = program.tensors[tensor]
    window = Window.of(bound, weight.shape[2:], is_op(node, *_TRANSPOSED))
    count = int(bound.get("groups", 1))
    channels = weight.shape[0] // count if window.transposed else weight.shape[1]
    if channels * window.taps > WIDEST and window.taps > 1:
        window = replace(window, apart=True)
    bias, _ = weight_of(bound.get("bias"))
    site = LinearSite(
        tensor, entry, node, contraction.operand, tensor, window.transposed, bias, window=window
    )
    if count == 1:
        return [site]
    return [replace(site, name=f"{tensor}[{g}]", group=(g, count)) for g in range(count)]
