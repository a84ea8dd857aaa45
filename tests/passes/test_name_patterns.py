"""Name patterns: globs for names and the modules that hold them, and slips that are refused."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import RecipeError
from graphprune.ir.program import Program
from graphprune.passes import Magnitude
from graphprune.passes.name_patterns import (
    TensorNames,
    check_names,
    check_patterns,
    matches,
    refuse_unmatched,
)


@pytest.mark.parametrize(
    ("pattern", "name", "covered"),
    [
        ("a.b.weight", "a.b.weight", True),
        ("a.b", "a.b.weight", True),
        ("a.*.weight", "a.b.weight", True),
        ("*.b", "a.b.weight", True),
        ("a.1", "a.10.weight", False),
        ("b", "a.b.weight", False),
        ("A.b", "a.b.weight", False),
        ("re:a\\.[bc]\\.", "a.b.weight", True),
        ("re:b", "a.b.weight", False),
        ("re:.*b", "a.b.weight", True),
    ],
)
def test_patterns_cover_names_and_the_modules_that_hold_them(
    pattern: str, name: str, covered: bool
) -> None:
    assert matches(pattern, name) is covered


def test_patterns_that_can_only_be_slips_are_refused() -> None:
    for wrong in ("a.b", ["a"], (1,), ("",)):
        with pytest.raises(RecipeError, match="targets"):
            check_patterns("targets", wrong)
    with pytest.raises(RecipeError, match="no regular expression"):
        check_patterns("targets", ("re:[",))


PARTS = st.lists(st.sampled_from(["a", "b", "1", "10", "weight"]), min_size=1, max_size=4)
GLOBS = st.lists(st.sampled_from(["a", "b", "1", "*", "?", "1*"]), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(GLOBS, PARTS)
def test_a_glob_covers_a_name_or_one_of_its_parents(glob: list[str], parts: list[str]) -> None:
    pattern, name = ".".join(glob), ".".join(parts)
    parents = [name]
    while "." in parents[-1]:
        parents.append(parents[-1].rpartition(".")[0])
    assert matches(pattern, name) == any(fnmatchcase(parent, pattern) for parent in parents)


def tied() -> Program:
    tensors = {"table.weight": torch.zeros(2), "layer.bias": torch.zeros(2)}
    return Program(tensors, frozenset(tensors), {"head.weight": "table.weight"}, {})


def test_tied_tensors_go_by_each_of_their_names() -> None:
    names = TensorNames(tied())
    assert names.all() == ["table.weight", "head.weight", "layer.bias"]
    for pattern in ("head", "table", "re:h.*t"):
        assert names.match("table.weight", [pattern])
        assert not names.match("layer.bias", [pattern])
    assert names.match("made.by.a.pass", ["made"])
    assert not names.match("table.weight", [])


def test_a_pattern_that_matches_nothing_names_near_ones() -> None:
    refuse_unmatched("ignore", ["layer", "*"], ["layer.bias"])
    with pytest.raises(RecipeError, match=r"ignore: 'layer\.bia' matches nothing; did you mean"):
        refuse_unmatched("ignore", ["layer.bia"], ["layer.bias", "table.weight"])
    with pytest.raises(RecipeError, match=r"names look like \['layer.bias', 'table.weight'\]"):
        refuse_unmatched("ignore", ["zzz"], ["table.weight", "layer.bias"])


def test_targets_and_ignore_of_a_pass_are_both_checked() -> None:
    check_names(Magnitude(0.5, targets=("head",), ignore=("layer.*",)), tied())
    for step in (Magnitude(0.5, targets=("no",)), Magnitude(0.5, ignore=("no",))):
        with pytest.raises(RecipeError, match=r"(targets|ignore): 'no' matches nothing"):
            check_names(step, tied())
