"""Small ONNX models of products, with weights of which blocks are zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper

Floats = npt.NDArray[np.float32]
FLOAT = onnx.TensorProto.FLOAT


def blocky(
    rng: np.random.Generator, outputs: int, inputs: int, height: int, zeros: float
) -> Floats:
    """A random weight [outputs, inputs] of which a part of the blocks is zero."""
    strips, groups = -(-outputs // height), -(-inputs // 4)
    alive = rng.random((strips, groups)) >= zeros
    mask = alive.repeat(height, 0).repeat(4, 1)[:outputs, :inputs]
    return (rng.standard_normal((outputs, inputs)) * mask).astype(np.float32)


def activated(value: str, activation: str, output: str) -> list[onnx.NodeProto]:
    """Nodes that apply an activation."""
    if activation == "silu":
        gate = helper.make_node("Sigmoid", [value], [f"{output}_gate"])
        return [gate, helper.make_node("Mul", [value, f"{output}_gate"], [output])]
    kind = {"relu": "Relu", "gelu": "Gelu", "none": "Identity"}[activation]
    return [helper.make_node(kind, [value], [output])]


def network(
    weights: Sequence[Floats],
    activations: Sequence[str],
    biases: Sequence[Floats | None],
    *,
    gemm: bool = False,
) -> onnx.ModelProto:
    """Products one after another; x [batch, inputs] with Gemm, [batch, length, inputs] without."""
    nodes, constants, value = [], [], "x"
    for number, (weight, activation, bias) in enumerate(
        zip(weights, activations, biases, strict=True)
    ):
        name, product, output = f"w{number}", f"p{number}", f"y{number}"
        constants.append(numpy_helper.from_array(weight if gemm else weight.T.copy(), name))
        inputs = [value, name]
        if bias is not None:
            constants.append(numpy_helper.from_array(bias, f"b{number}"))
        if gemm:
            more = [f"b{number}"] * (bias is not None)
            nodes.append(helper.make_node("Gemm", [*inputs, *more], [product], transB=1))
        else:
            nodes.append(helper.make_node("MatMul", inputs, [product]))
            if bias is not None:
                nodes.append(helper.make_node("Add", [product, f"b{number}"], [f"s{number}"]))
                product = f"s{number}"
        nodes += activated(product, activation, output)
        value = output
    dims: list[Any] = ["batch"] if gemm else ["batch", "length"]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", FLOAT, [*dims, weights[0].shape[1]])],
        [helper.make_tensor_value_info(value, FLOAT, [*dims, len(weights[-1])])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto, **feeds: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """The outputs in plain ONNX Runtime, which has no kernels of ours."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return list(session.run(None, feeds))
