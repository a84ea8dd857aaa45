"""FoldParametrizations: computed weights become plain ones, which can be cut."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations as parametrizations
from torch import Tensor, nn

import graphprune as gp
from graphprune.axes import axis_groups
from graphprune.capture.capture import capture
from graphprune.ir.program import Program
from graphprune.passes import FoldParametrizations, PruneNeurons


class Standardized(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2), keepdim=True)
        w = w / (w.std((1, 2), keepdim=True) + 1e-5)
        return F.conv1d(x, w, self.bias, padding=1)


def _hooked(layer: Any, way: Callable[[Any], Any] = nn.utils.weight_norm) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises the other form
        return way(layer)


WAYS: dict[str, Callable[[int, int], Any]] = {
    "weight norm": lambda i, o: parametrizations.weight_norm(nn.Conv1d(i, o, 3, padding=1)),
    "weight norm of old": lambda i, o: _hooked(nn.Conv1d(i, o, 3, padding=1)),
    "spectral norm": lambda i, o: parametrizations.spectral_norm(nn.Conv1d(i, o, 3, padding=1)),
    "spectral norm of old": lambda i, o: _hooked(
        nn.Conv1d(i, o, 3, padding=1), nn.utils.spectral_norm
    ),
    "standardization": lambda i, o: Standardized(i, o, 3),
    "orthogonal": lambda i, o: parametrizations.orthogonal(nn.Conv1d(i, o, 1)),
}


class Net(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b = WAYS[way](4, 12), WAYS[way](12, 6)
        self.c = nn.Linear(6, 3)
        self.spare = nn.Parameter(torch.randn(7, 3))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if not name.endswith(("original0", "_g")):
                    parameter.copy_(torch.randn_like(parameter))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.b(F.relu(self.a(x))))
        result: Tensor = self.c(h.mean(-1))
        return result


def captured(way: str) -> tuple[nn.Module, Program]:
    model = Net(way).eval()
    return model, capture(model, (torch.randn(2, 4, 9),))


@pytest.mark.parametrize("way", WAYS)
def test_weights_become_plain_and_can_be_cut(way: str) -> None:
    model, program = captured(way)
    before = axis_groups(program)
    assert all(g.frozen or g.normalized for g in before if g.role == "neuron" and g.size == 12)
    result = gp.compile(program, [FoldParametrizations(), PruneNeurons(0.5)])
    x = torch.randn(3, 4, 11)
    folded = gp.compile(program, [FoldParametrizations()])
    torch.testing.assert_close(folded.program.run([x])[0], model(x), rtol=1e-4, atol=1e-5)
    assert {"a.weight", "b.weight"} <= folded.program.parameters
    assert set(folded.program.tensors) == {
        f"{layer}.{kind}" for layer in "abc" for kind in ("weight", "bias")
    }
    details = folded.report.passes[0].details
    assert details["folded"] == ["a.weight", "b.weight"]
    assert "spare" in details["tensors"]
    assert details["values"] >= 21
    assert result.program.tensors["a.weight"].shape[0] == 6


def test_plain_models_stay_as_they_are(captured: Callable[[str], Program]) -> None:
    program = captured("tiny-bert")
    result = gp.compile(program, [FoldParametrizations()])
    assert result.program.tensors.keys() == program.tensors.keys()


def test_a_weight_that_is_read_elsewhere_too_keeps_its_parameters() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(200, 200))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.weight), self.weight / self.weight.norm())

    program = capture(Shared(), (torch.randn(2, 200),))
    details = gp.compile(program, [FoldParametrizations()]).report.passes[0].details
    assert details["folded"] == []
    assert "read elsewhere too" in details["skipped"][0]["reason"]
