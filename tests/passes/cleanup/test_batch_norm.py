from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from graphprune.capture.capture import capture
from graphprune.ir.graph import is_op
from graphprune.ir.program import Program
from graphprune.models.zoo.tiny import randomize
from graphprune.passes import FoldBatchNorm, PruneNeurons
from graphprune.pipeline.pipeline import Pipeline, PipelineResult

Captured = Callable[[str], Program]


def _norms(program: Program) -> int:
    return sum(is_op(n, "batch_norm") for n in program.forward.graph.nodes)


def _fold(model: nn.Module, *inputs: Tensor) -> PipelineResult:
    randomize(model)
    return Pipeline([FoldBatchNorm()]).run(capture(model, inputs))


def test_batch_norms_go_into_the_convolutions(captured: Captured) -> None:
    before = captured("tiny-cnn")
    result = Pipeline([FoldBatchNorm()]).run(before)
    assert (_norms(before), _norms(result.program)) == (3, 0)
    assert "inner.bias" in result.program.parameters
    left = [name for name in result.program.tensors if "norm" in name]
    assert {name.split(".")[-1] for name in left} == {"num_batches_tracked"}
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(result.program(x), before(x), rtol=1e-5, atol=1e-5)


def test_pruning_before_or_after_folding_gives_the_same_shapes(captured: Captured) -> None:
    before = captured("tiny-cnn")
    for passes in ([FoldBatchNorm(), PruneNeurons(0.5)], [PruneNeurons(0.5), FoldBatchNorm()]):
        after = Pipeline(passes).run(before).program
        assert after.tensors["inner.weight"].shape == (16, 16, 3, 3)
        assert after.tensors["inner.bias"].shape == (16,)


def test_a_linear_layer_over_plain_features_counts() -> None:
    result = _fold(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), torch.randn(5, 6))
    assert _norms(result.program) == 0


class SharedInput(nn.Module):
    """The convolution's result is read before the norm too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.norm(y)


class SharedWeight(nn.Module):
    """One convolution, used twice, with a norm after one of the uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(torch.relu(self.conv(x))))


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.relu(x))


def test_what_cannot_be_folded_is_left_and_reported() -> None:
    reasons = {
        SharedInput: "is read by others too",
        SharedWeight: "is read elsewhere too",
        First: "is neither a convolution nor linear",
    }
    for model, reason in reasons.items():
        result = _fold(model(), torch.randn(2, 3, 5, 5))
        assert not result.modified
        assert reason in result.results[0].report["skipped"][0]["reason"]


def test_half_precision_is_left_alone(captured: Captured) -> None:
    half = captured("tiny-cnn").cast(torch.float32, torch.bfloat16)
    result = Pipeline([FoldBatchNorm()]).run(half)
    assert not result.modified
    assert "round it again" in result.results[0].report["skipped"][0]["reason"]


def test_features_last_do_not_count() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)
            self.norm = nn.BatchNorm1d(7)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x))

    result = _fold(Sequence(), torch.randn(5, 7, 6))
    assert not result.modified
    assert "features last" in result.results[0].report["skipped"][0]["reason"]
