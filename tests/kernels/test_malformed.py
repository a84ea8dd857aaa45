"""Malformed weights are a sentence that names the node, when the session starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.kernels.conftest import Opens
from tests.kernels.models import Layer, layer_of, random_packed

PACKED = random_packed(np.random.default_rng(0), 40, 30, 16, 7, 0.3)
LAYER = layer_of(PACKED, np.ones(40, np.float32))


def changed(name: str, index: int, value: float) -> Any:
    array = LAYER.arrays[name].copy()
    array.reshape(-1)[index] = value
    return array


MALFORMED = {
    "bits": (LAYER.having(bits=6), "bits must be 7 or 8, got 6"),
    "no bits": (LAYER.having(bits=None), "the attribute bits is missing"),
    "outputs": (LAYER.having(outputs=0), "outputs must be between 1 and 2147483647, got 0"),
    "more outputs": (LAYER.having(outputs=49), "starts must have 5 elements, got 4"),
    "inputs": (LAYER.having(inputs=-3), "inputs must be between 1 and 65793"),
    "many inputs": (LAYER.having(inputs=65794), "the int32 sums could overflow; got 65794"),
    "fewer inputs": (LAYER.having(inputs=28), "is beyond the 28 inputs"),
    "activation": (LAYER.having(activation="tanh"), "none, gelu, relu or silu, got tanh"),
    "long activation": (
        LAYER.having(activation="gelu" * 9), "none, gelu, relu or silu, got something long"
    ),
    "height": (
        LAYER.having(blocks=np.zeros((len(PACKED.blocks), 8, 4), np.int8)),
        "blocks must have the shape [count, 16 or 32, 4]",
    ),
    "width": (
        LAYER.having(blocks=PACKED.blocks.reshape(-1, 32, 2)), "blocks must have the shape"
    ),
    "other height": (
        LAYER.having(blocks=np.zeros((5, 32, 4), np.int8)), "columns must have 5 elements"
    ),
    "columns": (LAYER.having(columns=PACKED.columns[:-1]), "columns must have"),
    "rank": (LAYER.having(columns=PACKED.columns[:, None]), "columns must have one dimension"),
    "scales": (LAYER.having(scales=PACKED.scales[:40]), "scales must have 48 elements, got 40"),
    "bias": (LAYER.having(bias=np.ones(40, np.float32)), "bias must have 48 elements, got 40"),
    "first start": (LAYER.having(starts=changed("starts", 0, 1)), "begin with 0, got 1"),
    "negative start": (LAYER.having(starts=changed("starts", 1, -1)), "starts must not decrease"),
    "last start": (
        LAYER.having(starts=changed("starts", 3, 2**31 - 1)), "starts must end with the number"
    ),
    "large column": (LAYER.having(columns=changed("columns", -1, 8)), "column 8 is beyond"),
    "negative column": (LAYER.having(columns=changed("columns", 0, -1)), "columns must ascend"),
    "same column": (
        LAYER.having(columns=changed("columns", 1, PACKED.columns[0])), "columns must ascend"
    ),
    "infinite scale": (LAYER.having(scales=changed("scales", 3, np.inf)), "scales must be finite"),
    "bias that is NaN": (LAYER.having(bias=changed("bias", 3, np.nan)), "bias must be finite"),
    "codes": (LAYER.having(blocks=changed("blocks", 9, 65)), "blocks hold codes beyond 64"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_weights(opened: Opens, case: str) -> None:
    layer, message = MALFORMED[case]
    with pytest.raises(Exception, match=r"SparseLinear node 'up': ") as caught:
        opened(layer)
    assert message in str(caught.value)


def test_what_they_were_made_from_is_right(opened: Opens) -> None:
    assert opened(LAYER).run(None, {"x": np.ones((2, 30), np.float32)})[0].shape == (2, 40)


@pytest.mark.parametrize("name", ["blocks", "columns", "starts", "scales", "bias"])
def test_weights_must_be_initializers(opened: Opens, name: str) -> None:
    with pytest.raises(Exception, match=f"node 'up': the input {name} must be an initializer"):
        opened(replace(LAYER, fed=[name]))


def test_eight_bits_where_the_cpu_needs_seven(kernels: Any, opened: Opens) -> None:
    layer = layer_of(random_packed(np.random.default_rng(0), 40, 30, 16, 8, 0.3))
    if kernels.needed_bits() == 8:
        opened(layer)
        return
    with pytest.raises(Exception, match="this one needs 7: export again with bits=7"):
        opened(layer)


def test_eight_bits_with_small_codes_run_anywhere(opened: Opens) -> None:
    opened(LAYER.having(bits=8))


@pytest.mark.parametrize("shape", [(), (3, 29), (0,)])
def test_x_of_other_features(opened: Opens, shape: tuple[int, ...]) -> None:
    session = opened(replace(LAYER, dims=[None] * len(shape)))
    with pytest.raises(Exception, match="node 'up': x must have"):
        session.run(None, {"x": np.ones(shape, np.float32)})


def test_a_session_survives_an_error(opened: Opens) -> None:
    session = opened(replace(LAYER, dims=[None, None]))
    x = np.ones((2, 30), np.float32)
    before = session.run(None, {"x": x})[0]
    with pytest.raises(Exception, match="x must have 30 features in its last dimension, got 31"):
        session.run(None, {"x": np.ones((2, 31), np.float32)})
    assert (session.run(None, {"x": x})[0] == before).all()


def test_layers_are_what_they_are_called() -> None:
    assert all(isinstance(layer, Layer) for layer, _ in MALFORMED.values())
