"""SparseLinear computes what it says, for every shape, activation and number of threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.conftest import Opens
from tests.kernels.models import (
    ACTIVATIONS,
    Floats,
    Layer,
    expected,
    layer_of,
    random_packed,
)

SHARED = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)


def run(session: Any, x: Floats) -> Floats:
    found: Floats = session.run(None, {"x": x})[0]
    return found


def assert_close(found: Floats, wanted: Any) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max(initial=0) <= 1e-5 * max(1, np.abs(wanted).max(initial=0))


@SHARED
@given(
    outputs=st.integers(1, 100),
    inputs=st.integers(1, 70),
    leading=st.lists(st.integers(0, 9), max_size=3),
    height=st.sampled_from([16, 32]),
    zeros=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    activation=st.sampled_from(ACTIVATIONS),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_it_computes_what_numpy_does(
    kernels: Any,
    opened: Opens,
    outputs: int,
    inputs: int,
    leading: list[int],
    height: int,
    zeros: float,
    activation: str,
    has_bias: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    packed = random_packed(rng, outputs, inputs, height, kernels.needed_bits(), zeros)
    bias = rng.normal(size=outputs).astype(np.float32) if has_bias else None
    layer = replace(layer_of(packed, bias, activation), dims=[None] * len(leading) + [inputs])
    x = (rng.normal(size=(*leading, inputs)) * 3 + rng.normal()).astype(np.float32)
    assert_close(run(opened(layer), x), expected(x, packed, bias, activation))


@pytest.mark.parametrize("tokens", [1, 7, 48, 49, 128, 500])
@pytest.mark.parametrize("height", [16, 32])
def test_two_threads_compute_what_one_does(
    kernels: Any, opened: Opens, tokens: int, height: int
) -> None:
    rng = np.random.default_rng(tokens)
    packed = random_packed(rng, 300, 520, height, kernels.needed_bits(), 0.3)
    layer = layer_of(packed, rng.normal(size=300).astype(np.float32), "gelu")
    x = rng.normal(size=(tokens, 520)).astype(np.float32)
    one, two = (run(opened(layer, threads), x) for threads in (1, 2))
    assert (one == two).all()
    assert_close(one, expected(x, packed, layer.arrays["bias"][:300], "gelu"))


def test_a_session_runs_on_several_threads_at_once(kernels: Any, opened: Opens) -> None:
    rng = np.random.default_rng(0)
    packed = random_packed(rng, 256, 512, 32, kernels.needed_bits(), 0.5)
    session = opened(layer_of(packed), 2)
    batches = [rng.normal(size=(t, 512)).astype(np.float32) for t in (1, 60, 130, 3, 200, 1)] * 4
    alone = [run(session, x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: run(session, x), batches))
    assert all((a == b).all() for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_that_is_not_finite_gives_nan_and_the_others_stay(
    kernels: Any, opened: Opens, strange: float, activation: str
) -> None:
    rng = np.random.default_rng(0)
    packed = random_packed(rng, 40, 30, 32, kernels.needed_bits(), 0.5)
    x = rng.normal(size=(6, 30)).astype(np.float32)
    session = opened(layer_of(packed, activation=activation))
    before = run(session, x)
    x[2, 29] = strange
    after = run(session, x)
    assert np.isnan(after[2]).all()
    assert (np.delete(after, 2, 0) == np.delete(before, 2, 0)).all()


def test_rows_do_not_depend_on_each_other(kernels: Any, opened: Opens) -> None:
    rng = np.random.default_rng(0)
    packed = random_packed(rng, 48, 64, 16, kernels.needed_bits(), 0.5)
    session = opened(layer_of(packed))
    x = (rng.normal(size=(53, 64)) * 10.0 ** rng.integers(-6, 6, (53, 1))).astype(np.float32)
    assert (run(session, x) == np.concatenate([run(session, row[None]) for row in x])).all()


def test_large_numbers_do_not_overflow_and_small_ones_do_not_vanish(
    kernels: Any, opened: Opens
) -> None:
    packed = random_packed(np.random.default_rng(0), 16, 8, 16, kernels.needed_bits(), 0.0)
    layer = layer_of(packed)
    x = np.array([[3e38, -3e38], [3e-30, -3e-30], [3, -3]], np.float32).repeat(4, 1)
    y = run(opened(layer.having(scales=layer.arrays["scales"] / np.float32(100))), x).astype(
        np.float64
    )
    assert np.allclose(y[0], y[2] * 1e38, rtol=1e-5)
    assert np.allclose(y[1], y[2] * 1e-30, rtol=1e-5, atol=0)


def test_outputs_without_blocks_are_their_bias(kernels: Any, opened: Opens) -> None:
    rng = np.random.default_rng(0)
    packed = random_packed(rng, 70, 20, 32, kernels.needed_bits(), 1.0)
    bias = rng.normal(size=70).astype(np.float32)
    y = run(opened(layer_of(packed, bias)), rng.normal(size=(5, 20)).astype(np.float32))
    assert len(packed.blocks) == 0
    assert (y == bias).all()


@pytest.mark.parametrize(
    ("dims", "wanted"),
    [
        (["batch", "sequence", 30], ["batch", "sequence", 40]),
        ([3, "sequence", 30], [3, "sequence", 40]),
        ([2, 30], [2, 40]),
    ],
)
def test_shapes_are_inferred(
    kernels: Any, opened: Opens, dims: list[Any], wanted: list[Any]
) -> None:
    packed = random_packed(np.random.default_rng(0), 40, 30, 32, kernels.needed_bits(), 0.5)
    session = opened(replace(layer_of(packed), dims=dims))
    assert session.get_outputs()[0].shape == wanted


def test_nothing_is_inferred_where_a_dimension_has_no_name(kernels: Any, opened: Opens) -> None:
    packed = random_packed(np.random.default_rng(0), 40, 30, 32, kernels.needed_bits(), 0.5)
    layer = replace(layer_of(packed), dims=[None, 30])
    assert run(opened(layer), np.ones((3, 30), np.float32)).shape == (3, 40)


def test_the_activation_may_be_left_out(kernels: Any, opened: Opens) -> None:
    packed = random_packed(np.random.default_rng(0), 40, 30, 32, kernels.needed_bits(), 0.5)
    layer: Layer = layer_of(packed)
    x = np.ones((3, 30), np.float32)
    assert (run(opened(layer.having(activation=None)), x) == run(opened(layer), x)).all()


def test_a_function_of_the_same_name_runs_where_the_library_is_missing(
    kernels: Any, opened: Opens
) -> None:
    """And the kernel runs where it is there, so that files can bring a fallback along."""
    import onnxruntime

    packed = random_packed(np.random.default_rng(0), 40, 30, 32, kernels.needed_bits(), 0.5)
    layer = replace(layer_of(packed), function=True)
    x = np.ones((3, 30), np.float32)
    plain = onnxruntime.InferenceSession(layer.model(), providers=["CPUExecutionProvider"])
    assert (run(plain, x) == 90).all()
    assert_close(run(opened(layer), x), expected(x, packed))
