"""Items: what there is to choose, found in graphs of all kinds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from graphprune.axes import axis_groups
from graphprune.axes.branches import branches
from graphprune.ir.program import Program
from graphprune.passes.budget.items import EVERY, ZEROS, Item, Kept, find_items
from graphprune.passes.budget.sized import ROLES

Captured = Callable[[str], Program]


def items(
    program: Program, *, drop: bool = True, round_to: int = 16, sparse: bool = False
) -> list[Item]:
    groups, found = axis_groups(program), branches(program)
    usable = [g for g in groups.with_role(*ROLES) if not g.frozen and not g.normalized]
    droppable = [branch.id for branch in found if drop]
    return find_items(
        groups,
        usable,
        found,
        droppable=droppable,
        round_to=round_to,
        sparse={branch.id: ["a.weight"] for branch in found if sparse},
    )


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-gpt2", "tiny-llama", "tiny-vit"])
def test_attention_and_ffn_of_each_layer_in_order(captured: Captured, name: str) -> None:
    found = items(captured(name))
    assert [item.kind for item in found] == ["attention", "ffn"] * 2
    for item in found:
        assert item.branch is not None
        assert len(item.groups) == 1
        assert item.levels[0] is None
        assert item.levels[item.dense] == Kept((item.groups[0].size,))


def test_small_groups_have_a_level_for_each_unit_and_large_ones_multiples(
    captured: Captured,
) -> None:
    heads, neurons = items(captured("tiny-bert"))[:2]
    assert heads.levels == (None, *(Kept((n,)) for n in (1, 2, 3, 4)))
    assert neurons.levels == (None, *(Kept((n,)) for n in (16, 32, 48, 64)))
    fine = items(captured("tiny-bert"), round_to=8)[1].levels
    kept = {count for level in fine if level for count in level.units}
    assert kept == set(range(8, 65, 8))


def test_branches_that_may_not_go_have_no_such_level(captured: Captured) -> None:
    assert all(item.levels[0] is not None for item in items(captured("tiny-bert"), drop=False))


def test_every_other_level_may_have_zero_blocks_too(captured: Captured) -> None:
    for plain, item in zip(
        items(captured("tiny-bert")), items(captured("tiny-bert"), sparse=True), strict=True
    ):
        assert item.levels[item.dense] == plain.levels[plain.dense]
        assert tuple(item.levels[j] for j in item.whole) == plain.levels[1:]
        assert item.levels[0] is None
        zeros = {level for level in item.levels if level is not None and level.zeros}
        some = plain.levels[:0:-EVERY]
        assert zeros == {Kept(level.units, part) for level in some if level for part in ZEROS}
        assert len(item.levels) == len(plain.levels) + len(zeros)


def test_a_group_that_branches_share_is_an_item_of_its_own(captured: Captured) -> None:
    """Position biases tie the heads of a stack; shared layers are one set of weights."""
    t5 = items(captured("tiny-t5"))
    shared = [item for item in t5 if item.branch is None]
    assert shared
    assert all(len(item.groups) == 1 and item.levels[0] is not None for item in shared)
    albert = items(captured("tiny-albert"), drop=False)
    assert [item.branch for item in albert] == [None, None]


def test_a_model_without_branches_has_its_groups(captured: Captured) -> None:
    found = items(captured("tiny-mlp"))
    assert [item.kind for item in found] == ["neuron", "neuron"]
    assert all(item.branch is None for item in found)
