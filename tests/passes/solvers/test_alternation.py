"""SparseLLM's steps, each against a dense grid, a closed form or least squares."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.nn import functional as F

from graphprune.axes import axis_groups
from graphprune.axes.sites import linear_sites
from graphprune.ir.program import Program
from graphprune.passes.solvers.alternation import (
    Alternation,
    Weights,
    elementwise_step,
    relu_step,
)
from graphprune.passes.solvers.sparsegpt import Inputs
from graphprune.passes.sparsity.feedforward import find_feedforwards

weights = st.builds(Weights, *[st.floats(0.05, 10)] * 3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 10), st.floats(0.05, 10))
def test_relu_has_no_better_value_on_a_dense_grid(seed: int, alpha: float, gamma: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    m, p = torch.randn(2, 40, generator=generator, dtype=torch.float64) * 2
    c = Weights(alpha, 1.0, gamma)

    def loss(z: Tensor) -> Tensor:
        return gamma * (p - z.relu()).square() + alpha * (z - m).square()

    z = relu_step(m, p, c)
    grid = torch.linspace(-10, 10, 4001, dtype=torch.float64)[:, None].expand(-1, 40)
    best = loss(grid).min(0).values
    assert bool((loss(z) <= best + 1e-12).all())
    assert bool((loss(z) >= best - 1e-3 * (alpha + gamma) * 5).all())


def test_relu_may_leave_either_branch() -> None:
    """m below zero but p large: across; m above and p low: down to a compromise, never below."""
    c = Weights(1.0, 1.0, 1.0)
    m, p = torch.tensor([-1.0, -1.0, 2.0, 2.0]), torch.tensor([5.0, 0.5, 0.0, -9.0])
    torch.testing.assert_close(relu_step(m, p, c), torch.tensor([2.0, -1.0, 1.0, 0.0]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), weights)
def test_where_phi_is_linear_the_step_is_the_minimum(seed: int, c: Weights) -> None:
    """A gated block in its linear part: z = (α m + γ g p) / (α + γ g²)."""
    generator = torch.Generator().manual_seed(seed)
    g, z, m, p = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    found = elementwise_step(lambda value: value * g, z, m, p, c)
    expected = (c.alpha * m + c.gamma * g * p) / (c.alpha + c.gamma * g.square())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), weights, st.sampled_from([F.gelu, F.silu, torch.tanh, F.relu]))
def test_a_step_never_raises_what_it_lowers(
    seed: int, c: Weights, phi: Callable[[Tensor], Tensor]
) -> None:
    """Value by value; and most values that are off the minimum do move."""
    generator = torch.Generator().manual_seed(seed)
    z, m, p = torch.randn(3, 200, generator=generator, dtype=torch.float64) * 3

    def loss(value: Tensor) -> Tensor:
        return c.gamma * (p - phi(value)).square() + c.alpha * (value - m).square()

    after = elementwise_step(phi, z, m, p, c)
    assert bool((loss(after) <= loss(z)).all())
    assert bool((loss(after) <= loss(m)).all())
    assert float(loss(after).sum()) < float(loss(z).sum())
    assert not after.requires_grad


def test_where_phi_only_decides_the_better_of_both_stays() -> None:
    """A comparison has no derivative: z is kept, or m is taken."""
    z, m, p = torch.tensor([0.5, 0.5]), torch.tensor([2.0, -2.0]), torch.tensor([1.0, 1.0])
    after = elementwise_step(lambda value: (value > 0).to(value), z, m, p, Weights(0.1, 1.0, 1.0))
    assert after.tolist() == [2.0, 0.5]


# --- one block ---------------------------------------------------------------------------------


@pytest.fixture
def block(program_of: Callable[..., Program]) -> tuple[Alternation, Program]:
    """head(norm(down(relu(up(x))))) on forty rows."""
    aten = torch.ops.aten

    def write(graph: fx.Graph, node: dict[str, fx.Node]) -> tuple[fx.Node, ...]:
        def linear(x: fx.Node, *names: str) -> fx.Node:
            return graph.call_function(aten.linear.default, (x, *map(node.__getitem__, names)))

        hidden = graph.call_function(aten.relu.default, (linear(node["x"], "up", "a"),))
        result = graph.call_function(aten.layer_norm.default, (linear(hidden, "down", "b"), [5]))
        return (linear(result, "head"),)

    shapes = {"up": (8, 6), "a": (8,), "down": (5, 8), "b": (5,), "head": (3, 5)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    x = torch.randn(40, 6)
    program = program_of(tensors, {"x": x}, write)
    (found,) = find_feedforwards(linear_sites(axis_groups(program)))
    hidden = F.linear(x, tensors["up"], tensors["a"]).relu()
    return Alternation.start(found, program, x, hidden), program


def test_dense_weights_have_no_error_and_outputs_an_energy(
    block: tuple[Alternation, Program],
) -> None:
    state, program = block
    t = program.tensors
    assert state.error(program) == pytest.approx(0, abs=1e-8)
    product = F.linear(state.x, t["up"], t["a"]).relu() @ t["down"].T
    assert state.energy() == pytest.approx(float(product.square().sum()), rel=1e-5)
    torch.testing.assert_close(state.gram(), (state.p.T @ state.p).double(), rtol=1e-5, atol=1e-4)
    fewer = program.with_tensors({"down": torch.zeros(5, 8)})
    assert state.error(fewer) == pytest.approx(state.energy(), rel=1e-5)


def test_the_gain_is_the_larger_inverse_too(block: tuple[Alternation, Program]) -> None:
    """β Wᵀ (β W Wᵀ + γ I)⁻¹ = (β Wᵀ W + γ I)⁻¹ β Wᵀ."""
    state, program = block
    w, c = program.tensors["down"].double(), Weights(0.3, 2.0, 0.7)
    expected = torch.linalg.solve(c.beta * w.T @ w + c.gamma * torch.eye(8), c.beta * w.T)
    torch.testing.assert_close(state.gain(program, c).double(), expected, rtol=1e-4, atol=1e-5)


def test_fits_are_damped_towards_the_dense_weight(block: tuple[Alternation, Program]) -> None:
    """Little damping is least squares, much of it the dense weight."""
    state, program = block
    state.y = state.y + torch.randn_like(state.y)
    rows = state.p.double()
    target = (state.y - program.tensors["b"]).double()
    # Two of eight columns of p may be zero everywhere: the prior alone speaks there.
    exact = Inputs.of(state.gram(), 1e-9)
    fitted = state.fit_down(exact)
    miss = (rows @ fitted.T - target).square().sum()
    least = torch.linalg.lstsq(rows, target).solution
    assert float(miss) == pytest.approx(float((rows @ least - target).square().sum()), rel=1e-4)
    held = state.fit_down(Inputs.of(state.gram(), 1e9))
    torch.testing.assert_close(held, program.tensors["down"].double(), rtol=1e-4, atol=1e-4)
