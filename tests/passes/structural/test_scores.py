from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graphprune.axes import AxisGroup, axis_groups
from graphprune.errors import RecipeError, UnsupportedError
from graphprune.ir.program import Program
from graphprune.passes import PruneNeurons
from graphprune.passes.structural.allocation import best, others
from graphprune.passes.structural.scores import (
    SCORES,
    Evidence,
    Needs,
    WeightScore,
    magnitude,
    random,
    score_named,
)
from graphprune.pipeline.base import Context

Captured = Callable[[str], Program]


def test_magnitude_is_the_norm_of_all_that_goes_with_a_unit(captured: Captured) -> None:
    program = captured("tiny-mlp")
    group = next(g for g in axis_groups(program) if g.id == "layers.0.weight[0]")
    t = program.tensors
    expected = (
        t["layers.0.weight"].double().square().sum(1)
        + t["layers.0.bias"].double().square()
        + t["layers.2.weight"].double().square().sum(0)
    ).sqrt()
    torch.testing.assert_close(magnitude(program, group, Context()), expected)


def test_magnitude_of_heads_sums_over_their_dimensions(captured: Captured) -> None:
    program = captured("tiny-bert")
    group = axis_groups(program).with_role("head")[0]
    t = program.tensors
    prefix = "encoder.layer.0.attention"
    expected = t[f"{prefix}.output.dense.weight"].double().square().reshape(-1, 4, 8).sum((0, 2))
    for name in ("query", "key", "value"):
        expected += t[f"{prefix}.self.{name}.weight"].double().square().reshape(4, -1).sum(1)
        expected += t[f"{prefix}.self.{name}.bias"].double().square().reshape(4, -1).sum(1)
    torch.testing.assert_close(magnitude(program, group, Context()), expected.sqrt())


def test_buffers_have_no_magnitude(captured: Captured) -> None:
    """A running mean is no sign of importance; and integers have no norm."""
    program = captured("tiny-cnn")
    group = next(g for g in axis_groups(program) if g.role == "neuron")
    shifted = program.with_tensors(
        {k: t + 100 for k, t in program.tensors.items() if k not in program.parameters}
    )
    torch.testing.assert_close(
        magnitude(program, group, Context()), magnitude(shifted, group, Context())
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_scored_in_float32(
    captured: Captured, dtype: torch.dtype
) -> None:
    """Squares of 300 overflow in float16."""
    program = captured("tiny-mlp")
    group = axis_groups(program).with_role("neuron")[0]
    large = {k: torch.full_like(t, 300).to(dtype) for k, t in program.tensors.items()}
    assert magnitude(program.with_tensors(large), group, Context()).isfinite().all()


def test_random_follows_the_seed(captured: Captured) -> None:
    program = captured("tiny-mlp")
    group = axis_groups(program).with_role("neuron")[0]
    first, again, other = (random(program, group, Context(seed=s)) for s in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)


def test_unknown_scores_are_refused() -> None:
    with pytest.raises(RecipeError, match="did you mean 'magnitude'"):
        score_named("magnitud")


def test_broken_weights_are_refused(captured: Captured) -> None:
    program = captured("tiny-mlp")
    weight = program.tensors["layers.0.weight"].clone()
    weight[3, 0] = torch.nan
    with pytest.raises(UnsupportedError, match=r"not finite for units \[3\]"):
        PruneNeurons(0.5).run(program.with_tensors({"layers.0.weight": weight}), Context())


@pytest.mark.parametrize("count", [0, 3, 7])
def test_what_goes_first_is_what_is_not_among_the_best(count: int, captured: Captured) -> None:
    program = captured("tiny-mlp")
    group = axis_groups(program).with_role("neuron")[0]
    scores = torch.randint(0, 3, (group.size,)).double()  # many are equal
    order, costs = WeightScore("any", lambda *_: scores).order(
        Evidence(program, group, Context()), count
    )
    assert others(group.size, order[:count]).equal(best(scores, group.size - count))
    assert costs.equal(scores.sort().values)


def test_a_plain_function_is_a_score(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    program = captured("tiny-mlp")

    def first(program: Program, group: AxisGroup, ctx: Context) -> Tensor:
        return torch.arange(group.size, 0, -1).double()

    monkeypatch.setitem(SCORES, "first", first)
    assert score_named("first").needs is Needs.WEIGHTS
    step = PruneNeurons(0.5, score="first")
    assert not step.needs_calibration
    kept = step.run(program, Context()).report["kept"]
    assert all(units == list(range(len(units))) for units in kept.values())


def test_every_score_goes_by_its_name() -> None:
    assert [score_named(name).name for name in SCORES] == list(SCORES)
