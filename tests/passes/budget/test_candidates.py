"""Candidates at the old shapes are the models that are built of the same levels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from graphprune.axes import axis_groups
from graphprune.axes.branches import branches
from graphprune.calibration.gram import Remarks
from graphprune.ir.program import Program
from graphprune.passes.budget.candidates import Candidates, level_errors, statistics
from graphprune.passes.budget.choose import ROLES
from graphprune.passes.budget.items import find_items
from graphprune.passes.structural.allocation import others
from graphprune.passes.structural.statistics import in_execution_order
from graphprune.pipeline.base import Context
from graphprune.rewrite.drop import drop
from graphprune.rewrite.shrink import shrink
from tests.passes.budget.test_budget import batches

Captured = Callable[[str], Program]


def candidates(program: Program) -> Candidates:
    groups, found = axis_groups(program), branches(program)
    usable = [g for g in groups.with_role(*ROLES) if not g.frozen and not g.normalized]
    items = find_items(
        groups, usable, found, droppable=[branch.id for branch in found], round_to=16
    )
    data = batches(program)
    order = in_execution_order(groups, [g for item in items for g in item.groups])
    seen = statistics(program, groups, order, Context(calibration=data), 0.01, Remarks())
    return Candidates(program, groups, items, seen, data)


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-llama", "tiny-vit", "tiny-cnn", "tiny-mlp"])
def test_units_and_branches_that_are_gone_make_no_difference_to_the_shrunk_model(
    captured: Captured, name: str
) -> None:
    program = captured(name)
    found = candidates(program)
    levels = [i % len(item.levels) for i, item in enumerate(found.items)]
    masked = found.at(levels)
    gone, keep = [], {}
    for item, j in zip(found.items, levels, strict=True):
        level = item.levels[j]
        if level is None:
            assert item.branch is not None
            gone.append(item.branch)
            continue
        for group, kept in zip(item.groups, level, strict=True):
            order = torch.tensor(found.seen[group.id].order, dtype=torch.int64)
            if kept < group.size:
                keep[group.id] = others(group.size, order[: group.size - kept])
    plain = program.with_tensors({n: masked.tensors[n] for n in program.tensors})
    smaller = shrink(drop(plain, gone) if gone else plain, keep)
    assert smaller.num_parameters() < program.num_parameters()
    for batch in batches(program, 2):
        flat = program.forward.flatten((), batch)
        for ours, theirs in zip(smaller.run(flat), masked.run(flat), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "narrow"), [("tiny-bert", True), ("tiny-llama", True), ("tiny-mlp", False)]
)
def test_narrower_weights_compute_the_same(captured: Captured, name: str, narrow: bool) -> None:
    """Neurons between two products may go from tensors alone; heads are in the sizes of views."""
    program = captured(name)
    found = candidates(program)
    levels = [1 for _ in found.items]
    wide, thin = (found.at(levels, narrow=n) for n in (False, True))
    assert (sum(t.numel() for t in thin.tensors.values()) < wide.num_parameters()) == narrow
    for batch in batches(program, 2):
        flat = program.forward.flatten((), batch)
        for a, b in zip(wide.run(flat), thin.run(flat), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_groups_of_one_tensor_are_both_cut(captured: Captured) -> None:
    found = candidates(captured("tiny-mlp"))
    levels = [0 for _ in found.items]
    both = found.at(levels)
    for i, item in enumerate(found.items):
        alone = [0 if i == k else other.dense for k, other in enumerate(found.items)]
        cut = found.at(alone)
        for name in item.groups[0].tensors:
            zero = (cut.tensors[name] == 0) & (found.program.tensors[name] != 0)
            assert bool((both.tensors[name][zero] == 0).all())


def test_the_dense_candidate_loses_nothing_and_others_do(captured: Captured) -> None:
    found = candidates(captured("tiny-bert"))
    dense = [item.dense for item in found.items]
    assert found.loss(dense) == pytest.approx(0, abs=1e-6)
    assert found.loss([0] * len(dense)) > 1e-3
    assert found.difference(captured("tiny-bert")) == pytest.approx(0, abs=1e-6)


def test_errors_rise_as_units_go(captured: Captured) -> None:
    found = candidates(captured("tiny-bert"))
    for item in found.items:
        errors = level_errors(item, found.seen)
        assert errors == sorted(errors, reverse=True)
        assert errors[0] == 1
        assert errors[-1] == 0
