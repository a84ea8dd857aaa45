"""GradualMagnitude: counts that are exact, zeros that stay, and the schedule that was asked for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graphprune.axes import axis_groups
from graphprune.axes.sites import linear_sites
from graphprune.errors import PassError, RecipeError, UnsupportedError
from graphprune.ir.program import Program
from graphprune.passes import Finetune, GradualMagnitude, Magnitude, PruneNeurons
from graphprune.passes.sparsity.sparsity_pattern import parse_pattern, removed_count
from graphprune.passes.training.schedule import scheduled
from graphprune.pipeline.base import Context
from graphprune.pipeline.pipeline import Pipeline
from graphprune.training.losses import logits_of
from graphprune.training.spec import Training

Captured = Callable[[str], Program]
STILL = 1e-30  # a learning rate that leaves every weight where it is


def _batches(count: int = 5) -> list[dict[str, Tensor]]:
    drawn = torch.Generator().manual_seed(7)
    return [
        {
            "x": torch.randn(3, 12, generator=drawn),
            "labels": torch.randint(0, 5, (3,), generator=drawn),
        }
        for _ in range(count)
    ]


def _run(program: Program, step: GradualMagnitude, data: Any = None, **options: Any) -> Any:
    training = Training(_batches() if data is None else data, device="cpu", **options)
    return Pipeline([step]).run(program, Context(training=training))


def _example(program: Program, **options: Any) -> Training:
    """The example inputs as the only batch, and a loss that any output has."""
    batch = dict(zip(program.forward.input_names, program.forward.example, strict=True))
    return Training(
        [batch], loss=lambda out, _: logits_of(out).square().mean(), device="cpu", **options
    )


def _counts(program: Program, result: Any) -> list[tuple[int, int]]:
    """(zeros, size) of every site that was pruned."""
    names = {site["name"] for site in result.results[0].report["matrices"]}
    sites = {s.name: s for s in linear_sites(axis_groups(program)) if s.name in names}
    matrices = [site.matrix(result.program) for site in sites.values()]
    return [(int((m == 0).sum()), m.numel()) for m in matrices]


# --- counts and masks --------------------------------------------------------------------------


@pytest.mark.parametrize("final", [0.37, 0.8])
@pytest.mark.parametrize("model", ["tiny-mlp", "tiny-encoder", "tiny-gpt2", "tiny-llama"])
def test_the_end_is_exact(model: str, final: float, captured: Captured) -> None:
    program = captured(model)
    step = GradualMagnitude(final, epochs=7, lr=1e-2, every=2)
    result = Pipeline([step]).run(program, Context(training=_example(program)))
    counts = _counts(program, result)
    assert len(counts) > 1
    assert all(zeros == removed_count(final, size) for zeros, size in counts)
    assert not result.program.tensors.keys() ^ program.tensors.keys()


@pytest.mark.parametrize("model", ["tiny-encoder", "tiny-gpt2", "tiny-llama"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"allocation": "global"},
        {"pattern": "2:4"},
        {"pattern": "1:4", "schedule": "linear"},
        {"pattern": "4x2"},
        {"pattern": "8x1", "allocation": "global"},
        {"pattern": "32x4"},
        {"pattern": "24x5", "allocation": "global"},
        {"pattern": "rows"},
        {"initial": 0.3, "begin": 0.4},
        {"end": 0.0},
        {"end": 1.0},
    ],
    ids=str,
)
def test_weights_that_stand_still_end_as_one_shot(
    options: dict[str, Any], model: str, captured: Captured
) -> None:
    program = captured(model)
    sparsity = None if ":" in options.get("pattern", "") else 0.6
    step = GradualMagnitude(sparsity, epochs=5, lr=STILL, weight_decay=0, every=1, **options)
    result = Pipeline([step]).run(program, Context(training=_example(program)))
    same = {k: v for k, v in options.items() if k in ("pattern", "allocation")}
    expected = Pipeline([Magnitude(sparsity, **same)]).run(program).program
    for name, tensor in expected.tensors.items():
        assert torch.equal(result.program.tensors[name], tensor), name
    assert result.program.zeroed == expected.zeroed


@pytest.mark.parametrize(
    "options",
    [
        {"final": 0.8},
        {"final": 0.8, "allocation": "global"},
        {"pattern": "2:4"},
        {"final": 0.8, "pattern": "3x4"},
    ],
    ids=str,
)
def test_no_weight_comes_back(options: Any, captured: Captured) -> None:
    program = captured("tiny-mlp")
    dead: list[dict[str, Tensor]] = []

    def evaluate(now: Program) -> float:
        dead.append({n: t == 0 for n, t in now.tensors.items() if t.dim() == 2})
        return 0.0

    step = GradualMagnitude(epochs=6, lr=0.05, every=1, **options)
    _run(program, step, eval=evaluate)
    assert len(dead) == 7
    grown = 0
    for before, after in itertools.pairwise(dead):
        assert all(bool(after[name][zeros].all()) for name, zeros in before.items())
        grown += sum(int(after[n].sum()) > int(z.sum()) for n, z in before.items())
    assert grown > 3


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_zeros_are_whole_blocks_on_top_of_structure_and_stay(
    allocation: str, captured: Captured
) -> None:
    """After neurons went no shape is a multiple; distilled, without labels, then fine-tuned."""
    dense = captured("tiny-encoder")
    batch = dict(zip(dense.forward.input_names, dense.forward.example, strict=True))
    step = GradualMagnitude(
        0.5, pattern="16x4", allocation=allocation, distill=True, epochs=6, lr=1e-2, every=1
    )
    steps: list[Any] = [PruneNeurons(0.37), step, Finetune(3, lr=1e-2)]
    training = replace(_example(dense), data=[batch])
    result = Pipeline(steps).run(dense, Context(reference=dense, training=training))
    pattern = parse_pattern("16x4")
    names = {site["name"] for site in result.results[1].report["matrices"]}
    sites = {s.name: s for s in linear_sites(axis_groups(result.program)) if s.name in names}
    blocks, gone, odd = 0, 0, 0
    for site in sites.values():
        weight = site.matrix(result.program)
        odd += bool(weight.shape[0] % 16 or weight.shape[1] % 4)
        alive = pattern.units(weight.abs()) > 0
        assert torch.equal(pattern.spread(alive, *weight.shape), weight != 0)
        if allocation == "uniform":
            assert int((~alive).sum()) == removed_count(0.5, alive.numel())
        blocks, gone = blocks + alive.numel(), gone + int((~alive).sum())
    assert odd
    assert gone == removed_count(0.5, blocks) or allocation == "uniform"


def test_weights_that_move_choose_other_ones_than_one_shot(captured: Captured) -> None:
    program = captured("tiny-mlp")
    gradual = _run(program, GradualMagnitude(0.5, epochs=6, lr=0.1, every=1)).program
    once = _run(program, GradualMagnitude(0.5, epochs=6, lr=0.1, end=0.0)).program
    name = "layers.2.weight"
    assert not torch.equal(gradual.tensors[name] == 0, once.tensors[name] == 0)


def test_zeros_of_an_earlier_pass_stay_and_count(captured: Captured) -> None:
    program = Pipeline([Magnitude(0.5, pattern="2:4")]).run(captured("tiny-mlp")).program
    result = _run(program, GradualMagnitude(0.7, epochs=4, lr=0.05))
    for name in program.zeroed:
        zeros = result.program.tensors[name] == 0
        assert bool(zeros[program.tensors[name] == 0].all())
        assert int(zeros.sum()) == removed_count(0.7, zeros.numel())


# --- the schedule ------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cubic", "linear"])
def test_every_epoch_is_where_the_schedule_is(schedule: str, captured: Captured) -> None:
    program = captured("tiny-mlp")
    step = GradualMagnitude(
        0.8, schedule, initial=0.1, begin=0.25, end=0.75, every=1, epochs=8, lr=1e-2
    )
    result = _run(program, step)
    sizes = [size for _, size in _counts(program, result)]
    for record in result.results[0].report["epochs"]:
        asked = scheduled(record["epoch"] / 8, 0.25, 0.75, 0.1, 0.8, schedule)
        zeros = sum(removed_count(asked, size) for size in sizes)
        assert record["sparsity"] == zeros / sum(sizes)


def test_between_two_choices_nothing_changes(captured: Captured) -> None:
    """Five steps an epoch, chosen every tenth: the second epoch has what the first had."""
    step = GradualMagnitude(0.8, end=0.95, every=10, epochs=4, lr=1e-2)
    reached = [
        record["sparsity"]
        for record in _run(captured("tiny-mlp"), step).results[0].report["epochs"]
    ]
    assert reached[0] == reached[1] < reached[2] < reached[3] == pytest.approx(0.8, abs=5e-3)


@pytest.mark.parametrize("at", [3, 7, 12])
def test_resumed_is_as_if_never_stopped(
    at: int, captured: Captured, tmp_path: Path, breaks: Any
) -> None:
    program = captured("tiny-mlp")
    step = GradualMagnitude(0.8, epochs=4, lr=1e-2, every=3)
    whole = _run(program, step, checkpoints=tmp_path / "a", every=2)
    folder: Any = {"checkpoints": tmp_path / "b", "every": 2}
    with pytest.raises(PassError, match="crashed with Stops"):
        _run(program, step, breaks(_batches(), at), **folder)
    resumed = _run(program, step, resume=True, **folder)
    for name, tensor in whole.program.tensors.items():
        assert torch.equal(resumed.program.tensors[name], tensor), name
    first, second = (
        [(r["sparsity"], r["loss"]) for r in run.results[0].report["epochs"]]
        for run in (whole, resumed)
    )
    assert first == second


def test_early_stopping_waits_for_the_last_weight(captured: Captured) -> None:
    metrics = iter([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0])
    step = GradualMagnitude(0.8, epochs=7, lr=1e-2, end=0.5)
    result = _run(captured("tiny-mlp"), step, eval=lambda now: next(metrics), patience=1)
    assert result.results[0].report["best_epoch"] == 4
    assert result.results[0].report["sparsity"] == pytest.approx(0.8, abs=5e-3)


# --- training ----------------------------------------------------------------------------------


def test_with_nothing_to_zero_it_is_finetuning(captured: Captured) -> None:
    program = captured("tiny-mlp")
    gradual = _run(program, GradualMagnitude(0.0, epochs=2, lr=1e-2)).program
    plain = (
        Pipeline([Finetune(2, lr=1e-2)])
        .run(program, Context(training=Training(_batches(), device="cpu")))
        .program
    )
    assert all(torch.equal(t, plain.tensors[n]) for n, t in gradual.tensors.items())


def test_distilling_brings_it_nearer_to_the_dense_model(captured: Captured) -> None:
    dense = captured("tiny-mlp")
    drawn = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(32, 12, generator=drawn)} for _ in range(8)]
    test = torch.randn(200, 12, generator=drawn)
    context = Context(reference=dense, training=Training(data, device="cpu"))
    step = GradualMagnitude(0.5, epochs=12, lr=1e-2, distill=True, every=1)
    trained = Pipeline([step]).run(dense, context)
    assert trained.results[0].report["labels"] == "none: the teacher alone"
    once = Pipeline([Magnitude(0.5)]).run(dense).program

    def divergence(now: Program) -> float:
        p, q = (logits_of(of(x=test)).log_softmax(-1) for of in (dense, now))
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert divergence(trained.program) < 0.5 * divergence(once)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "needs a final sparsity, such as final=0.8"),
        ({"final": 1.0}, "final must be the final fraction"),
        ({"final": 0.8, "pattern": "2:4"}, "not 0.8: leave final out"),
        ({"final": 0.8, "schedule": "cubik"}, "did you mean 'cubic'"),
        ({"final": 0.8, "lr_schedule": "cubic"}, "there is no schedule 'cubic'"),
        ({"final": 0.8, "initial": 0.9}, "initial must be"),
        ({"final": 0.8, "begin": 0.8, "end": 0.7}, "before it begins"),
        ({"final": 0.8, "every": 0}, "every must be"),
        ({"final": 0.8, "allocation": "owl"}, r"there are \['global', 'uniform'\]"),
        ({"final": 0.8, "distill": 1}, "distill is true or false"),
        ({"final": 0.8, "temperature": 0}, "temperature must be"),
    ],
)
def test_options_out_of_range(options: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        GradualMagnitude(**options)


def test_a_pattern_that_does_not_fit_is_refused_before_training(captured: Captured) -> None:
    with pytest.raises(UnsupportedError, match="does not fit 'layers"):
        _run(captured("tiny-mlp"), GradualMagnitude(pattern="1:7"))


def test_weights_that_do_not_train_are_refused(captured: Captured) -> None:
    frozen = replace(captured("tiny-mlp"), parameters=frozenset({"layers.4.bias"}))
    with pytest.raises(UnsupportedError, match="none of those it may take is a parameter"):
        _run(frozen, GradualMagnitude(0.5))
