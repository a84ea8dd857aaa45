from __future__ import annotations

from collections.abc import Callable

import pytest

from graphprune.axes import axis_groups
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.ir.program import Program
from graphprune.passes.structural.selection import Selection, Selector, select

Captured = Callable[[str], Program]


def _select(program: Program, wanted: Selector) -> Selection:
    return select(program, axis_groups(program), wanted)


def _names(selection: Selection) -> set[str]:
    return {o.tensor for g in selection.groups for o in g.occurrences}


def test_targets_and_ignore_narrow_a_role(captured: Captured) -> None:
    program = captured("tiny-mlp")
    everything = _select(program, Selector(("neuron",)))
    assert len(everything.groups) == 2
    first = _select(program, Selector(("neuron",), targets=("layers.0",)))
    assert len(first.groups) == 1
    assert "layers.0.weight" in _names(first)
    rest = _select(program, Selector(("neuron",), ignore=("layers.0",)))
    assert len(rest.groups) == 1
    assert "layers.0.weight" not in _names(rest)
    assert [reason for _, reason in rest.skipped] == ["ignored on request"]


def test_an_ignore_that_protects_nothing_is_an_error(captured: Captured) -> None:
    with pytest.raises(RecipeError, match=r"ignore: 'encoder.layer.0.*' matches nothing"):
        _select(captured("tiny-mlp"), Selector(("neuron",), ignore=("encoder.layer.0.*",)))


def test_a_group_is_found_by_its_id(captured: Captured) -> None:
    program = captured("tiny-mlp")
    wanted = axis_groups(program).with_role("neuron")[1]
    for pattern in (wanted.id, f"{wanted.id.split('[')[0]}*"):
        selection = _select(program, Selector((), groups=(pattern,), ignore=("layers.0",)))
        assert wanted.id in [g.id for g in selection.groups]


def test_a_target_that_matches_nothing_is_a_slip(captured: Captured) -> None:
    with pytest.raises(RecipeError, match=r"targets: 'layer\.0' matches nothing; "):
        _select(captured("tiny-mlp"), Selector(("neuron",), targets=("layer.0",)))
    with pytest.raises(RecipeError, match=r"groups: .* matches nothing; did you mean"):
        _select(captured("tiny-mlp"), Selector((), groups=("layers.0.weigth[0]",)))


def test_a_missing_role_says_what_there_is(captured: Captured) -> None:
    with pytest.raises(UnsupportedError, match=r"no axis group with role head .* neuron \(2\)"):
        _select(captured("tiny-mlp"), Selector(("head", "kv_group")))


def test_frozen_groups_are_refused_with_the_reason(captured: Captured) -> None:
    program = captured("tiny-mlp")
    frozen = next(g for g in axis_groups(program) if g.frozen)
    with pytest.raises(UnsupportedError, match=r"cannot prune .*: its axis is frozen"):
        _select(program, Selector((), groups=(frozen.id,)))


def test_a_frozen_group_among_others_is_skipped_with_the_reason(captured: Captured) -> None:
    selection = _select(captured("tiny-mlp"), Selector((), targets=("layers",)))
    assert selection.groups
    assert any(reason.startswith("its axis is frozen") for _, reason in selection.skipped)


def test_normalized_axes_only_on_request(captured: Captured) -> None:
    program = captured("tiny-vit")
    with pytest.raises(UnsupportedError, match="normalized=True"):
        _select(program, Selector(("residual",)))
    assert _select(program, Selector(("residual",), normalized=True)).groups
