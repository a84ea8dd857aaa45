"""Analyses that are kept: how many a compile costs, and that they say what fresh ones would."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import graphprune as gp
from graphprune.axes import AxisGroups, algebra, axis_groups, groups, infer_axes
from graphprune.axes.rules import RULES
from graphprune.ir.program import Program
from graphprune.passes import PruneHeads, PruneNeurons
from graphprune.rewrite.shrink import shrink

Captured = Callable[[str], Program]
MODELS = ("tiny-bert", "tiny-albert", "tiny-llama", "tiny-mixtral", "tiny-cnn", "tiny-fused-vit")


@pytest.fixture
def analyzed(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """The programs that are analyzed while a test runs."""
    seen: list[Program] = []
    real = infer_axes

    def counted(program: Program) -> Any:
        seen.append(program)
        return real(program)

    groups._kept.clear()
    monkeypatch.setattr(groups, "infer_axes", counted)
    return seen


def fresh(program: Program) -> AxisGroups:
    """An analysis that knows of no other."""
    groups._kept.clear()
    return axis_groups(program)


def content(found: AxisGroups) -> Any:
    """What the groups and facts say, with nodes and axes by name."""
    names = {algebra.find(group.axis): group.id for group in found}

    def plain(value: Any) -> Any:
        if isinstance(value, algebra.Axis):
            axis = algebra.find(value)
            inner = [plain(child) for child in axis.children]
            return axis.kind, str(axis.size), names.get(axis), axis.normalized, inner
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else str(value)

    facts = {
        entry: {
            "dims": plain({node.name: dims for node, dims in f.dims.items()}),
            "extra": plain({node.name: axes for node, axes in f.extra.items()}),
            "sums": [
                plain([c.node, c.operand, c.slot, c.dim, c.axis, c.kind]) for c in f.contractions
            ],
            "roles": plain([f.attention, f.gathered, f.experts]),
            "sources": [sorted(map(str, f.weights)), sorted(map(str, f.activations))],
        }
        for entry, f in found.axes.facts.items()
    }
    return [group.to_json() for group in found], facts


def cut(program: Program, seed: int) -> dict[str, list[int]]:
    """Random units of some groups that may lose them."""
    draw = random.Random(seed)
    free = [g for g in axis_groups(program) if not g.frozen and not g.normalized]
    return {
        g.id: sorted(draw.sample(range(g.size), draw.randint(1, g.size)))
        for g in draw.sample(free, min(3, len(free)))
    }


@pytest.mark.parametrize("name", MODELS)
def test_kept_groups_are_what_a_fresh_analysis_finds(name: str, captured: Captured) -> None:
    program = captured(name)
    axis_groups(program)
    for seed in range(2):
        others = {n: torch.zeros_like(t) for n, t in program.tensors.items()}
        for same in (program.fork(), program.with_tensors(others)):
            found = axis_groups(program).on(same)
            assert content(found) == content(fresh(same))
            assert found.program is same
            for entry, facts in found.axes.facts.items():
                assert facts.dims.keys() <= set(same.entries[entry].graph.nodes)
        program = shrink(program, cut(program, seed))
        assert content(axis_groups(program)) == content(fresh(program))


def test_two_cuts_cost_two_analyses(captured: Captured, analyzed: list[Program]) -> None:
    gp.compile(captured("tiny-bert"), [PruneHeads(0.5), PruneNeurons(0.5)])
    assert len(analyzed) == 2


def test_what_changes_the_axes_is_analyzed_anew(
    captured: Captured, analyzed: list[Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = captured("tiny-mlp").fork()
    axis_groups(program)
    axis_groups(program.with_tensors({n: t + 1 for n, t in program.tensors.items()}))
    assert len(analyzed) == 1
    smaller = shrink(program, {g.id: [0, 1] for g in axis_groups(program) if not g.frozen})
    assert max(g.size for g in axis_groups(smaller) if not g.frozen) == 2
    assert len(analyzed) == 2
    relu = next(n for n in program.forward.graph.nodes if n.name.startswith("relu"))
    relu.replace_all_uses_with(relu.all_input_nodes[0])
    axis_groups(program)
    assert len(analyzed) == 3
    monkeypatch.setitem(RULES, "relu", lambda c: c.unknown())
    assert any("no rule" in why for g in axis_groups(program) for why in g.frozen)


def test_a_kept_analysis_holds_no_weights(captured: Captured, analyzed: list[Program]) -> None:
    axis_groups(captured("tiny-mlp"))
    (own,) = analyzed
    assert all(t.is_meta for t in own.tensors.values())


def test_names_of_a_program_hold_for_its_forks_too(captured: Captured) -> None:
    program = captured("tiny-llama")
    first, second, third = (group.id for group in axis_groups(program)[:3])
    # Each takes the name of the next: renamed twice, the first would be called as the third.
    renamed = replace(program, axis_names={first: second, second: third, third: first})
    found = axis_groups(renamed)
    assert [group.id for group in found[:3]] == [second, third, first]
    assert [group.id for group in found.on(renamed.fork())] == [group.id for group in found]
    assert [group.id for group in found.on(program)[:3]] == [first, second, third]
