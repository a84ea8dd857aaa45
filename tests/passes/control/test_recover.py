"""PruneRecover: equal shares that add up exactly, and the last good round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graphprune as gp
from graphprune.axes import axis_groups
from graphprune.errors import RecipeError, TrainingError, UnsupportedError
from graphprune.ir.program import Program
from graphprune.passes import (
    Distill,
    Finetune,
    GradualStructure,
    LeastSquares,
    Magnitude,
    PruneAxis,
    PruneHeads,
    PruneNeurons,
    PruneRecover,
    RemoveNoOps,
    Repeat,
)
from graphprune.pipeline.base import Context, Pass
from graphprune.pipeline.pipeline import Pipeline
from graphprune.training.spec import Training

Captured = Callable[[str], Program]


def _data(count: int = 3) -> list[dict[str, Tensor]]:
    drawn = torch.Generator().manual_seed(7)
    return [
        {
            "x": torch.randn(6, 12, generator=drawn),
            "labels": torch.randint(0, 5, (6,), generator=drawn),
        }
        for _ in range(count)
    ]


def _context(program: Program, **options: Any) -> Context:
    return Context(reference=program, training=Training(_data(), device="cpu", **options))


def _sizes(program: Program) -> dict[str, int]:
    return {group.id: group.size for group in axis_groups(program)}


def _same(a: Program, b: Program) -> bool:
    return all(t.equal(b.tensors[name]) for name, t in a.tensors.items())


# --- shares ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.37, 0.61])
@pytest.mark.parametrize("rounds", [2, 5])
@pytest.mark.parametrize("model", ["tiny-mlp", "tiny-cnn", "tiny-gpt2"])
@pytest.mark.slow
def test_the_total_is_that_of_one_step(
    model: str, rounds: int, ratio: float, captured: Captured
) -> None:
    """Groups of several sizes; parts of the sizes that are left would not add up to it."""
    program = captured(model)
    step = PruneRecover((PruneNeurons(ratio),), rounds=rounds)
    result = Pipeline([step]).run(program)
    once = Pipeline([PruneNeurons(ratio)]).run(program).program
    assert _sizes(result.program) == _sizes(once) != _sizes(program)
    # And so in every round.
    for i, record in enumerate(result.results[0].report["rounds"][:-1]):
        part = Pipeline([PruneNeurons(ratio * (i + 1) / rounds)]).run(program).program
        here = {g["id"]: g["after"] for g in record["passes"][0].get("groups", ())}
        assert here.items() <= _sizes(part).items()


@pytest.mark.slow
def test_the_total_holds_where_an_axis_beside_is_down_to_one_unit(captured: Captured) -> None:
    """The dims of a head, of whose four heads one is left, are counted by the same name."""
    program = captured("tiny-encoder")
    dims = axis_groups(program).with_role("qk_dim")[0].size
    cut = (PruneHeads(0.75), PruneAxis(0.5, role="qk_dim"))
    for rounds in (1, 2, 3):
        found = Pipeline([PruneRecover(cut, rounds=rounds)]).run(program).program
        assert {g.size for g in axis_groups(found).with_role("qk_dim")} == {dims // 2}


@pytest.mark.parametrize("round_to", [1, 4])
def test_the_total_of_one_ranking_is_that_of_one_step(round_to: int, captured: Captured) -> None:
    program = captured("tiny-gpt2")
    options: Any = {"allocation": "global", "round_to": round_to}
    result = Pipeline([PruneRecover((PruneNeurons(0.4, **options),), rounds=3)]).run(program)
    once = Pipeline([PruneNeurons(0.4, **options)]).run(program)
    left, wanted = (
        sum(g.size for g in axis_groups(p).with_role("neuron"))
        for p in (result.program, once.program)
    )
    assert abs(left - wanted) <= (0 if round_to == 1 else 2 * round_to)


def test_dense_units_that_are_gone_already_count(captured: Captured) -> None:
    program = captured("tiny-encoder")
    smaller = Pipeline([PruneNeurons(0.3), PruneHeads(0.25)]).run(program).program
    ctx = Context(reference=program)
    step = PruneNeurons(0.5, of="dense")
    found = Pipeline([step]).run(smaller, ctx).program
    assert {g.size for g in axis_groups(found).with_role("neuron")} == {32}
    assert not Pipeline([step]).run(found, ctx).modified
    assert not Pipeline([PruneNeurons(0.2, of="dense")]).run(smaller, ctx).modified
    assert not Pipeline([PruneHeads(0.25, of="dense")]).run(smaller, ctx).modified
    now = Pipeline([PruneNeurons(0.5)]).run(smaller, ctx).program
    assert {g.size for g in axis_groups(now).with_role("neuron")} == {22}


def test_units_of_a_dense_model_that_has_fewer_are_refused(captured: Captured) -> None:
    program = captured("tiny-encoder")
    smaller = Pipeline([PruneNeurons(0.5)]).run(program).program
    with pytest.raises(
        UnsupportedError, match=r"dense model, which has no neuron axis.*of='current'"
    ):
        Pipeline([PruneNeurons(0.5, of="dense")]).run(program, Context(reference=smaller))


def test_zeros_grow_round_by_round(captured: Captured) -> None:
    program = captured("tiny-mlp")
    step = PruneRecover((Magnitude(0.8),), rounds=4)
    result = Pipeline([step]).run(program)
    reached = [r["passes"][0]["sparsity"] for r in result.results[0].report["rounds"]]
    assert reached == pytest.approx([0.2, 0.4, 0.6, 0.8], abs=5e-3)
    assert _same(result.program, Pipeline([Magnitude(0.8)]).run(program).program)


def test_one_round_is_the_passes_themselves(captured: Captured) -> None:
    program = captured("tiny-mlp")
    passes: tuple[Pass, ...] = (PruneNeurons(0.5), Magnitude(0.3), Finetune(1, lr=1e-2))
    result = Pipeline([PruneRecover(passes, rounds=1)]).run(program, _context(program))
    assert _same(result.program, Pipeline(passes).run(program, _context(program)).program)


def test_recovering_in_rounds_beats_recovering_once(captured: Captured) -> None:
    """With least squares alone, no labels: each round's units are chosen in a compensated model."""
    program = captured("tiny-mlp")
    batches = [{"x": batch["x"]} for batch in _data(30)]
    test = torch.randn(200, 12, generator=torch.Generator().manual_seed(9))
    ctx = Context(reference=program, calibration=batches)
    passes = (PruneNeurons(0.6), LeastSquares())
    found = [
        Pipeline([PruneRecover(passes, rounds=rounds)]).run(program, ctx).program
        for rounds in (1, 6)
    ]
    assert _sizes(found[0]) == _sizes(found[1])
    bare = Pipeline([PruneNeurons(0.6)]).run(program).program
    dense = program(x=test)
    errors = [float((now(x=test) - dense).square().mean()) for now in (bare, *found)]
    assert errors[2] < errors[1] < errors[0]


