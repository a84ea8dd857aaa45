"""The optimizer against torch's own AdamW, with masks, clipping, states and cuts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graphprune.axes import axis_groups
from graphprune.errors import TrainingError
from graphprune.ir.module import ProgramModule
from graphprune.ir.program import Program
from graphprune.rewrite.shrink import shrink
from graphprune.training.optimizer import (
    MOMENTS,
    Optimizer,
    Plan,
    cut_state,
    zero_masks,
)

aten = torch.ops.aten


@pytest.fixture
def program(program_of: Callable[..., Program]) -> Program:
    """linear(relu(linear(x))), in float64."""

    def write(graph: fx.Graph, node: dict[str, fx.Node]) -> tuple[fx.Node, ...]:
        call = graph.call_function
        hidden = call(aten.linear.default, (node["x"], node["a"], node["b"]))
        return (call(aten.linear.default, (call(aten.relu.default, (hidden,)), node["c"])),)

    kind: Any = {"dtype": torch.float64}
    tensors = {"a": torch.randn(4, 3, **kind), "b": torch.randn(4, **kind)}
    tensors["c"] = torch.randn(2, 4, **kind)
    return program_of(tensors, {"x": torch.randn(5, 3, **kind)}, write)


def gradients(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    shapes = {"a": (4, 3), "b": (4,), "c": (2, 4)}
    return {
        name: scale * torch.randn(shape, generator=drawn, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def optimizer(program: Program, plan: Plan, masks: Any = None, state: Any = None) -> Optimizer:
    # A module's parameters are the program's own tensors, and steps are in place.
    program = program.with_tensors({n: t.clone() for n, t in program.tensors.items()})
    return Optimizer(ProgramModule(program), program, plan, masks or {}, state)


def step(chosen: Optimizer, grads: dict[str, Tensor], rate: float = 0.1) -> float:
    for name, parameter in chosen.parameters.items():
        parameter.grad = grads[name].clone()
    return chosen.step(rate)


def values(chosen: Optimizer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in chosen.parameters.items()}


# --- steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_steps_are_those_of_torch(program: Program, clip: float) -> None:
    """Matrices decay, vectors do not; the norm of all gradients together is clipped."""
    chosen = optimizer(program, Plan(1, 1.0, weight_decay=0.3, clip=clip))
    own = {name: nn.Parameter(t.clone()) for name, t in program.tensors.items()}
    groups: Any = [
        {"params": [own["a"], own["c"]], "weight_decay": 0.3},
        {"params": [own["b"]], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups)
    for i, rate in enumerate((0.1, 0.02, 0.05)):
        grads = gradients(i)
        for group in adam.param_groups:
            group["lr"] = rate
        for name, parameter in own.items():
            parameter.grad = grads[name].clone()
        norm = torch.cat([g.flatten() for g in grads.values()]).norm()
        if clip:
            for parameter in own.values():
                assert parameter.grad is not None
                parameter.grad *= min(1.0, clip / (float(norm) + 1e-6))
        adam.step()
        assert step(chosen, grads, rate) == pytest.approx(float(norm))
    for name, value in values(chosen).items():
        torch.testing.assert_close(value, own[name].detach(), rtol=1e-12, atol=1e-12)


def test_zeros_stay_and_learn_nothing_even_from_nan(program: Program) -> None:
    mask = torch.rand(4, 3) < 0.5
    chosen = optimizer(program, Plan(1, 1.0), {"a": mask})
    for seed in range(3):
        grads = gradients(seed)
        grads["a"][~mask] = math.nan
        assert math.isfinite(step(chosen, grads))
    assert bool((values(chosen)["a"] == 0).eq(~mask).all())
    assert bool((chosen.state()["exp_avg_sq/a"] != 0).eq(mask).all())
    more = torch.arange(12).view(4, 3) % 2 == 0
    chosen.restrict({"a": more})
    assert bool((values(chosen)["a"] == 0).eq(~(mask & more)).all())


def test_a_norm_that_is_not_finite_changes_nothing(program: Program) -> None:
    chosen = optimizer(program, Plan(1, 1.0))
    before = values(chosen)
    assert step(chosen, gradients(0, math.inf)) in (math.inf, pytest.approx(math.nan, nan_ok=True))
    for name, value in values(chosen).items():
        assert torch.equal(value, before[name])
    assert chosen.state() == {}
    assert all(p.grad is None for p in chosen.parameters.values())


def test_a_state_goes_on_where_it_was_left(program: Program) -> None:
    whole = optimizer(program, Plan(1, 1.0))
    for seed in range(4):
        step(whole, gradients(seed))
    first = optimizer(program, Plan(1, 1.0))
    for seed in range(2):
        step(first, gradients(seed))
    moved = program.with_tensors(values(first))
    second = optimizer(moved, Plan(1, 1.0), state=first.state())
    for seed in range(2, 4):
        step(second, gradients(seed))
    for name, value in values(whole).items():
        assert torch.equal(value, values(second)[name])


def test_what_is_frozen_takes_no_step(program: Program) -> None:
    frozen = replace(program, frozen=frozenset({"a"}))
    chosen = optimizer(frozen, Plan(1, 1.0))
    step(chosen, gradients(0))
    moved = {n for n, v in values(chosen).items() if not torch.equal(v, program.tensors[n])}
    assert moved == {"b", "c"}
    with pytest.raises(TrainingError, match="every parameter was frozen"):
        optimizer(replace(program, frozen=frozenset("abc")), Plan(1, 1.0))


# --- what follows rewrites ---------------------------------------------------------------------


def test_moments_are_cut_like_their_weights(program: Program) -> None:
    chosen = optimizer(program, Plan(1, 1.0))
    step(chosen, gradients(0))
    (group,) = [g for g in axis_groups(program) if g.size == 4]
    kept = [0, 3]
    cut = cut_state(program, {group.id: kept}, chosen.state())
    small = shrink(program, {group.id: kept})
    for moment in MOMENTS:
        for name, tensor in small.tensors.items():
            assert cut[f"{moment}/{name}"].shape == tensor.shape
        assert torch.equal(cut[f"{moment}/a"], chosen.state()[f"{moment}/a"][kept])
        assert torch.equal(cut[f"{moment}/c"], chosen.state()[f"{moment}/c"][:, kept])
    assert [n for n in cut if n.startswith("step/")] == ["step/a", "step/b", "step/c"]


def test_masks_are_where_zeroed_tensors_are_not_zero(program: Program) -> None:
    zeroed = program.tensors["a"].clone()
    zeroed[1] = 0
    changed = replace(
        program.with_tensors({"a": zeroed}), zeroed=frozenset({"a", "tied"}), aliases={"tied": "a"}
    )
    assert zero_masks(program) == {}
    (mask,) = zero_masks(changed).values()
    assert torch.equal(mask, zeroed != 0)


# --- rates -------------------------------------------------------------------------------------


def test_a_cosine_falls_as_its_formula() -> None:
    plan = Plan(1, 3.0, warmup=0.25, schedule="cosine")
    expected = [1.5, 3.0, *(3 * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(6))]
    assert [plan.rate(i, 8) for i in range(8)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_rates_rise_and_fall(schedule: str) -> None:
    rates = [Plan(1, 2.0, warmup=0.2, schedule=schedule).rate(i, 10) for i in range(11)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[10] == pytest.approx(2.0 if schedule == "constant" else 0.0)
    assert rates[6] == pytest.approx(2.0 if schedule == "constant" else 1.0)
