"""Models of one SparseLinear, and what they compute in exact numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import FunctionProto, TensorProto, helper, numpy_helper

from graphprune.exporters.kernels.packing import WIDTH, Packed, pack

Floats = npt.NDArray[np.float32]
ACTIVATIONS = ("none", "gelu", "relu", "silu")
NAMES = ("blocks", "columns", "starts", "scales", "bias")


@dataclass(frozen=True)
class Layer:
    """One node, right or wrong.

    Attributes:
        arrays: initializers by name.
        attributes: of the node.
        dims: of x.
        fed: initializers that are inputs of the model instead.
        function: the model has a function of the operator's name, which adds up x.
    """

    arrays: Mapping[str, npt.NDArray[Any]]
    attributes: Mapping[str, int | str]
    dims: Sequence[int | str | None] = ("tokens", None)
    fed: Sequence[str] = field(default=())
    function: bool = False

    def having(self, **changes: Any) -> Layer:
        """The same with other arrays and attributes; None drops one."""
        arrays = {**self.arrays, **{k: v for k, v in changes.items() if k in NAMES}}
        attributes = {**self.attributes, **{k: v for k, v in changes.items() if k not in NAMES}}
        return replace(
            self,
            arrays={k: v for k, v in arrays.items() if v is not None},
            attributes={k: v for k, v in attributes.items() if v is not None},
        )

    def model(self) -> bytes:
        """The ONNX file."""
        node = helper.make_node(
            "SparseLinear", ["x", *self.arrays], ["y"], name="up", domain="graphprune"
        )
        for name, value in self.attributes.items():
            node.attribute.append(helper.make_attribute(name, value))
        tensors = [numpy_helper.from_array(array, name) for name, array in self.arrays.items()]
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.dims)]
        inputs += [
            helper.make_tensor_value_info(t.name, t.data_type, t.dims)
            for t in tensors
            if t.name in self.fed
        ]
        graph = helper.make_graph(
            [node], "one", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [t for t in tensors if t.name not in self.fed],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("graphprune", 1)]
        functions = [self._function()] if self.function else []
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions)
        return model.SerializeToString()

    def _function(self) -> FunctionProto:
        return helper.make_function(
            "graphprune", "SparseLinear", ["x", *self.arrays], ["y"],
            [helper.make_node("ReduceSum", ["x"], ["y"])],
            [helper.make_opsetid("", 17)], attributes=list(self.attributes),
        )  # fmt: skip


def layer_of(packed: Packed, bias: Floats | None = None, activation: str = "none") -> Layer:
    """A layer of packed weights; `bias` of each output."""
    names = ("blocks", "columns", "starts", "scales")
    arrays: dict[str, npt.NDArray[Any]] = {name: getattr(packed, name) for name in names}
    if bias is not None:
        arrays["bias"] = np.pad(bias, (0, len(packed.scales) - len(bias)))
    attributes: dict[str, int | str] = {
        "outputs": packed.outputs, "inputs": packed.inputs, "bits": packed.bits,
        "activation": activation,
    }  # fmt: skip
    return Layer(arrays, attributes, ("tokens", packed.inputs))


def random_packed(
    rng: np.random.Generator, outputs: int, inputs: int, height: int, bits: int, zeros: float
) -> Packed:
    """Random weights with a fraction of blocks of zeros."""
    shape = (-(-outputs // height), -(-inputs // WIDTH))
    kept = (rng.random(shape) >= zeros).repeat(height, 0).repeat(WIDTH, 1)[:outputs, :inputs]
    return pack((rng.normal(size=(outputs, inputs)) * kept).astype(np.float32), height, bits)


def expected(
    x: Floats, packed: Packed, bias: Floats | None = None, activation: str = "none"
) -> npt.NDArray[np.float64]:
    """What the operator computes: rows to uint8, exact sums, then float64."""
    codes, scales, zeros = _quantized(x.reshape(-1, packed.inputs))
    whole = packed.unpacked().astype(np.float64) / packed.scales[: packed.outputs, None]
    sums = (codes - zeros) @ np.rint(whole).astype(np.int64).T
    y = sums * scales * packed.scales[: packed.outputs].astype(np.float64)
    y = _ACTIVATIONS[activation](y + (0 if bias is None else bias))
    return y.reshape(*x.shape[:-1], packed.outputs)


def _quantized(x: Floats) -> tuple[npt.NDArray[np.int64], Floats, npt.NDArray[np.int64]]:
    """Codes, scales and zero points of rows, in float32 as the operator computes them."""
    low, high = x.min(1, initial=0, keepdims=True), x.max(1, initial=0, keepdims=True)
    scales = np.maximum(high / np.float32(255) - low / np.float32(255), np.finfo(np.float32).tiny)
    inverse = np.float32(1) / scales
    zeros = np.rint(-low * inverse)
    codes = np.clip(np.rint(x * inverse) + zeros, 0, 255)
    return codes.astype(np.int64), scales, zeros.astype(np.int64)


_ERF = np.vectorize(math.erf, otypes=[float])
_ACTIVATIONS = {
    "none": lambda y: y,
    "gelu": lambda y: y * 0.5 * (1 + _ERF(y / math.sqrt(2))),
    "relu": lambda y: np.maximum(y, 0),
    "silu": lambda y: y / (1 + np.exp(-y)),
}
