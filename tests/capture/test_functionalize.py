"""Functional graphs compute what graphs with writes and regions compute, and write to nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from graphprune.capture.functionalize import functionalize, inline_regions, spell_out
from graphprune.errors import CaptureError
from graphprune.ir.graph import erase_dead, op_name
from graphprune.ir.program import Program

aten = torch.ops.aten
Change = Callable[[Tensor], Any]

VIEWS: dict[str, Change] = {
    "itself": lambda x: x,
    "slice": lambda x: x[:, 1:3],
    "select": lambda x: x[1],
    "transpose": lambda x: x.t(),
    "view": lambda x: x.view(-1),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "nested": lambda x: x.t()[1:][:, 0],
}
WRITES: dict[str, Change] = {
    "add_": lambda x: x.add_(1.5),
    "mul_": lambda x: x.mul_(-2),
    "relu_": lambda x: x.relu_(),
    "copy_": lambda x: x.copy_(x * 3 + 1),
    "fill_": lambda x: x.fill_(7),
    "masked_fill_": lambda x: x.masked_fill_(x > 0, 0.25),
    "gt_": lambda x: x.gt_(0),
}
STEPS = st.tuples(st.sampled_from(list(VIEWS)), st.sampled_from(list(WRITES)))


def functional(function: Change, x: Tensor) -> tuple[fx.GraphModule, set[str]]:
    """A function traced with its writes, and made functional."""
    module = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    written = functionalize(module.graph)
    spell_out(module.graph)  # a view of what was made anew may have to copy
    module.recompile()
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        assert schema is None or not schema.is_mutable, node
    return module, written


@settings(max_examples=10, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=3))
def test_writes_through_views_reach_all_that_sees_the_memory(steps: list[tuple[str, str]]) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        x = x * 1
        early = x[:, 1:3], x.t(), x.view(-1)
        between = []
        for view, write in steps:
            between.append(WRITES[write](VIEWS[view](x)) + x.sum())
        return (x, *early, *between)

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(len(steps)))
    module, written = functional(function, x)
    assert written == set()
    for found, expected in zip(module(x), function(x), strict=True):
        torch.testing.assert_close(found, expected)


def test_inputs_stay_as_they_were_and_state_is_named() -> None:
    counter = torch.zeros(3)

    def function(x: Tensor) -> Tensor:
        counter.add_(1)
        return x.mul_(2) + counter

    module, written = functional(function, torch.ones(3))
    x = torch.ones(3)
    names = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    assert written == names
    assert len(names) == 1
    assert torch.equal(module(x), torch.full((3,), 3.0))
    assert torch.equal(x, torch.ones(3))


def test_a_write_without_a_functional_form_is_refused_by_name() -> None:
    def function(x: Tensor) -> Tensor:
        aten._foreach_add_.Scalar([x], 1)
        return x

    with pytest.raises(CaptureError, match=r"_foreach_add_.* writes to its inputs and has no"):
        functional(function, torch.ones(4))


# --- regions -----------------------------------------------------------------------------------


def region(wrap: Any, *mode: Any) -> fx.GraphModule:
    """Two results of a region that is called with two inputs, its second input first."""
    body = fx.Graph()
    b, a = body.placeholder("b"), body.placeholder("a")
    product = body.call_function(aten.mul.Tensor, (a, b))
    body.output((product, body.call_function(aten.sub.Tensor, (product, b))))
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    inner = graph.get_attr("body")
    call = graph.call_function(wrap, (*mode, inner, y, x))
    first, second = (graph.call_function(operator.getitem, (call, i)) for i in (0, 1))
    graph.output((second, first))
    root = torch.nn.Module()
    root.body = fx.GraphModule(torch.nn.Module(), body)
    return fx.GraphModule(root, graph)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("wrap_with_set_grad_enabled", (False,)), ("wrap_with_autocast", ("cpu", None, False, None))],
)
def test_regions_are_replaced_by_what_is_in_them(name: str, mode: tuple[Any, ...]) -> None:
    module = region(getattr(torch.ops.higher_order, name), *mode)
    inline_regions(module, module.graph)
    module.recompile()
    assert [op_name(n) for n in module.graph.nodes] == [
        "placeholder", "placeholder", "mul", "sub", "output",
    ]  # fmt: skip
    x, y = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0])
    torch.testing.assert_close(module(x, y), (x * y - y, x * y))


def test_an_autocast_region_that_casts_is_refused() -> None:
    module = region(torch.ops.higher_order.wrap_with_autocast, "cpu", torch.bfloat16, True, None)
    with pytest.raises(CaptureError, match="autocast region"):
        inline_regions(module, module.graph)


# --- shapes and types written out --------------------------------------------------------------


def test_shapes_and_types_are_spelled_out(program_of: Callable[..., Program]) -> None:
    def write(graph: fx.Graph, node: dict[str, fx.Node]) -> tuple[fx.Node, ...]:
        call, x = graph.call_function, node["x"]
        lifted = call(aten.unsqueeze.default, (x, -1))
        return (
            call(aten.squeeze.default, (lifted,)),
            call(aten.squeeze.dim, (lifted, 0)),  # of size 2: drops nothing
            call(aten.view.default, (x, [-1])),
            call(aten.view_as.default, (call(aten.view.default, (x, [-1])), x)),
            call(aten.rms_norm.default, (x, [4])),
            call(aten.zeros.default, ([2],)),
        )

    dynamic = {"x": {1: "sequence"}}
    program = program_of({}, {"x": torch.randn(2, 3, 4)}, write, dynamic)
    graphs = program.fork_graphs()
    spell_out(graphs["forward"])
    erase_dead(graphs["forward"])
    after = program.with_graphs(graphs)
    calls = [n for n in graphs["forward"].nodes if n.op == "call_function"]
    squeezes = [n.args[1] for n in calls if n.target is aten.squeeze.dims]
    assert squeezes == [[3], []]
    targets = {str(n.target) for n in calls}
    assert not targets & {"aten.view.default", "aten.view_as.default", "aten.squeeze.default"}
    norm = next(n for n in calls if op_name(n) == "rms_norm")
    assert norm.args[3] == torch.finfo(torch.float32).eps
    zeros = next(n for n in calls if op_name(n) == "zeros")
    assert zeros.kwargs == {"dtype": torch.float32}
    x = [torch.randn(2, 5, 4)]
    for a, b in zip(program.run(x), after.run(x), strict=True):
        torch.testing.assert_close(a, b)