# --- stopping ----------------------------------------------------------------------------------


def test_trainings_are_numbered_over_the_rounds(captured: Captured, tmp_path: Path) -> None:
    """Each has a folder of checkpoints of its own, and so has the next run."""
    program = captured("tiny-mlp")
    rounds = PruneRecover((Magnitude(0.5), Finetune(1)), rounds=2)
    for folder in (tmp_path / "a", tmp_path / "b"):
        context = _context(program, checkpoints=folder)
        Pipeline([Finetune(1), rounds, Distill(epochs=1)]).run(program, context)
        assert sorted(p.name for p in folder.iterdir()) == [
            "0-finetune", "1-finetune", "2-finetune", "3-distill",
        ]  # fmt: skip


def test_the_last_good_round_is_given_back(captured: Captured) -> None:
    program = captured("tiny-mlp")
    metrics = iter([0.9, 0.95, 0.85, 0.7])  # dense, then round by round
    ctx = _context(program, eval=lambda now: next(metrics))
    result = Pipeline([PruneRecover((PruneNeurons(0.8),), 4, tolerance=0.1)]).run(program, ctx)
    report = result.results[0].report
    assert report["stopped"] is True
    assert report["taken"] == 2
    assert [r["metric"] for r in report["rounds"]] == [0.95, 0.85, 0.7]
    assert report["summary"] == "2 of 4 rounds, eval 0.85 (dense 0.9)"
    half = Pipeline([PruneRecover((PruneNeurons(0.4),), 2)]).run(program).program
    assert _same(result.program, half)


def test_where_the_first_round_is_too_bad_nothing_changes(captured: Captured) -> None:
    program = captured("tiny-mlp")
    metrics = iter([0.9, 0.7])
    ctx = _context(program, eval=lambda now: next(metrics))
    result = Pipeline([PruneRecover((PruneNeurons(0.8),), tolerance=0.1)]).run(program, ctx)
    assert not result.modified
    assert result.program is program
    assert result.results[0].report["summary"] == "0 of 4 rounds"


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), None])
@pytest.mark.parametrize("at", [0, 1])
def test_an_eval_that_gives_no_number_is_refused(value: Any, at: int, captured: Captured) -> None:
    metrics = iter([0.9] * at + [value])
    ctx = _context(captured("tiny-mlp"), eval=lambda now: next(metrics))
    step = PruneRecover((PruneNeurons(0.5),), 1, tolerance=0.1)
    with pytest.raises(TrainingError, match=r"eval gives .* must return a (finite )?number"):
        Pipeline([step]).run(captured("tiny-mlp"), ctx)


