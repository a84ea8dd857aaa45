"""Recalibrated statistics are those of the inputs, norm after norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.capture.capture import capture
from graphprune.errors import UnsupportedError
from graphprune.models.zoo.tiny import randomize
from graphprune.passes import FoldBatchNorm, PruneNeurons, RecalibrateBatchNorm


def _model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6),
        nn.Flatten(), nn.Linear(6 * 16, 4), nn.BatchNorm1d(4),
    )  # fmt: skip


def test_statistics_are_what_training_mode_would_see() -> None:
    model, x = _model(), torch.randn(60, 2, 8, 8)
    randomize(model)
    program = capture(model.eval(), (x[:5],))
    compiled = gp.compile(program, [RecalibrateBatchNorm()], calibration=list(x.split(13)))
    # In training mode one batch of all samples is normalized by its own statistics.
    with torch.no_grad():
        expected = model.train()(x)
    torch.testing.assert_close(compiled.program.run([x])[0], expected, rtol=1e-4, atol=1e-4)
    for name in program.parameters:
        assert torch.equal(compiled.program.tensors[name], program.tensors[name])


def test_it_repairs_what_a_cut_has_moved() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Conv2d(16, 6, 3, bias=False), nn.BatchNorm2d(6)
    )
    data = [torch.randn(20, 2, 8, 8) for _ in range(3)]
    program = gp.compile(
        capture(model.eval(), (data[0],)), [RecalibrateBatchNorm()], calibration=data
    ).program
    cut = PruneNeurons(0.5)
    plain = gp.compile(program, [cut]).program
    repaired = gp.compile(program, [cut, RecalibrateBatchNorm(), FoldBatchNorm()], calibration=data)

    def error(result: Tensor, x: Tensor) -> float:
        return float((result - program.run([x])[0]).square().sum())

    errors = [sum(error(p.run([x])[0], x) for x in data) for p in (plain, repaired.program)]
    assert errors[1] < errors[0]


def test_statistics_of_several_places_stay() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.norm(self.layer(torch.relu(self.norm(self.layer(x)))))
            return result

    x = torch.randn(5, 2, 4, 4)
    program = capture(Twice().eval(), (x,))
    compiled = gp.compile(program, [RecalibrateBatchNorm()], calibration=[x])
    details = compiled.report.passes[0].details
    assert details["recalibrated"] == []
    assert [s["reason"] for s in details["skipped"]] == [
        "its statistics are read elsewhere too"
    ] * 2


def test_infinite_inputs_are_refused() -> None:
    x = torch.randn(5, 2, 4, 4)
    program = capture(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).eval(), (x,))
    with pytest.raises(UnsupportedError, match="holds NaN or infinity"):
        gp.compile(program, [RecalibrateBatchNorm()], calibration=[x * torch.inf])
