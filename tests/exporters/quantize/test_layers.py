"""The layers of a file, and the graph brought into shape: it computes what it did."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphprune.exporters.quantize.layers import (
    Editor,
    Layer,
    find_layers,
    half_tied,
    quantized_rows,
)


def test_rows_of_zeros_have_a_scale() -> None:
    codes, scales = quantized_rows(np.zeros((2, 4), np.float32))
    assert (codes == 0).all()
    assert (scales == 1).all()


def model(
    nodes: list[Any], weights: dict[str, Any], x: tuple[str, int], output: str = "y"
) -> onnx.ModelProto:
    """A file of these nodes, with one input of a type and a width."""
    kind = TensorProto.INT64 if x[0] == "ids" else TensorProto.FLOAT
    shape: list[Any] = ["batch"] if x[0] == "ids" else ["batch", x[1]]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(x[0], kind, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", "width"])],
        [numpy_helper.from_array(w, name) for name, w in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return made


def run(made: onnx.ModelProto, feeds: dict[str, Any], output: str = "y") -> Any:
    onnx.checker.check_model(made)
    session = onnxruntime.InferenceSession(
        made.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run([output], feeds)[0]


def drawn(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def tied() -> onnx.ModelProto:
    """Rows of a table, times its transpose."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], "look", axis=0),
        helper.make_node("Transpose", ["table"], ["turned"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["rows", "turned"], ["y"], "head"),
    ]
    return model(nodes, {"table": drawn(7, 4)}, ("ids", 0))


def test_layers_are_products_and_tables_in_float32() -> None:
    assert find_layers(tied()) == [
        Layer("look", "table", "embedding"),
        Layer("head", "table", "matmul", tied=True),
    ]
    double = tied()
    double.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((7, 4)), "table"))
    assert find_layers(double) == []


@pytest.mark.parametrize(
    ("options", "found"),
    [({}, 1), ({"transB": 1}, 1), ({"alpha": 0.5}, 0), ({"beta": 2.0}, 0), ({"transA": 1}, 0)],
)
def test_a_gemm_is_a_layer_where_it_is_a_plain_product(options: Any, found: int) -> None:
    node = helper.make_node("Gemm", ["x", "w"], ["y"], **options)
    layers = find_layers(model([node], {"w": drawn(4, 4)}, ("x", 4)))
    assert [layer.node for layer in layers] == ["node_0"] * found


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gemm_that_is_spelled_out_computes_the_same(transposed: int, bias: bool) -> None:
    weights = {"w": drawn(3, 4) if transposed else drawn(4, 3), "b": drawn(3)}
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    made = model([helper.make_node("Gemm", inputs, ["y"], transB=transposed)], weights, ("x", 4))
    expected = run(made, {"x": drawn(5, 4)})
    layers = find_layers(made)
    Editor(made).prepare([], layers)
    assert [n.op_type for n in made.graph.node] == ["MatMul", "Add"][: 1 + bias]
    assert {i.name for i in made.graph.initializer} == {
        "w_transposed" if transposed else "w", *(["b"] if bias else [])
    }  # fmt: skip
    np.testing.assert_allclose(run(made, {"x": drawn(5, 4)}), expected, rtol=1e-5, atol=1e-6)


def test_tied_tables_are_taken_apart_and_rows_are_within_half_a_step() -> None:
    made, ids = tied(), {"ids": np.array([6, 0, 3])}
    table = drawn(7, 4)
    layers = find_layers(made)
    Editor(made).prepare(layers, layers)
    assert "Transpose" not in {n.op_type for n in made.graph.node}
    assert {i.name for i in made.graph.initializer} == {
        "table_transposed", "table_row_int8", "table_row_scales",
    }  # fmt: skip
    codes, scales = quantized_rows(table)
    expected = (codes * scales)[ids["ids"]] @ table.T
    np.testing.assert_allclose(run(made, ids), expected, rtol=1e-5, atol=1e-5)


def test_a_table_that_is_also_read_in_float_stays() -> None:
    look, head = find_layers(tied())
    assert half_tied(tied(), [look]) == {look: "'head' reads the same weight and stays float"}
    assert half_tied(tied(), [head]) == {head: "'look' reads the same weight and stays float"}
    assert half_tied(tied(), [look, head]) == {}


def siblings() -> onnx.ModelProto:
    """Three products of x, two of them with a bias, behind each other."""
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["xa"], "a"),
        helper.make_node("Add", ["p", "xa"], ["first"], "p"),
        helper.make_node("MatMul", ["x", "b"], ["second"], "b"),
        helper.make_node("MatMul", ["x", "c"], ["xc"], "c"),
        helper.make_node("Add", ["xc", "q"], ["third"], "q"),
        helper.make_node("Concat", ["first", "second", "third"], ["y"], "join", axis=-1),
    ]
    given = {"a": drawn(4, 3), "p": drawn(3), "b": drawn(4, 2), "c": drawn(4, 5), "q": drawn(5)}
    return model(nodes, given, ("x", 4))


def test_products_of_one_value_become_one() -> None:
    made, x = siblings(), {"x": drawn(6, 4)}
    expected, layers = run(made, x), find_layers(made)
    assert Editor(made).prepare(layers, layers) == ["a_merged"]
    assert [n.op_type for n in made.graph.node] == ["MatMul", "Add", "Split", "Concat"]
    assert {i.name for i in made.graph.initializer} == {
        "a_merged", "a_merged_bias", "a_merged_widths",
    }  # fmt: skip
    np.testing.assert_allclose(run(made, x), expected, rtol=1e-6, atol=1e-6)


def test_only_chosen_products_become_one() -> None:
    made, x = siblings(), {"x": drawn(6, 4)}
    expected, layers = run(made, x), find_layers(made)
    assert Editor(made).prepare([n for n in layers if n.node != "b"], layers) == ["a_merged"]
    kept = [n.name for n in made.graph.node if n.op_type == "MatMul"]
    assert sorted(kept) == ["a_merged", "b"]
    np.testing.assert_allclose(run(made, x), expected, rtol=1e-6, atol=1e-6)


def test_a_product_with_a_shared_weight_stays() -> None:
    made, x = siblings(), {"x": drawn(6, 4)}
    made.graph.node[3].input[1] = "a"  # c reads the weight of a
    made.graph.node[4].input[1] = "p"
    expected, layers = run(made, x), find_layers(made)
    assert Editor(made).prepare(layers, layers) == ["a", "b", "c"]
    np.testing.assert_allclose(run(made, x), expected, rtol=1e-6, atol=1e-6)


def test_a_product_that_is_an_output_is_one_before_its_bias() -> None:
    made, x = siblings(), {"x": drawn(6, 4)}
    made.graph.output.append(helper.make_tensor_value_info("xa", TensorProto.FLOAT, ["batch", 3]))
    layers = find_layers(made)
    before = onnx.ModelProto()
    before.CopyFrom(made)
    Editor(made).prepare(layers, layers)
    assert [n.op_type for n in made.graph.node].count("Add") == 2
    for name in ("xa", "y"):
        found, expected = (run(m, x, name) for m in (made, before))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1))
def test_codes_are_within_half_a_step(rows: list[list[float]]) -> None:
    table = np.array(rows, np.float32)
    codes, scales = quantized_rows(table)
    assert codes.dtype == np.int8
    assert codes.min() >= -127
    assert np.all(np.abs(table - codes * scales.astype(np.float64)) <= scales * 0.5001)
