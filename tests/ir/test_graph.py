"""Helpers over fx graphs: names, arguments by name, copies, and what may be erased."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from graphprune.ir.graph import (
    bound_arguments,
    copy_graph,
    erase_dead,
    flat_outputs,
    has_effect,
    is_op,
    op_name,
    output_node,
    set_bound,
    tensor_nodes,
    terms,
)

aten = torch.ops.aten


def test_operators_have_one_name_whatever_their_overload() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for target in (aten.add.Tensor, aten.add.Scalar):
        node = graph.call_function(target, (x, 1))
        assert op_name(node) == "add"
        assert is_op(node, "mul", "add")
        assert not is_op(node, "add_")
    assert op_name(graph.call_function(operator.getitem, (x, 0))) == "getitem"
    assert op_name(x) == "placeholder"
    assert not is_op(x, "placeholder")


def test_arguments_are_found_by_name_wherever_they_stand() -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    norm = graph.call_function(aten.layer_norm.default, (x, [4]), {"weight": w, "eps": 0.5})
    assert bound_arguments(norm) == {
        "input": x, "normalized_shape": [4], "weight": w, "bias": None, "eps": 0.5,
        "cudnn_enable": True,
    }  # fmt: skip
    add = graph.call_function(aten.add.Tensor, (x, w), {"alpha": 3})
    assert bound_arguments(add) == {"self": x, "other": w, "alpha": 3}
    assert bound_arguments(graph.call_function(operator.add, (x, w))) == {}


@pytest.mark.parametrize("changed", [{"alpha": 5}, {"other": 2}, {"self": 4, "alpha": 5}, {}])
def test_arguments_are_replaced_and_the_others_stay(changed: dict[str, int]) -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    node = graph.call_function(aten.add.Tensor, (x,), {"other": w, "alpha": 3})
    before = bound_arguments(node)
    set_bound(node, changed)
    assert bound_arguments(node) == before | changed
    # Defaults of keyword-only arguments that nobody gave are not written down.
    plain = graph.call_function(aten.sub.Tensor, (x, w))
    set_bound(plain, {"other": 2})
    assert (plain.args, plain.kwargs) == ((x, 2), {})


def test_a_copy_keeps_names_and_metadata_and_shares_no_node() -> None:
    graph = fx.Graph()
    x = graph.placeholder("input")  # fx calls a copy of it input_1
    y = graph.call_function(aten.relu.default, (x,))
    y.meta["val"] = "shape"
    graph.output((y, None))
    copied = copy_graph(graph)
    assert [n.name for n in copied.nodes] == [n.name for n in graph.nodes]
    assert [n.op for n in copied.nodes] == [n.op for n in graph.nodes]
    new = list(copied.nodes)[1]
    assert new.meta == y.meta
    assert new.args == (next(iter(copied.nodes)),)
    new.meta["val"] = "other"
    new.target = aten.gelu.default
    assert (y.meta["val"], y.target) == ("shape", aten.relu.default)
    assert flat_outputs(copied) == (new, None)
    assert output_node(copied).op == "output"


def test_what_nobody_reads_goes_and_what_writes_stays() -> None:
    graph = fx.Graph()
    x, unread = graph.placeholder("x"), graph.placeholder("unread")
    weight = graph.create_node("get_attr", "w", name="w")
    first = graph.call_function(aten.mul.Tensor, (x, weight))
    second = graph.call_function(aten.relu.default, (first,))
    write = graph.call_function(aten.add_.Tensor, (x, 1))
    check = graph.call_function(aten._assert_async.msg, (x, "positive"))
    graph.output((x,))
    assert [n.name for n in tensor_nodes(graph)] == ["w"]
    assert [has_effect(n) for n in (first, write, check)] == [False, True, True]
    assert erase_dead(graph) == [weight.name, first.name, second.name]
    assert list(graph.nodes)[:4] == [x, unread, write, check]
    assert erase_dead(graph) == []


def test_a_sum_of_sizes_has_terms() -> None:
    assert (terms("past+sequence"), terms("batch")) == (["past", "sequence"], ["batch"])