def test_eval_by_batches_is_accuracy(captured: Captured) -> None:
    program = captured("tiny-mlp")
    ctx = _context(program, eval=_data())
    result = Pipeline([PruneRecover((PruneNeurons(0.5),), 2)]).run(program, ctx)
    rows = _data()
    for now, value in (
        (program, result.results[0].report["metric_dense"]),
        (result.program, result.results[0].report["rounds"][-1]["metric"]),
    ):
        right = [(now(x=b["x"]).argmax(-1) == b["labels"]).float().mean() for b in rows]
        assert value == pytest.approx(float(sum(right)) / len(rows))


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"passes": (RemoveNoOps(),)}, "none of its passes has one"),
        ({"passes": ()}, "none of its passes has one"),
        ({"passes": (Magnitude(pattern="2:4"), Finetune())}, "none of its passes has one"),
        ({"passes": (PruneNeurons(0.5),), "rounds": 0}, "rounds must be"),
        ({"passes": (PruneNeurons(0.5),), "tolerance": -1}, "tolerance must be"),
    ],
)
def test_options_out_of_range(options: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        PruneRecover(**options)


@pytest.mark.parametrize("wrap", [PruneRecover, Repeat])
@pytest.mark.parametrize(
    "passes", [PruneNeurons(0.5), "finetune", ({"prune-neurons": {}},), {"finetune": {}}]
)
def test_what_is_no_list_of_passes_is_refused(passes: Any, wrap: Any) -> None:
    with pytest.raises(RecipeError, match=rf"^{wrap.name} takes a list of passes, got "):
        wrap(passes)
    kept: Any = (PruneNeurons(0.5), Finetune())
    assert wrap(list(kept)).passes == kept


def test_a_tolerance_without_eval_is_refused_before_work(captured: Captured) -> None:
    program = captured("tiny-mlp")
    step = PruneRecover((PruneNeurons(0.5),), tolerance=0.1)
    assert step.needs_training
    with pytest.raises(RecipeError, match="stops by eval, and there is none"):
        Pipeline([step]).run(program, _context(program))
    with pytest.raises(RecipeError, match=r"of is 'current' or 'dense'.*got 'then'$"):
        PruneNeurons(0.5, of="then")
    with pytest.raises(RecipeError, match="got 'now'; 'now' is called 'current'"):
        PruneNeurons(0.5, of="now")


# --- what the report says of verification ------------------------------------------------------


def _verification(program: Program, step: Pass, *, verify: bool) -> str:
    training = Training(_data(), device="cpu")
    return gp.compile(program, [step], training=training, verify=verify).report.verification()


@pytest.mark.parametrize("wrap", [lambda p: PruneRecover(p, rounds=2), lambda p: Repeat(p, 1)])
@pytest.mark.parametrize("verify", [True, False])
def test_what_was_proven_is_looked_for_in_the_rounds(
    verify: bool, wrap: Any, captured: Captured
) -> None:
    program = captured("tiny-mlp")
    values = wrap((Magnitude(0.5), Finetune(1)))
    verification = _verification(program, values, verify=verify)
    assert verification == "no shape was changed, only values: nothing to prove"
    verification = _verification(program, wrap((PruneNeurons(0.5), Finetune(1))), verify=verify)
    assert verification.startswith("removing the units equals masking them") is verify
    assert (verification == "not done (verify=False)") is not verify


def test_units_that_went_while_training_are_not_values_only(captured: Captured) -> None:
    program = captured("tiny-mlp")
    step = GradualStructure(0.5, epochs=1, begin=0, end=0.5, distill=False)
    assert _verification(program, step, verify=False) == "not done (verify=False)"
    assert "equals masking" in _verification(program, step, verify=True)


def test_a_norm_over_the_units_is_told(captured: Captured) -> None:
    step = PruneAxis(0.25, role="residual", normalized=True)
    compiled = gp.compile(captured("tiny-gpt2"), [step])
    drift = compiled.report.passes[0].details["verification"]["drift"]
    assert f"largest drift {drift:.1e}" in compiled.report.verification()
