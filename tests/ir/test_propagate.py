"""Shapes of nodes: looked up where layers repeat, and as a run of its own gives them."""

from __future__ import annotations

import operator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx

from graphprune.ir import propagate as propagation
from graphprune.ir.propagate import propagate

ATEN = torch.ops.aten


def layers(count: int) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Linear, GELU and a split that is joined again, `count` times."""
    graph, tensors = fx.Graph(), {}
    x = graph.placeholder("x")
    for i in range(count):
        tensors[f"w{i}"] = torch.randn(6, 6)
        x = graph.call_function(ATEN.linear.default, (x, graph.get_attr(f"w{i}")))
        x = graph.call_function(ATEN.gelu.default, (x,), {"approximate": "tanh"})
        pieces = graph.call_function(ATEN.split.Tensor, (x, 3, -1))
        halves = [graph.call_function(operator.getitem, (pieces, j)) for j in (1, 0)]
        x = graph.call_function(ATEN.cat.default, (halves, -1))
    graph.output((x,))
    return graph, tensors


def facts(graph: fx.Graph) -> list[Any]:
    """What is known of every node, as text: symbols of two runs are not one object."""
    values = [torch.utils._pytree.tree_leaves(n.meta["val"]) for n in graph.nodes]
    return [
        [(str(v.shape), str(v.stride()), v.dtype) if isinstance(v, Tensor) else v for v in leaves]
        for leaves in values
    ]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propagation, "_recent", {})


def test_repeated_layers_have_the_shapes_of_a_run_without_lookup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph, tensors = layers(3)
    example, dynamic = [torch.randn(4, 5, 6)], {"x": {0: "batch", 1: "sequence"}}
    propagate(graph, tensors, example, dynamic)
    looked_up = facts(graph)
    propagation._propagate(graph, tensors, example, dynamic, lookup=False)
    assert looked_up == facts(graph)


def test_a_layer_like_one_before_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    plain = fx.Interpreter.call_function

    def counted(self: Any, target: Any, args: Any, kwargs: Any) -> Any:
        calls.append(target)
        return plain(self, target, args, kwargs)

    monkeypatch.setattr(fx.Interpreter, "call_function", counted)
    example, dynamic = [torch.randn(4, 5, 6)], {"x": {0: "batch"}}
    propagate(*layers(1), example, dynamic)
    once = len(calls)
    propagate(*layers(7), example, dynamic)
    assert len(calls) == once
    propagate(*layers(1), [torch.randn(3, 5, 6)], dynamic)
    assert len(calls) == 2 * once


def test_sizes_that_depend_on_values_are_never_shared() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    signed = graph.call_function(ATEN.neg.default, (x,))
    found = [graph.call_function(ATEN.nonzero.default, (y,)) for y in (x, signed)]
    graph.output(tuple(found))
    propagate(graph, {}, [torch.randn(4, 3)], {"x": {0: "batch"}})
    first, second = (node.meta["val"].shape[0].node.expr for node in found)
    assert first != second


def test_numbers_of_other_types_are_other_arguments() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    sums = [graph.call_function(ATEN.add.Tensor, (x, y)) for y in (1, 1.0, True)]
    graph.output(tuple(sums))
    propagate(graph, {}, [torch.ones(2, dtype=torch.int64)], {})
    assert [n.meta["val"].dtype for n in sums] == [torch.int64, torch.float32, torch.int64]


def test_a_graph_that_fixes_a_size_does_not_fix_it_for_the_next() -> None:
    example, dynamic = [torch.randn(4, 3)], {"x": {0: "batch"}}
    for build in (lambda x: (ATEN.view.default, (x, [2, 6])), lambda x: (ATEN.relu.default, (x,))):
        graph = fx.Graph()
        node = graph.call_function(*build(graph.placeholder("x")))
        graph.output((node,))
        propagate(graph, {}, example, dynamic)
    assert isinstance(node.meta["val"].shape[0], torch.SymInt)
    assert node.meta["val"].shape[0].node.maybe_as_int() is None


def test_a_call_with_a_value_of_its_own_is_not_remembered() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    own = graph.call_function(ATEN.lift_fresh_copy.default, (torch.tensor(2.0),))
    graph.output((graph.call_function(ATEN.mul.Tensor, (x, own)),))
    propagate(graph, {}, [torch.randn(4, 3)], {})
    assert own.meta["val"].constant is not None
    (fakes,) = propagation._recent.values()
    assert all(ATEN.mul.Tensor not in cast(tuple[Any, ...], key) for key in fakes.known)
