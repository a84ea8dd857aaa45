"""Lowering: a sparse graph computes what the dense one does with the weights that its codes mean.

ONNX Runtime without kernels runs the function that the file carries, in float, so that only the
rounding of weights is between the two.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from graphprune.exporters.kernels.library import DOMAIN, OPERATOR
from graphprune.exporters.kernels.lower import Form, lower
from graphprune.exporters.kernels.packing import HEIGHTS, LARGEST, pack
from graphprune.exporters.quantize.layers import find_layers
from tests.exporters.kernels.networks import FLOAT, Floats, blocky, network, run

ACTIVATIONS = ("none", "gelu", "relu", "silu")


def kinds(model: object) -> list[str]:
    return [node.op_type for node in model.graph.node]  # type: ignore[attr-defined]


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 70), min_size=2, max_size=4),
    activation=st.sampled_from(ACTIVATIONS),
    form=st.builds(Form, st.sampled_from(HEIGHTS), st.sampled_from(list(LARGEST))),
    gemm=st.booleans(),
    biased=st.booleans(),
    zeros=st.sampled_from([0.0, 0.6, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_lowered_equals_dense_of_the_rounded_weights(
    sizes: list[int],
    activation: str,
    form: Form,
    gemm: bool,
    biased: bool,
    zeros: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    weights = [
        blocky(rng, out, into, form.height, zeros) for into, out in itertools.pairwise(sizes)
    ]
    biases = [rng.standard_normal(len(w)).astype(np.float32) if biased else None for w in weights]
    activations = [activation] * len(weights)
    model = network(weights, activations, biases, gemm=gemm)
    lower(model, {layer: form for layer in find_layers(model)})
    rounded = [pack(w, form.height, form.bits).unpacked() for w in weights]
    x = rng.standard_normal((3, sizes[0]) if gemm else (2, 3, sizes[0])).astype(np.float32)
    (expected,) = run(network(rounded, activations, biases, gemm=gemm), x=x)
    (actual,) = run(model, x=x)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    sparse = [node for node in model.graph.node if node.domain == DOMAIN]
    assert len(sparse) == len(weights)
    assert set(kinds(model)) <= {OPERATOR, "Identity"}
    assert len(model.functions) == 1


def two(activation: str) -> tuple[list[Floats], list[Floats | None], list[str]]:
    rng = np.random.default_rng(0)
    weights = [blocky(rng, 32, 8, 32, 0.5), blocky(rng, 8, 32, 32, 0.5)]
    return weights, [np.ones(32, np.float32), None], [activation, "none"]


def test_only_the_chosen_layers_are_replaced() -> None:
    weights, biases, activations = two("relu")
    model = network(weights, activations, biases)
    first, _ = find_layers(model)
    lower(model, {first: Form(32, 8)})
    assert kinds(model) == [OPERATOR, "MatMul", "Identity"]
    assert {i.name for i in model.graph.initializer} >= {"w1"}
    assert "w0" not in {i.name for i in model.graph.initializer}


def test_nothing_chosen_changes_nothing() -> None:
    weights, biases, activations = two("relu")
    model = network(weights, activations, biases)
    before = model.SerializeToString()
    lower(model, {})
    assert model.SerializeToString() == before


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("value", ["p0", "s0"])
def test_what_others_read_stays_a_value(activation: str, value: str) -> None:
    weights, biases, activations = two(activation)
    model = network(weights, activations, biases)
    model.graph.output.append(helper.make_tensor_value_info(value, FLOAT, ["batch", "length", 32]))
    form = Form(32, 8)
    lower(model, {layer: form for layer in find_layers(model)})
    dense = network([pack(w, 32, 8).unpacked() for w in weights], activations, biases)
    dense.graph.output.append(model.graph.output[1])
    x = np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)
    for actual, expected in zip(run(model, x=x), run(dense, x=x), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_gelu_by_tanh_is_another_function_and_stays() -> None:
    weights, biases, activations = two("gelu")
    model = network(weights, activations, biases)
    gelu = next(node for node in model.graph.node if node.op_type == "Gelu")
    gelu.attribute.append(helper.make_attribute("approximate", "tanh"))
    lower(model, {layer: Form(32, 8) for layer in find_layers(model)})
    assert "Gelu" in kinds(model)
