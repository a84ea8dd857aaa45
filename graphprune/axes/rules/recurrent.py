"""Recurrent layers: what comes in is summed over, and so is what they keep from step to step.

For each layer and direction, with g gates (4 in an LSTM, 3 in a GRU, 1 else), input k and hidden h:

    w_ih [g × h, k]    w_hh [g × h, h]    b_ih, b_hh [g × h]

A gate has a row for each hidden unit, and unit i meets others only where w_hh sums over it. So unit
i can go from all g segments of the rows and from the columns of w_hh, and from the states. The
states of all layers and directions are one tensor [layers × directions, batch, h]: they lose the
same units. A projection (w_hr [p, h] of an LSTM) has w_hh [g × h, p], and gives out p.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphprune.axes import algebra
from graphprune.axes.algebra import Axis
from graphprune.axes.facts import Dims
from graphprune.axes.rules.context import RewriteContext, RuleContext
from graphprune.axes.rules.registry import rewriter, rule
from graphprune.errors import UnsupportedError
from graphprune.ir.graph import place

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_HIDDEN = "a hidden state of"


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(c: RuleContext) -> Any:
    """Layers over [time, batch, features]."""
    if c.get("batch_sizes") is not None:  # packed: time and batch are one dimension
        return c.unknown()
    x, params = c.dims(c.get("input")), c.get("params")
    directions = 2 if c.get("bidirectional") else 1
    layers = int(c.get("num_layers"))
    each = len(params) // (layers * directions)
    projected = each in (3, 5)  # without and with biases
    hidden = algebra.leaf(c.dims(params[1])[0].size // _GATES[c.op])
    given = algebra.leaf(c.dims(params[1])[1].size) if projected else hidden
    for first in range(0, len(params), each):
        layer = first // (each * directions)
        inner = x[-1] if layer == 0 else algebra.concat([given] * directions)
        _layer(c, first, each, inner, hidden, given)
    c.contract("input", len(x) - 1, "params:0")
    if projected:
        c.remember(hidden=hidden, given=given)
    return _outputs(c, x, hidden, given, directions)


@rewriter("lstm")
def check_projection(r: RewriteContext) -> None:
    """Refuse a projection to as many units as there are, which torch takes for none.

    Raises:
        UnsupportedError: the cut leaves as many of one as of the other.
    """
    hidden, given = r.extra("hidden"), r.extra("given")
    if hidden is None or given is None or not (r.changed(hidden) or r.changed(given)):
        return
    if r.static_size(hidden) == r.static_size(given):
        raise UnsupportedError(
            f"{place(r.node)} would keep {r.static_size(hidden)} hidden units and as many after "
            "its projection (proj_size), which torch cannot run; keep another number of them"
        )


def _layer(c: RuleContext, first: int, each: int, inner: Axis, hidden: Axis, given: Axis) -> None:
    """The axes of one layer's weights in one direction, and what is summed over inside.

    Args:
        c: the call.
        first: where the weights of this layer and direction begin.
        each: how many there are.
        inner: the axis of what the layer reads.
        hidden: the axis of its units.
        given: the axis of what it gives out, another one if that is projected.
    """
    params = c.get("params")
    w_ih, w_hh, *rest = (c.dims(p) for p in params[first : first + each])
    gates = algebra.concat([hidden] * _GATES[c.op])
    projection = rest.pop() if each in (3, 5) else None
    for weight in (w_ih, w_hh, *rest):
        c.unify(weight[0], gates)
    c.unify(w_ih[1], inner)
    c.unify(w_hh[1], given)
    if first and inner is not c.dims(c.get("input"))[-1]:
        c.contract(f"params:{first}", 1, "input")
    c.contract(f"params:{first + 1}", 1, "input")
    if projection is not None:
        c.unify(projection[0], given)
        c.unify(projection[1], hidden)
        c.contract(f"params:{first + each - 1}", 1, "input")


def _outputs(c: RuleContext, x: Dims, hidden: Axis, given: Axis, directions: int) -> list[Dims]:
    """The values of all steps, and the last states [layers × directions, batch, units]."""
    time, batch = (1, 0) if c.get("batch_first") else (0, 1)
    c.freeze(x[time], "ordered in time by")
    states = c.get("hx")
    units = (given, hidden)  # of the state that goes out, and of an LSTM's cell
    for state, axis in zip(_several(states), units, strict=False):
        _meet(c, c.dims(state), x[batch], axis)
    last = []
    for number, axis in zip(range(1, len(c.value)), units, strict=False):
        layers = c.fresh(number)[0]
        c.freeze(layers, _HIDDEN)
        last.append((layers, x[batch], axis))
    return [(*x[:-1], algebra.concat([given] * directions)), *last]


def _meet(c: RuleContext, state: Dims, batch: Axis, units: Axis) -> None:
    """A state that comes in: its batch is that of the input, its units those of the layer."""
    c.freeze(state[0], _HIDDEN)
    c.unify(state[1], batch)
    c.unify(state[2], units)


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else [value]
