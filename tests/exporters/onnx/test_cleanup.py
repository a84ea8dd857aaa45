"""A cleaned ONNX graph computes the same, with fewer nodes and weights as MatMul reads them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from graphprune.exporters.onnx.cleanup import clean_up


def drawn(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def model(nodes: list[Any], weights: dict[str, Any], *outputs: str) -> onnx.ModelProto:
    """A file of these nodes with one input x [batch, 4]."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, ["batch", None]) for o in outputs],
        [numpy_helper.from_array(w, name) for name, w in weights.items()],
    )
    for node in graph.node:
        node.doc_string = "from line 1"
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("unused.domain", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def cleaned(before: onnx.ModelProto) -> onnx.ModelProto:
    """The file after cleaning, which computes what it did."""
    held = ir.from_proto(before)
    clean_up(held)
    after = ir.to_proto(held)
    onnx.checker.check_model(after)
    assert [o.name for o in after.graph.output] == [o.name for o in before.graph.output]
    results = []
    for made in (before, after):
        session = onnxruntime.InferenceSession(
            made.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        results.append(session.run(None, {"x": drawn(3, 4)}))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    return after


def operators(made: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in made.graph.node)


def test_what_is_computed_twice_or_for_nobody_goes() -> None:
    node = helper.make_node
    after = cleaned(
        model(
            [
                node("Relu", ["x"], ["a"]),
                node("Relu", ["x"], ["b"]),
                node("Identity", ["b"], ["c"]),
                node("Add", ["a", "c"], ["y"]),
                node("Exp", ["x"], ["unread"]),
            ],
            {"unused": drawn(2)},
            "y",
        )
    )
    assert operators(after) == {"Relu": 1, "Add": 1}
    assert list(after.graph.initializer) == []
    assert [opset.domain for opset in after.opset_import] == [""]
    assert not any(n.doc_string or n.metadata_props for n in after.graph.node)


def test_a_weight_is_stored_as_its_product_reads_it() -> None:
    weight = drawn(5, 4)
    node = helper.make_node
    nodes = [node("Transpose", ["w"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["y"])]
    after = cleaned(model(nodes, {"w": weight}, "y"))
    assert operators(after) == {"MatMul": 1}
    (stored,) = after.graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(stored), weight.T)


def test_a_tied_weight_is_stored_once_and_turned_when_read() -> None:
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("Transpose", ["w"], ["t"], perm=[1, 0]),
        node("MatMul", ["h", "t"], ["y"]),
    ]
    after = cleaned(model(nodes, {"w": drawn(4, 5)}, "y"))
    assert operators(after) == {"MatMul": 2, "Transpose": 1}
    assert [i.name for i in after.graph.initializer] == ["w"]


def test_a_weight_that_is_an_output_stays_as_it_is() -> None:
    node = helper.make_node
    nodes = [node("Transpose", ["w"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["y"])]
    after = cleaned(model(nodes, {"w": drawn(5, 4)}, "y", "t"))
    assert operators(after)["MatMul"] == 1
    assert "t" in {name for n in after.graph.node for name in n.output}


def test_nodes_come_after_what_they_read() -> None:
    """The bodies of loops are left alone, their outputs too."""
    node = helper.make_node
    body = helper.make_graph(
        [node("Identity", ["x"], ["inner"])],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, ["batch", 4])],
    )
    other = helper.make_graph(
        [node("Neg", ["x"], ["negative"])],
        "other",
        [],
        [helper.make_tensor_value_info("negative", TensorProto.FLOAT, ["batch", 4])],
    )
    nodes = [
        node("ReduceSum", ["x"], ["s"], keepdims=0),
        node("Greater", ["s", "zero"], ["positive"]),
        node("If", ["positive"], ["y"], then_branch=body, else_branch=other),
    ]
    after = cleaned(model(nodes, {"zero": np.float32(0)}, "y"))
    (branch,) = [n for n in after.graph.node if n.op_type == "If"]
    kept = {a.name: [n.op_type for n in a.g.node] for a in branch.attribute}
    assert kept == {"then_branch": ["Identity"], "else_branch": ["Neg"]}
