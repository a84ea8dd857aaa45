"""Recurrent layers as the ONNX operators LSTM, GRU and RNN, one node a layer.

torch keeps the gates of an LSTM in the order i f g o and those of a GRU as r z n; ONNX in i o f c
and z r h. Both directions of a layer are one node. The weights are written in the order of ONNX,
once, as tensors of the file.

An LSTM with a projection, h = P m of m = o · tanh(c), has no operator. From a state of zeros it is
an LSTM over m: W_hh h = (W_hh P) m, and P comes after it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from graphprune.errors import ExportError
from graphprune.ir.graph import bound_arguments, is_op, op_name, place, value_of

_aten = torch.ops.aten
_KINDS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
_ORDERS = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}


@torch.library.custom_op("graphprune::recurrent_layer", mutates_args=())
def recurrent_layer(
    input: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor,
    hidden: Tensor,
    cell: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one layer in one or both directions, with weights in the order of ONNX.

    Args:
        input: [time, batch, features].
        weight: of the input, [directions, gates x units, features].
        recurrence: of the state, [directions, gates x units, units].
        bias: of both, [directions, 2 x gates x units].
        hidden: the first state, [directions, batch, units].
        cell: of an LSTM, likewise; others leave it as it is.
        kind: torch's name of the layer, such as "lstm".

    Returns:
        The values of all steps, [time, directions, batch, units]; the last state; the last cell.
    """
    order = torch.tensor(_ORDERS[kind]).argsort()
    params: list[Tensor] = []
    for w, r, b in zip(weight, recurrence, bias, strict=True):
        halves = b.chunk(2)
        for part in (w, r, *halves):
            params.append(part.unflatten(0, (len(order), -1))[order].flatten(0, 1))
    states: Any = [hidden, cell] if kind == "lstm" else hidden
    call: Any = getattr(torch, kind)
    both = len(weight) == 2
    values, *last = call(input, states, params, True, 1, 0.0, False, both, False)
    values = values.unflatten(2, (len(weight), -1)).transpose(1, 2).contiguous()
    return values, last[0], last[1] if kind == "lstm" else cell.clone()


