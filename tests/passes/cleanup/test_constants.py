from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphprune.capture.capture import capture
from graphprune.errors import RecipeError
from graphprune.ir.graph import op_name
from graphprune.ir.program import Program
from graphprune.passes import FoldConstants
from graphprune.pipeline.pipeline import Pipeline


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
        self.register_buffer("mask", torch.randn(1, 256))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.mask, Tensor)
        return x + self.mask.exp().expand(256, 256)


def _ops(program: Program) -> list[str]:
    return [op_name(n) for n in program.forward.graph.nodes if n.op == "call_function"]


def test_capture_folds_buffers_and_parameters_are_folded_on_request_only() -> None:
    program = capture(Constants(), (torch.randn(3, 8),))
    assert not Pipeline([FoldConstants()]).run(program).modified
    after = Pipeline([FoldConstants(parameters=True)]).run(program).program
    assert sorted(_ops(after)) == ["add", "mul"]
    assert after.parameters == frozenset()


def test_what_capture_left_is_folded_where_more_bytes_are_allowed() -> None:
    program = capture(Expanded(), (torch.randn(3, 256, 256),))
    assert _ops(program) == ["expand", "add"]
    result = Pipeline([FoldConstants(max_growth=1024)]).run(program)
    assert not result.modified
    assert "grows by" in result.results[0].report["skipped"][0]["reason"]
    result = Pipeline([FoldConstants(max_growth=1 << 20)]).run(program)
    assert _ops(result.program) == ["add"]
    (name,) = result.results[0].report["folded"]
    assert list(result.program.tensors) == [name]


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(RecipeError, match="max_growth"):
        FoldConstants(max_growth=-1)
