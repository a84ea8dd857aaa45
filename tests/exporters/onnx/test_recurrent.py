"""Recurrent layers in ONNX: one node a layer, equal to torch at every length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from graphprune.capture.capture import capture
from graphprune.errors import ExportError
from graphprune.exporters.onnx.convert import lower, to_onnx
from graphprune.exporters.onnx.files import save_onnx
from graphprune.exporters.runtime.parity import check_parity
from graphprune.exporters.runtime.session import open_session
from graphprune.ir.program import Program

LAYERS: dict[str, Any] = {
    "LSTM": lambda: nn.LSTM(8, 5, 2, bidirectional=True, batch_first=True),
    "GRU": lambda: nn.GRU(8, 5, 2, batch_first=True),
    "RNN": lambda: nn.RNN(8, 5, bidirectional=True, nonlinearity="relu", batch_first=True),
    "unbiased": lambda: nn.GRU(8, 5, bias=False, bidirectional=True, batch_first=True),
    "projected": lambda: nn.LSTM(8, 5, 2, bidirectional=True, proj_size=3, batch_first=True),
}


class Layer(nn.Module):
    """A layer and a learned first state, where it has one."""

    def __init__(self, layer: Any, states: int = 0) -> None:
        super().__init__()
        self.layer = layer
        count = layer.num_layers * (2 if layer.bidirectional else 1)
        sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size][:states]
        self.states = nn.ParameterList(torch.randn(count, 1, size) for size in sizes)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.5)

    def forward(self, x: Tensor) -> Any:
        first = [s.expand(-1, x.shape[0], -1).contiguous() for s in self.states]
        return self.layer(x, tuple(first) if len(first) > 1 else (first[0] if first else None))


def captured(layer: Any, states: int = 0) -> Program:
    return capture(Layer(layer, states).eval(), (torch.randn(2, 7, 8),))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("stated", [False, True])
def test_runs_as_torch_does(name: str, stated: bool, tmp_path: Path) -> None:
    layer = LAYERS[name]()
    if stated and layer.proj_size:
        pytest.skip("a projection with a first state has no form in ONNX")
    states = 0 if not stated else 2 if isinstance(layer, nn.LSTM) else 1
    program = captured(layer, states)
    flat = [x for x in program.forward.example]
    for got, want in zip(lower(program)(*flat), program.run(flat), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    save_onnx(to_onnx(program), tmp_path / "model.onnx")
    check_parity(program, open_session(tmp_path / "model.onnx", 1))
    nodes = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    kind = type(layer).__name__
    assert nodes.count(kind) == layer.num_layers


def test_a_projection_with_a_first_state_is_refused() -> None:
    with pytest.raises(ExportError, match=r"proj_size.*leave the state out"):
        to_onnx(captured(LAYERS["projected"](), 2))
