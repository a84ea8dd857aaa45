"""Nestings as JSON: known containers come back equal, others as outputs with names."""

from __future__ import annotations

import json
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import ArtifactError, UnsupportedError
from graphprune.storage.treespec import Output, decode_spec, encode_spec

Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    "tree",
    [1, [1, 2], (1, [2, 3]), {"b": 1, "a": (2,)}, OrderedDict(z=1, y=[2]), {1: 2}, [], ()],
    ids=str,
)
def test_nestings_come_back(tree: Any) -> None:
    spec = pytree.tree_flatten(tree)[1]
    again = decode_spec(json.loads(json.dumps(encode_spec(spec))))
    assert again == spec


def test_unknown_containers_become_outputs_with_attributes() -> None:
    spec = pytree.tree_flatten(Pair(1, [2, 3]))[1]
    again = pytree.tree_unflatten([1, 2, 3], decode_spec(json.loads(json.dumps(encode_spec(spec)))))
    assert isinstance(again, Output)
    assert (again.a, again["b"], again[0]) == (1, [2, 3], 1)
    with pytest.raises(AttributeError):
        _ = again.c


def again(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """A spec after a way through JSON."""
    return decode_spec(json.loads(json.dumps(encode_spec(spec))))


TREES = st.recursive(
    st.integers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=3)
        | st.dictionaries(st.text(), inner, max_size=3).map(OrderedDict)
        | st.dictionaries(st.text(), inner, max_size=3).map(Output)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(TREES)
def test_nested_containers_hold_the_same_leaves_again(tree: Any) -> None:
    leaves, spec = pytree.tree_flatten(tree)
    found = again(spec)
    assert found == spec
    back = pytree.tree_unflatten(leaves, found)
    assert back == tree
    assert type(back) is type(tree)


def test_outputs_are_read_by_name_attribute_and_position() -> None:
    output = Output(logits=1, hidden=(2, 3))
    assert (output["logits"], output.hidden, output[1], output[:1]) == (1, (2, 3), (2, 3), (1,))
    paths = [path for path, _ in pytree.tree_flatten_with_path(output)[0]]
    assert list(map(pytree.keystr, paths)) == ["['logits']", "['hidden'][0]", "['hidden'][1]"]


class Bag:
    """A container that is registered, as those of libraries are."""

    def __init__(self, **parts: Any) -> None:
        self.parts = parts


def test_registered_containers_come_back_where_they_are_known() -> None:
    pytree.register_pytree_node(
        Bag,
        lambda bag: (list(bag.parts.values()), list(bag.parts)),
        lambda values, names: Bag(**dict(zip(names, values, strict=True))),
        serialized_type_name="tests.Bag",
    )
    try:
        spec = pytree.tree_flatten([Bag(a=1, b=(2,))])[1]
        data = encode_spec(spec)
        assert decode_spec(json.loads(json.dumps(data))) == spec
    finally:
        pytree._deregister_pytree_node(Bag)
    # Elsewhere, where nobody has registered it, its children go by position.
    unknown = pytree.tree_unflatten([1, 2], decode_spec(data))
    assert unknown == [Output({"0": 1, "1": (2,)})]


@pytest.mark.parametrize("data", [3, "list", [], {"set": []}], ids=str)
def test_what_is_no_nesting_is_refused(data: Any) -> None:
    with pytest.raises(ArtifactError, match="that graphprune writes"):
        decode_spec(data)


def test_keys_that_are_no_text_or_number_are_refused() -> None:
    spec = pytree.tree_flatten({(1, 2): 3})[1]
    with pytest.raises(UnsupportedError, match=r"keys \[\(1, 2\)\] cannot be saved"):
        encode_spec(spec)
