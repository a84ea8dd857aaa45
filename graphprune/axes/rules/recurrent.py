"""Recurrent layers: what comes in is summed over, what they keep from step to step is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphprune.axes import algebra
from graphprune.axes.algebra import Axis
from graphprune.axes.facts import Dims
from graphprune.axes.rules.context import RuleContext
from graphprune.axes.rules.registry import rule

_HIDDEN = "a hidden state of"


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(c: RuleContext) -> Any:
    """Layers over [time, batch, features]: only the first one's input can lose units."""
    if c.get("batch_sizes") is not None:  # packed: time and batch are one dimension
        return c.unknown()
    x, params = c.dims(c.get("input")), c.get("params")
    time, batch = (1, 0) if c.get("batch_first") else (0, 1)
    c.freeze(x[time], "ordered in time by")
    directions = 2 if c.get("bidirectional") else 1
    each = len(params) // (int(c.get("num_layers")) * directions)
    first = [each * i for i in range(directions)]  # where the input weights of layer 0 are
    for i, tensor in enumerate(params):
        weight = c.dims(tensor)
        c.freeze(weight[:1] if i in first else weight, _HIDDEN)
        if i in first:
            c.unify(x[-1], weight[1])
    c.contract("input", len(x) - 1, "params:0")
    hidden = [_state(c, number, x[batch]) for number in range(1, len(c.value))]
    for state in _several(c.get("hx")):
        _meet(c, c.dims(state), 1, x[batch])
    width = algebra.leaf(c.sizes(0)[-1])
    c.freeze(width, _HIDDEN)
    return [(*x[:-1], width), *hidden]


def _state(c: RuleContext, number: int, batch: Axis) -> Dims:
    """Axes of a final state [layers, batch, hidden]."""
    layers, _, hidden = c.fresh(number)
    c.freeze((layers, hidden), _HIDDEN)
    return layers, batch, hidden


def _meet(c: RuleContext, state: Dims, dim: int, batch: Axis) -> None:
    """A state that comes in: its batch is that of the input, the rest is frozen."""
    c.unify(state[dim], batch)
    c.freeze([axis for i, axis in enumerate(state) if i != dim], _HIDDEN)


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else [value]
