"""What a saved graph may call: names come back, and nothing off the list resolves."""

from __future__ import annotations

import operator
import os
from typing import Any

import pytest
import torch

from graphprune.axes.rules import RULES
from graphprune.errors import ArtifactError, UnsupportedError
from graphprune.storage.allowlist import (
    allowed,
    is_arithmetic,
    on_tensors,
    resolve,
    target_name,
)


@pytest.mark.parametrize(
    "name", ["aten::linear.default", "aten::sym_size.int", "operator.mul", "math.floor",
             "torch.sym_max", "graphprune::grouped_mm.default"],
)  # fmt: skip
def test_targets_come_back(name: str) -> None:
    assert target_name(resolve(name)) == name


HOSTILE_TARGETS: list[Any] = [
    "os.system", "posix.system", "builtins.eval", "builtins.exec", "operator.methodcaller",
    "operator.attrgetter", "aten::from_file.default", "aten::add_.Tensor", "aten::add.out",
    "aten::nothing.default", "aten::linear", "aten::__class__.default", "aten::linear.__class__",
    "aten::linear._schema", "aten::save.default", "c10d::allreduce_.default", "torch.load",
    "graphprune::attention.__init__", "graphprune::attention.default",
    "aten::_convert_indices_from_coo_to_csr.default", "aten::_unsafe_index.Tensor",
    "aten::_unsafe_index_put.default", "aten::segment_reduce.default", "aten::ctc_loss.Tensor",
    "aten::_embedding_bag.default", "aten::native_batch_norm.default",
        "aten::_weight_norm.default",
    "quantized::linear_prepack.default", "../x", "", None, 3, [],
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_TARGETS, ids=str)
def test_other_targets_are_refused(name: Any) -> None:
    with pytest.raises(ArtifactError, match="not one that a saved graph may call"):
        resolve(name)


def overloads() -> list[torch._ops.OpOverload]:
    """Every overload of every ATen operator that has a rule."""
    packets = [getattr(torch.ops.aten, name, None) for name in sorted(RULES)]
    return [getattr(p, o) for p in packets if p is not None for o in p.overloads()]


def test_an_overload_is_allowed_exactly_where_its_name_resolves() -> None:
    count = 0
    for target in overloads():
        if allowed(target):
            assert resolve(target_name(target)) is target
            count += 1
            continue
        with pytest.raises(UnsupportedError, match="cannot be saved"):
            target_name(target)
        with pytest.raises(ArtifactError):
            resolve(f"{target._schema.name}.{target._overloadname}")
    assert count > 300


def test_nothing_that_is_allowed_writes_to_an_argument() -> None:
    for target in overloads():
        if allowed(target):
            schema = target._schema
            assert not any(a.alias_info and a.alias_info.is_write for a in schema.arguments), target
            assert on_tensors(target)


@pytest.mark.parametrize("target", [operator.add, operator.getitem, torch.sym_max])
def test_arithmetic_of_sizes_is_allowed(target: Any) -> None:
    assert is_arithmetic(target)
    assert resolve(target_name(target)) is target


@pytest.mark.parametrize(
    "target",
    [os.system, eval, operator.attrgetter, torch.add, torch.ops.aten.add, "aten::add.Tensor"],
    ids=["system", "eval", "attrgetter", "torch.add", "packet", "text"],
)
def test_other_functions_are_not_saved(target: Any) -> None:
    assert not is_arithmetic(target)
    with pytest.raises(UnsupportedError, match="cannot be saved"):
        target_name(target)


def test_overloads_for_numbers_and_text_alone_are_not_on_tensors() -> None:
    aten = torch.ops.aten
    assert on_tensors(aten.add.Tensor)
    assert on_tensors(aten.zeros.default)
    assert not on_tensors(aten.add.str)
    assert not on_tensors(aten.add.int)