@recurrent_layer.register_fake
def _fake(
    input: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor,
    hidden: Tensor,
    cell: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    values = input.new_empty(input.shape[0], weight.shape[0], input.shape[1], recurrence.shape[2])
    return values, hidden.new_empty(hidden.shape), cell.new_empty(cell.shape)


def onnx_layer(op: Any) -> Callable[..., Any]:
    """The translation of `recurrent_layer`, in an opset of onnxscript."""

    def translate(
        input: Any, weight: Any, recurrence: Any, bias: Any, hidden: Any, cell: Any, kind: str
    ) -> Any:
        both = int(weight.shape[0]) == 2
        options: dict[str, Any] = {
            "hidden_size": int(recurrence.shape[2]),  # a name of ONNX
            "direction": "bidirectional" if both else "forward",
        }
        given = [input, weight, recurrence, bias, None, hidden]
        if kind == "lstm":
            return op.LSTM(*given, cell, **options)
        if kind == "gru":
            options["linear_before_reset"] = 1  # as torch multiplies: r · (R h + b)
        else:
            options["activations"] = ["Relu" if kind == "rnn_relu" else "Tanh"] * (1 + both)
        values, last = getattr(op, _KINDS[kind])(*given, **options)
        return values, last, op.Identity(cell)

    return translate


_CALL = "@"


def made_of(weight: str) -> str:
    """The tensor that a recurrent layer's weight in the file is named after.

    A layer's weights are stacked, its directions together, for each call of it; the name is that of
    the first direction's tensor.
    """
    return weight.rpartition(_CALL)[0] or weight


def lower_recurrent(module: fx.GraphModule) -> None:
    """Write every recurrent layer of a flat module with fresh metadata as `recurrent_layer`.

    Raises:
        ExportError: one that has no form in ONNX.
    """
    for node in list(module.graph.nodes):
        if is_op(node, *_KINDS) and "batch_sizes" not in bound_arguments(node):
            with module.graph.inserting_before(node):
                _Lowering(module, node).replace()


class _Lowering:
    """One call of a recurrent layer, several layers deep perhaps, and what takes its place."""

    def __init__(self, module: fx.GraphModule, node: fx.Node) -> None:
        self.module, self.node, self.kind = module, node, op_name(node)
        self.arguments = bound_arguments(node)
        self.directions = 2 if self.arguments["bidirectional"] else 1
        self.layers = int(self.arguments["num_layers"])
        self.each = len(self.arguments["params"]) // (self.layers * self.directions)
        states = self.arguments["hx"]
        self.states: Sequence[fx.Node] = states if isinstance(states, (list, tuple)) else [states]
        self.projected = self.each in (3, 5)
        if self.projected and not is_op(self.states[0], "zeros", "new_zeros", "zeros_like"):
            raise ExportError(
                f"{place(node)} has a projection (proj_size) and a first state that is not zero, "
                "which no ONNX operator computes; leave the state out, or build the layer without "
                "proj_size"
            )

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        return self.module.graph.call_function(target, args)

    def tensors(self, layer: int, direction: int) -> list[Tensor]:
        """The parameters of a layer in one direction."""
        first = (layer * self.directions + direction) * self.each
        given = self.arguments["params"][first : first + self.each]
        return [_tensor(self.module, parameter, self.node) for parameter in given]

    def replace(self) -> None:
        """Put one node a layer in the place of the call."""
        value = self.arguments["input"]
        if self.arguments["batch_first"]:
            value = self.call(_aten.transpose.int, value, 0, 1)
        lasts: list[list[fx.Node]] = [[], []]
        for layer in range(self.layers):
            result = self._layer(layer, value)
            steps, *last = (self.call(operator.getitem, result, i) for i in range(3))
            projections = self._projections(layer)
            if projections is not None:
                wide = self.call(_aten.transpose.int, projections, 1, 2)  # [directions, units, p]
                steps = self.call(_aten.matmul.default, steps, wide)
                last[0] = self.call(_aten.matmul.default, last[0], wide)
            for some, state in zip(lasts, last, strict=True):
                some.append(state)
            if self.directions == 1:
                value = self.call(_aten.squeeze.dim, steps, 1)
            else:
                value = self.call(_aten.transpose.int, steps, 1, 2)
                value = self.call(_aten.flatten.using_ints, value, 2, -1)
        if self.arguments["batch_first"]:
            value = self.call(_aten.transpose.int, value, 0, 1)
        outputs = [value, *(self._joined(some) for some in lasts[: len(self.states)])]
        for user in list(self.node.users):
            new = outputs[cast(int, user.args[1])]
            new.meta = dict(user.meta)
            user.replace_all_uses_with(new)
            self.module.graph.erase_node(user)
        self.module.graph.erase_node(self.node)

    def _joined(self, states: list[fx.Node]) -> fx.Node:
        return states[0] if self.layers == 1 else self.call(_aten.cat.default, states, 0)

    def _layer(self, layer: int, value: fx.Node) -> fx.Node:
        every = [self.tensors(layer, direction) for direction in range(self.directions)]
        ordered = [self._ordered(some) for some in every]
        first = layer * self.directions * self.each
        read = [str(node.target) for node in self.arguments["params"][first : first + 2]]
        weights = [
            self._new(name, torch.stack(parts))
            for name, parts in zip(
                (*read, f"bias_{layer}"), zip(*ordered, strict=True), strict=True
            )
        ]
        hidden = self._state(self.states[0], layer)
        if self.projected:  # zeros of the units' number, as the cell's state has
            hidden = self.call(_aten.zeros_like.default, self._state(self.states[1], layer))
        cell = self._state(self.states[1], layer) if len(self.states) > 1 else hidden
        return self.call(
            torch.ops.graphprune.recurrent_layer.default, value, *weights, hidden, cell, self.kind
        )

    def _state(self, states: fx.Node, layer: int) -> fx.Node:
        """The part of the states of all layers that belongs to one."""
        if self.layers == 1:
            return states
        first = layer * self.directions
        return self.call(_aten.slice.Tensor, states, 0, first, first + self.directions)

    def _ordered(self, tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, recurrence and bias of a direction in ONNX's order of gates."""
        w_ih, w_hh, *rest = tensors
        projection = rest.pop() if self.projected else None
        if projection is not None:
            w_hh = (w_hh.double() @ projection.double()).to(w_hh.dtype)
        order = list(_ORDERS[self.kind])
        biases = rest or [w_ih.new_zeros(len(w_ih))] * 2

        def reordered(tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (len(order), -1))[order].flatten(0, 1)

        return reordered(w_ih), reordered(w_hh), torch.cat([reordered(b) for b in biases])

    def _projections(self, layer: int) -> fx.Node | None:
        if not self.projected:
            return None
        found = [self.tensors(layer, direction)[-1] for direction in range(self.directions)]
        return self._new(f"projection_{layer}", torch.stack(found))

    def _new(self, name: str, tensor: Tensor) -> fx.Node:
        """A new tensor of the module, read here; `made_of` finds the name again."""
        path, _, last = name.rpartition(".")
        full = f"{last}{_CALL}{self.node.name}"
        parent = self.module.get_submodule(path)
        parent.register_parameter(full, nn.Parameter(tensor.detach().contiguous()))
        return self.module.graph.get_attr(f"{path}.{full}" if path else full)


def _tensor(module: fx.GraphModule, node: Any, layer: fx.Node) -> Tensor:
    """The tensor that a weight of a layer is."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        raise ExportError(
            f"{place(layer)} computes a weight as it runs, which no ONNX operator does; run the "
            "pass fold-parametrizations first, or compute the weight before export"
        )
    found = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    assert isinstance(found, Tensor)
    assert value_of(node) is not None
    return found
