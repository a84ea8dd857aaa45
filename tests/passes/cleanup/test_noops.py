from __future__ import annotations

import torch
from torch import Tensor, nn

from graphprune.capture.capture import capture
from graphprune.ir.graph import op_name
from graphprune.ir.program import Program
from graphprune.passes import RemoveNoOps
from graphprune.pipeline.pipeline import Pipeline


class NoOps(nn.Module):
    """Each line does nothing."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32)
        x = x.reshape(x.shape)
        x = x.view(x.shape[0], 8)
        x = x.expand(x.shape[0], 8)
        x = x.contiguous().clone()
        x = x.permute(0, 1)
        x = x[:, :]
        x = x.transpose(1, 1)
        return torch.relu(x)


class Needed(nn.Module):
    """Each line does something, or must stay for training."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float64).to(torch.float32)
        y = y.reshape(x.shape[0], 2, 4).transpose(1, 2)
        y = y.contiguous().view(x.shape[0], 8)
        y = y[:, 1:]
        return self.dropout(y[:, None].expand(-1, 3, 7))


def _ops(program: Program) -> list[str]:
    return [op_name(n) for n in program.forward.graph.nodes if n.op == "call_function"]


def test_what_does_nothing_goes() -> None:
    program = capture(NoOps(), (torch.randn(3, 8),))
    assert len(_ops(program)) > 5
    after = Pipeline([RemoveNoOps()]).run(program).program
    assert _ops(after) == ["relu"]


def test_what_does_something_stays() -> None:
    program = capture(Needed(), (torch.randn(3, 8),))
    after = Pipeline([RemoveNoOps()]).run(program).program
    kept = set(_ops(after))
    assert {"transpose", "contiguous", "slice", "dropout", "expand"} <= kept
    assert _ops(after).count("to") == 2


def test_an_input_may_become_the_output() -> None:
    class Identity(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape)

    program = capture(Identity(), (torch.randn(3, 8),))
    after = Pipeline([RemoveNoOps()]).run(program).program
    assert _ops(after) == []
    x = torch.randn(4, 8)
    assert after(x).equal(x)
