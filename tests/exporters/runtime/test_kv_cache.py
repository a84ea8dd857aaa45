"""Feeds of a cache: what is given and fits stays, the rest is zeros of the mask's length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import GraphPruneError
from graphprune.exporters.runtime.kv_cache import Feeds, filled, shapes_of
from graphprune.ir.decoding import IDS, MASK, is_past

KEY, VALUE = "past_key_values.0.key", "past_key_values.0.value"
SHAPES: dict[str, list[int | str]] = {
    IDS: ["batch", "sequence"],
    MASK: ["batch", "past+sequence"],
    KEY: ["batch", 2, "past", 8],
    VALUE: ["batch", 3, "past", 4],
}


def feeds(batch: int, new: int, past: int) -> Feeds:
    return {IDS: np.ones((batch, new), np.int64), MASK: np.ones((batch, past + new), np.int64)}


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 5))
def test_the_past_is_what_the_mask_has_beside_the_new_tokens(
    batch: int, new: int, past: int
) -> None:
    found = filled(SHAPES, feeds(batch, new, past))
    assert list(found) == list(SHAPES)
    assert (found[KEY].shape, found[VALUE].shape) == ((batch, 2, past, 8), (batch, 3, past, 4))
    assert not found[KEY].any()
    assert found[KEY].dtype == np.float32


def test_a_cache_that_fits_stays_and_one_of_other_heads_becomes_zeros() -> None:
    given_: Feeds = {
        **feeds(1, 2, 3),
        KEY: np.ones((1, 2, 3, 8), np.float32),
        VALUE: np.ones((1, 4, 3, 4), np.float32),
    }
    found = filled(SHAPES, given_)
    assert found[KEY] is given_[KEY]
    assert found[IDS] is given_[IDS]
    assert found[VALUE].shape == (1, 3, 3, 4)
    assert not found[VALUE].any()
    with pytest.raises(GraphPruneError, match=r"value' has shape \[1, 4, 3, 4\].*\[1, 3, 3, 4\]"):
        filled(SHAPES, given_, strict=True)
    del given_[VALUE]
    assert filled(SHAPES, given_, strict=True)[KEY] is given_[KEY]


def test_a_mask_shorter_than_the_tokens_is_refused() -> None:
    with pytest.raises(GraphPruneError, match="2 long for 3 new tokens"):
        filled(SHAPES, {**feeds(1, 3, 0), MASK: np.ones((1, 2), np.int64)})


def test_models_without_a_cache_need_no_mask() -> None:
    x = np.zeros((2, 3), np.float32)
    assert filled({"x": ["batch", 3]}, {"x": x, "unused": x}) == {"x": x}


@dataclass
class Input:
    """As onnxruntime describes one."""

    name: str
    shape: list[Any]


class Session:
    def get_inputs(self) -> list[Input]:
        return [Input(name, shape) for name, shape in SHAPES.items()]


def test_inputs_of_a_cache_are_known_by_name() -> None:
    assert shapes_of(Session()) == SHAPES
    assert [name for name in SHAPES if is_past(name)] == [KEY, VALUE]
    assert not is_past("past_key_values_count")
