"""SparseLinear against ONNX Runtime's own dynamic int8, on random weights with blocks of zeros.

The stock layer is DynamicQuantizeMatMul with a scale an output and bias, seven-bit weights where
the CPU lacks VNNI; all layers of a shape are timed interleaved, one thread by its CPU time, two by
the wall clock. A model has four layers of one node each, and only the first row of each output is
kept: as in a longer model weights come from the far caches, outputs use the same memory one after
the other, and ONNX Runtime's second thread is woken once. Needs graphprune-kernels.

    python -m benchmarks.kernels [--quick] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import graphprune_kernels
import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import NodeProto, TensorProto, helper, numpy_helper

from benchmarks.common import Row, Settings, machine, main
from graphprune.exporters.kernels.packing import WIDTH, Packed, pack
from graphprune.exporters.runtime.timing import default_clock, interleaved

SHAPES = ((384, 1536), (1536, 384), (768, 3072))  # inputs, outputs
HEIGHTS = (32, 16)
SPARSITIES = (0.0, 0.5, 0.8, 0.9)
TOKENS = (128, 1)
COPIES = 4  # layers of a model

Arrays = dict[str, npt.NDArray[Any]]


def measure(settings: Settings) -> Iterator[Row]:
    """A row for each layer, shape and number of threads."""
    rng = np.random.default_rng(0)
    bits = graphprune_kernels.needed_bits()
    print(f"{machine()['processor']}, kernels: {graphprune_kernels.isa()}, {bits} bits")
    for inputs, outputs in SHAPES[:1] if settings.quick else SHAPES:
        for tokens in TOKENS:
            layers = list(_layers(rng, inputs, outputs))
            single = _times(layers, tokens, 1, settings)
            double = _times(layers, tokens, 2, settings)
            one_wall = _times(layers, tokens, 1, settings, clock="wall")
            for layer, own, wall, both in zip(layers, single, one_wall, double, strict=True):
                yield {
                    "layer": f"{inputs} to {outputs}",
                    "tokens": tokens,
                    "blocks": layer.blocks,
                    "zeros": layer.zeros,
                    "µs": round(1000 * median(own) / COPIES),
                    "x int8": _ratio(single[0], own),
                    "quartiles": _quartiles(single[0], own),
                    "x int8, 2 threads": _ratio(double[0], both),
                    "2 threads x 1": _ratio(wall, both),
                }


@dataclass(frozen=True, slots=True)
class Layer:
    """One form of a layer, several times in one model.

    Attributes:
        blocks: "int8" for ONNX Runtime's own, or "32x4".
        zeros: fraction of blocks that hold zeros only.
        model: the ONNX file.
    """

    blocks: str
    zeros: float
    model: bytes


def _layers(rng: np.random.Generator, inputs: int, outputs: int) -> Iterator[Layer]:
    weights = rng.normal(size=(COPIES, outputs, inputs)).astype(np.float32)
    bias = rng.normal(size=outputs).astype(np.float32)
    yield Layer("int8", 0.0, _model([_stock(w, bias) for w in weights], inputs))
    for height in HEIGHTS:
        for zeros in SPARSITIES:
            nodes = [_sparse(_thinned(rng, w, height, zeros), height, bias) for w in weights]
            yield Layer(f"{height}x{WIDTH}", zeros, _model(nodes, inputs))


def _thinned(
    rng: np.random.Generator, weight: npt.NDArray[np.float32], height: int, zeros: float
) -> npt.NDArray[np.float32]:
    kept = rng.random((weight.shape[0] // height, weight.shape[1] // WIDTH)) >= zeros
    return weight * kept.repeat(height, 0).repeat(WIDTH, 1)


def _stock(
    weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32]
) -> tuple[NodeProto, Arrays]:
    largest = 64 if graphprune_kernels.needed_bits() == 7 else 127
    scales = np.abs(weight).max(1) / largest
    codes = np.rint(weight / scales[:, None]).astype(np.int8)
    arrays: Arrays = {
        "codes": np.ascontiguousarray(codes.T), "scales": scales.astype(np.float32),
        "zeros": np.zeros(len(scales), np.int8), "bias": bias,
    }  # fmt: skip
    node = helper.make_node("DynamicQuantizeMatMul", ["x", *arrays], ["y"], domain="com.microsoft")
    return node, arrays


def _sparse(
    weight: npt.NDArray[np.float32], height: int, bias: npt.NDArray[np.float32]
) -> tuple[NodeProto, Arrays]:
    packed = pack(weight, height, graphprune_kernels.needed_bits())
    return sparse_node(packed), {
        "blocks": packed.blocks, "columns": packed.columns, "starts": packed.starts,
        "scales": packed.scales, "bias": np.pad(bias, (0, len(packed.scales) - len(bias))),
    }  # fmt: skip


def sparse_node(packed: Packed) -> NodeProto:
    """A node SparseLinear from x to y."""
    names = ["x", "blocks", "columns", "starts", "scales", "bias"]
    node = helper.make_node("SparseLinear", names, ["y"], domain="graphprune", bits=packed.bits)
    for name, value in {"outputs": packed.outputs, "inputs": packed.inputs}.items():
        node.attribute.append(helper.make_attribute(name, value))
    return node


def _model(layers: list[tuple[NodeProto, Arrays]], inputs: int) -> bytes:
    """Layers that all read x; the outputs are the first row of each."""
    nodes, initializers = [], [numpy_helper.from_array(np.array(0), "first")]
    for number, (node, arrays) in enumerate(layers):
        for name, array in arrays.items():
            initializers.append(numpy_helper.from_array(array, f"{name}{number}"))
        node.input[:] = ["x", *(f"{name}{number}" for name in arrays)]
        node.output[0] = f"all{number}"
        nodes += [node, helper.make_node("Gather", [f"all{number}", "first"], [f"y{number}"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", inputs])
    rows = [
        helper.make_tensor_value_info(f"y{number}", TensorProto.FLOAT, None)
        for number in range(len(layers))
    ]
    graph = helper.make_graph(nodes, "layers", [x], rows, initializers)
    domains = {"": 18, "com.microsoft": 1, "graphprune": 1}
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid(*d) for d in domains.items()], ir_version=8
    )
    return model.SerializeToString()


def _times(
    layers: list[Layer], tokens: int, threads: int, settings: Settings, clock: Any = None
) -> list[list[float]]:
    sessions = [_session(layer.model, threads) for layer in layers]
    shape = (tokens, sessions[0].get_inputs()[0].shape[1])
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    return interleaved(
        sessions, {"x": x}, repeats=settings.repeats, runs=5, clock=clock or default_clock(threads)
    )


def _session(model: bytes, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # The pool of one session would compete with the next one's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    graphprune_kernels.register(options)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _ratio(slow: list[float], fast: list[float]) -> float:
    return median(_ratios(slow, fast))


def _quartiles(slow: list[float], fast: list[float]) -> str:
    low, high = np.quantile(_ratios(slow, fast), [0.25, 0.75])
    return f"{low:.2f}-{high:.2f}"


def _ratios(slow: list[float], fast: list[float]) -> list[float]:
    return [a / b for a, b in zip(slow, fast, strict=True)]


if __name__ == "__main__":
    main("kernels", measure)
