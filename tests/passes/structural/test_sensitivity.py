"""Sensitivity: errors are those of the model's outputs, and times those of the cut model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch

from graphprune.errors import GraphPruneError, RecipeError, UnsupportedError
from graphprune.ir.program import Program
from graphprune.passes import PruneNeurons
from graphprune.passes.structural.sensitivity import sensitivity
from graphprune.pipeline.base import Context
from graphprune.pipeline.pipeline import Pipeline

Captured = Callable[[str], Program]


def batch(program: Program) -> tuple[torch.Tensor, ...]:
    return tuple(program.forward.example)


@pytest.mark.parametrize("score", ["obs", "activation", "magnitude", "random"])
def test_every_group_and_ratio_has_an_error(score: str, captured: Captured) -> None:
    program = captured("tiny-bert")
    found = sensitivity(program, [batch(program)], ratios=[0.5, 0.25], score=score)
    assert len(found.costs) == 2 * 4
    assert found.ratios == [0.25, 0.5]
    assert {c.role for c in found.costs} == {"head", "neuron"}
    assert all(0 < c.error < 2 for c in found.costs)
    assert all(c.kept == c.size * (1 - c.ratio) for c in found.costs)
    assert found.samples == 2
    assert json.loads(json.dumps(found.to_json()))["costs"][0]["group"] == found.costs[0].group


def test_an_error_is_what_pruning_that_group_alone_does(captured: Captured) -> None:
    """The same cut by the pass, shrunk and run whole, is as far from the dense outputs."""
    program = captured("tiny-mlp")
    data = [batch(program)]
    found = sensitivity(program, data, ratios=[0.5], score="obs")
    for cost in found.costs:
        tensor = cost.group.partition("[")[0]
        step = PruneNeurons(0.5, score="obs", targets=(tensor,))
        cut = Pipeline([step]).run(program, Context(calibration=data))
        groups = cut.results[0].report["groups"]
        if len(groups) > 1:  # a tensor between two groups belongs to both
            continue
        (dense,), (pruned,) = program.run(data[0]), cut.program.run(data[0])
        error = float((pruned - dense).norm() / dense.norm())
        assert cost.error == pytest.approx(error, rel=1e-3)


def test_more_removed_costs_more_and_compensation_saves(captured: Captured) -> None:
    program = captured("tiny-bert")
    obs, magnitude = (
        sensitivity(program, [batch(program)], score=score) for score in ("obs", "magnitude")
    )
    by_group = [[c.error for c in obs.costs if c.group == g] for g in {c.group for c in obs.costs}]
    assert all(errors == sorted(errors) for errors in by_group)
    for with_data, without in zip(obs.costs, magnitude.costs, strict=True):
        assert with_data.group == without.group
        assert with_data.error < without.error


def test_times_are_of_the_whole_role_cut_once_for_each_ratio(captured: Captured) -> None:
    program = captured("tiny-bert")
    seen: list[int] = []

    def clock(candidate: Program, dense: Program) -> tuple[float, float]:
        assert dense is program
        seen.append(candidate.num_parameters())
        return 1.0, 2.0

    steps: list[tuple[int, int]] = []
    found = sensitivity(
        program,
        [batch(program)],
        ratios=[0.25, 0.5],
        clock=clock,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert [(t.role, t.ratio) for t in found.times] == [
        ("head", 0.25),
        ("head", 0.5),
        ("neuron", 0.25),
        ("neuron", 0.5),
    ]
    assert seen[1] < seen[0] < program.num_parameters()
    assert seen[3] < seen[2] < program.num_parameters()
    assert steps[-1] == (12, 12)


def test_padding_does_not_count(captured: Captured) -> None:
    """What stands at padded positions changes neither the statistics nor the error."""
    program = captured("tiny-bert")
    ids, mask = batch(program)
    other = ids.clone()
    other[mask == 0] = 7
    assert not torch.equal(ids, other)
    first, second = (
        sensitivity(program, [(x, mask)], ratios=[0.5], score="obs") for x in (ids, other)
    )
    for a, b in zip(first.costs, second.costs, strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-3)


def test_convolutions_are_looked_at_by_masks_and_by_statistics(captured: Captured) -> None:
    program = captured("tiny-cnn")
    for score in ("magnitude", "obs"):
        found = sensitivity(program, [batch(program)], ratios=[0.5], score=score)
        assert [c.role for c in found.costs] == ["neuron"]
        assert all(math.isfinite(c.error) for c in found.costs)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"ratios": []}, RecipeError, "at least one ratio"),
        ({"ratios": [0.0]}, RecipeError, "removes nothing"),
        ({"ratios": [1.0]}, RecipeError, "below 1"),
        ({"score": "obss"}, RecipeError, "obs"),
        ({"roles": ["residual"]}, UnsupportedError, "frozen"),
        ({"roles": ["expert"]}, UnsupportedError, "no axis group"),
    ],
    ids=str,
)
def test_bad_input_is_refused(
    options: dict[str, object], error: type[Exception], says: str, captured: Captured
) -> None:
    program = captured("tiny-bert")
    with pytest.raises(error, match=says):
        sensitivity(program, [batch(program)], **options)  # type: ignore[arg-type]


def test_no_batches_are_refused(captured: Captured) -> None:
    with pytest.raises(GraphPruneError, match="no batch"):
        sensitivity(captured("tiny-mlp"), [])
