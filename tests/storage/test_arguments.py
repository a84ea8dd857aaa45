"""Arguments as JSON: every kind comes back equal, and nothing else is read or written."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from graphprune.errors import ArtifactError, UnsupportedError
from graphprune.storage.arguments import decode, encode

VALUES = [
    None, True, 3, -0.5, "tanh", math.inf, -math.inf, [1, [2.0, None]], (1, "a"), {"k": (1,)},
    slice(None, 3, None), torch.float32, torch.bool, torch.strided, torch.preserve_format,
    torch.device("cpu"), torch.device("cuda:1"), ...,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_arguments_come_back(value: Any) -> None:
    text = json.dumps(encode(value), allow_nan=False)
    again = decode(json.loads(text), {})
    assert again == value
    assert type(again) is type(value)


def test_nan_and_nodes_come_back() -> None:
    node = fx.Graph().placeholder("x")
    assert math.isnan(decode(encode(math.nan), {}))
    assert decode(encode([node]), {"x": node}) == [node]


@pytest.mark.parametrize(
    "value", [object(), b"x", {1, 2}, 1j], ids=["object", "bytes", "set", "complex"]
)
def test_other_arguments_are_refused(value: Any) -> None:
    with pytest.raises(UnsupportedError, match="cannot be saved"):
        encode(value)


PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.sampled_from([torch.int64, torch.complex64, torch.sparse_coo, torch.channels_last, ...])
)  # fmt: skip
NESTED = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
        | st.builds(slice, inner, inner, inner)
    ),
    max_leaves=8,
)


def typed(value: Any) -> Any:
    """A value with the types of all of its parts, which == alone does not tell apart."""
    if isinstance(value, list | tuple):
        return type(value), [typed(v) for v in value]
    if isinstance(value, dict):
        return dict, [(typed(k), typed(v)) for k, v in value.items()]
    if isinstance(value, slice):
        return slice, [typed(v) for v in (value.start, value.stop, value.step)]
    return type(value), value


@settings(max_examples=60, deadline=None)
@given(NESTED)
def test_nested_arguments_come_back(value: Any) -> None:
    text = json.dumps(encode(value), allow_nan=False)
    assert typed(decode(json.loads(text), {})) == typed(value)


def test_subclasses_become_plain_numbers() -> None:
    """fx leaves e.g. IntEnum members and torch.Size in graphs."""
    assert typed(encode(torch.Size([2, 3]))) == typed({"tuple": [2, 3]})

    class Count(int):
        pass

    assert type(encode(Count(3))) is int


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"node": "missing"},
        {"node": 3},
        {"dtype": "float31"},
        {"dtype": "nn"},
        {"float": "1e3"},
        {"float": None},
        {"call": "os.system"},
        {"tuple": [], "list": []},
        [{"tuple": [{"layout": "dense"}]}],
        (1, 2),
    ],
    ids=str,
)
def test_what_encode_does_not_write_is_refused(data: Any) -> None:
    with pytest.raises(ArtifactError, match="that graphprune writes"):
        decode(data, {"x": fx.Graph().placeholder("x")})
