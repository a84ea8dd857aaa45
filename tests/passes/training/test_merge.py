"""Redundant units: which stand for others, and that merging equal ones changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

from graphprune.axes import AxisGroup, AxisGroups, axis_groups
from graphprune.ir.program import Program
from graphprune.passes.training.merge import (
    Merge,
    find_dominating,
    merge_units,
    plan_merge,
    unit_distances,
)
from graphprune.rewrite.shrink import shrink

aten = torch.ops.aten


def test_representatives_are_what_the_algorithm_promises() -> None:
    """Similar, stable, dominating; a cycle of four loses nobody."""
    drawn = torch.Generator().manual_seed(0)
    for _ in range(300):
        k = int(torch.randint(1, 9, (), generator=drawn))
        upper = (torch.rand(k, k, generator=drawn) < torch.rand((), generator=drawn)).triu(1)
        similar = upper | upper.T | torch.eye(k, dtype=torch.bool)
        into = find_dominating(similar)
        assert all(similar[i, r] for i, r in enumerate(into))
        assert all(into[r] == r for r in into)
        assert similar[:, sorted(set(into))].any(1).all()
    assert find_dominating(torch.eye(5, dtype=torch.bool)) == [0, 1, 2, 3, 4]
    assert find_dominating(torch.ones(4, 4, dtype=torch.bool)) == [3, 3, 3, 3]
    cycle = torch.eye(4, dtype=torch.bool)
    for i in range(4):
        cycle[i, (i + 1) % 4] = cycle[(i + 1) % 4, i] = True
    assert find_dominating(cycle) == [0, 1, 2, 3]
    star = torch.eye(4, dtype=torch.bool)
    star[0, :] = star[:, 0] = True
    assert find_dominating(star) == [0, 0, 0, 0]


@pytest.fixture
def program(program_of: Callable[..., Program]) -> Program:
    """down(relu(up(x) + bias)) with six neurons, the last one like the first."""

    def write(graph: fx.Graph, node: dict[str, fx.Node]) -> tuple[fx.Node, ...]:
        up = graph.call_function(aten.linear.default, (node["x"], node["up"], node["bias"]))
        hidden = graph.call_function(aten.relu.default, (up,))
        return (graph.call_function(aten.linear.default, (hidden, node["down"])),)

    tensors = {"up": torch.randn(6, 4), "bias": torch.randn(6), "down": torch.randn(3, 6)}
    for name in ("up", "bias"):
        tensors[name][5] = tensors[name][0]
    return program_of(tensors, {"x": torch.randn(7, 4)}, write)


def neurons(program: Program) -> tuple[AxisGroups, AxisGroup]:
    groups = axis_groups(program)
    (group,) = [g for g in groups.with_role("neuron") if g.size == 6]
    return groups, group


def output(program: Program) -> Tensor:
    (y,) = program.run(program.forward.example)
    return y


def test_equal_units_merge_into_one_and_nothing_changes(program: Program) -> None:
    groups, group = neurons(program)
    plan = plan_merge(program, groups, group, 0.0)
    assert isinstance(plan, Merge)
    assert plan.into == (5, 1, 2, 3, 4, 5)
    assert plan.kept == [1, 2, 3, 4, 5]
    merged = merge_units(program, groups, group, plan.into)
    down = program.tensors["down"]
    assert torch.equal(merged.tensors["down"][:, 5], down[:, 0] + down[:, 5])
    assert torch.equal(merged.tensors["down"][:, :5], down[:, :5])
    small = shrink(merged, {group.id: plan.kept})
    torch.testing.assert_close(output(small), output(program))
    assert not torch.allclose(output(shrink(program, {group.id: plan.kept})), output(program))


def test_distances_are_of_what_comes_in_alone(program: Program) -> None:
    groups, group = neurons(program)
    incoming = torch.cat([program.tensors["up"], program.tensors["bias"][:, None]], 1)
    expected = (incoming[:, None] - incoming[None]).abs().amax(-1).double()
    torch.testing.assert_close(unit_distances(program, groups, group), expected)


@pytest.mark.parametrize("theta", [0.0, 1.5, 100.0])
def test_units_within_theta_are_similar(theta: float, program: Program) -> None:
    groups, group = neurons(program)
    plan = plan_merge(program, groups, group, theta)
    assert isinstance(plan, Merge)
    assert list(plan.into) == find_dominating(plan.distances <= theta)
    assert all(float(plan.distances[i, r]) <= theta for i, r in enumerate(plan.into))
    assert len(plan.kept) == 1 or theta < 100


def test_what_cannot_be_merged_says_why(program: Program) -> None:
    groups, group = neurons(program)
    frozen = replace(group, frozen=("no rule for 'sort'",))
    assert plan_merge(program, groups, frozen, 0.0) == "its axis is frozen: no rule for 'sort'"
    normed = plan_merge(program, groups, replace(group, normalized=True), 0.0)
    assert normed == "its axis is normalized: a unit's output is not simply added"
    (last,) = [g for g in groups if g.size == 3]
    found = plan_merge(program, groups, replace(last, frozen=(), normalized=False), 0.0)
    assert found == "its output is read by something that is no linear layer"
