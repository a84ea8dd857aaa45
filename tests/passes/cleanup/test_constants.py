from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphprune.capture import capture
from graphprune.errors import RecipeError
from graphprune.graph import op_name
from graphprune.passes import FoldConstants
from graphprune.pipeline import Pipeline
from graphprune.program import Program


class Constants(nn.Module):
    """scale depends on a buffer alone; weight depends on a parameter; noise is random."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("base", torch.arange(1.0, 9.0))
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.base, Tensor)
        scale = (self.base * 2).log().reshape(1, 8)
        return x * scale + torch.tanh(self.weight)


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.randn(1, 64))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.mask, Tensor)
        return x + self.mask.exp().expand(64, 64)


def _ops(program: Program) -> list[str]:
    return [op_name(n) for n in program.forward.graph.nodes if n.op == "call_function"]


def test_computations_on_buffers_become_one_buffer() -> None:
    program = capture(Constants(), (torch.randn(3, 8),))
    result = Pipeline([FoldConstants()]).run(program)
    after = result.program
    assert sorted(_ops(after)) == ["add", "mul", "tanh"]
    (name,) = result.results[0].report["folded"]
    torch.testing.assert_close(
        after.tensors[name], (program.tensors["base"] * 2).log().reshape(1, 8)
    )
    assert "base" not in after.tensors
    assert after.parameters == program.parameters == {"weight"}


def test_parameters_are_folded_on_request_only() -> None:
    program = capture(Constants(), (torch.randn(3, 8),))
    after = Pipeline([FoldConstants(parameters=True)]).run(program).program
    assert sorted(_ops(after)) == ["add", "mul"]
    assert after.parameters == frozenset()


def test_results_that_grow_too_much_stay_computed() -> None:
    program = capture(Expanded(), (torch.randn(3, 64, 64),))
    result = Pipeline([FoldConstants(max_growth=1024)]).run(program)
    assert not result.modified
    assert "grows by" in result.results[0].report["skipped"][0]["reason"]
    folded = Pipeline([FoldConstants(max_growth=1 << 20)]).run(program).program
    assert _ops(folded) == ["add"]


def test_dynamic_sizes_are_not_constant() -> None:
    class Positions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(x.shape[1])

    program = capture(Positions(), (torch.randn(3, 8),))
    assert not Pipeline([FoldConstants()]).run(program).modified


def test_random_numbers_are_not_constant() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * torch.rand(8)

    program = capture(Noise(), (torch.randn(3, 8),))
    assert not Pipeline([FoldConstants()]).run(program).modified


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(RecipeError, match="max_growth"):
        FoldConstants(max_growth=-1)
