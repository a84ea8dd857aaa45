"""Recurrent layers in int8: LSTM as its formula says, GRU and RNN in float and reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import graphprune as gp
from graphprune.capture.capture import capture
from graphprune.errors import ExportError
from graphprune.exporters.onnx.convert import to_onnx
from graphprune.exporters.onnx.files import file_bytes, save_onnx
from graphprune.exporters.quantize.quantize import NothingToQuantizeError, quantize
from graphprune.exporters.runtime.session import open_session
from graphprune.ir.quantization import Mark
from graphprune.passes import Quantize

# Eight bits overflow on CPUs without VNNI, in ONNX Runtime's own kernels.
DYNAMIC = Mark("int8-dynamic", reduce_range=True)


class Tagger(nn.Module):
    """A recurrent layer of 16 units over 8 features, and a head where it has one."""

    def __init__(self, kind: str = "LSTM", head: int = 0, layers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = getattr(nn, kind)(8, 16, layers, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, head) if head else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.rnn(x)[0])
        return result


def written(model: nn.Module, folder: Path) -> tuple[Path, dict[str, Any]]:
    torch.manual_seed(1)
    x = torch.randn(3, 7, 8)
    program = capture(model.eval(), (x,))
    save_onnx(to_onnx(program), folder / "float.onnx")
    name = open_session(folder / "float.onnx", 1).get_inputs()[0].name
    return folder / "float.onnx", {name: x.numpy()}


def run(path: Path, feed: dict[str, Any]) -> Any:
    return open_session(path, 1).run(None, feed)[0]


def quantized_activation(x: Any) -> Any:
    """What uint8 makes of a value: one scale and zero point, zero among the values."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = np.float32((high - low) / 255 or 1)
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


def simulated(x: Any, w: Any, r: Any, bias: Any) -> Any:
    """One direction of an LSTM whose products are of uint8 and int8.

    Args:
        x: [steps, batch, inputs].
        w: codes times scales [inputs, 4 · units], gates in the order i, o, f, c.
        r: likewise [units, 4 · units].
        bias: [4 · units].
    """
    units = r.shape[0]
    h = c = np.zeros((x.shape[1], units), np.float32)
    projected, steps = quantized_activation(x) @ w, []
    for t in range(len(x)):
        i, o, f, g = np.split(projected[t] + quantized_activation(h) @ r + bias, 4, 1)
        i, o, f = (1 / (1 + np.exp(-v)) for v in (i, o, f))
        c = f * c + i * np.tanh(g)
        h = o * np.tanh(c)
        steps.append(h)
    return np.stack(steps)


@pytest.mark.parametrize("reduced", [False, True])
def test_an_lstm_is_what_its_codes_say(reduced: bool, tmp_path: Path) -> None:
    source, feed = written(Tagger(), tmp_path)
    mark = Mark("int8-dynamic", reduce_range=reduced)
    notes = quantize(source, tmp_path / "int8.onnx", mark, [feed])
    assert (notes["recurrent"], notes["products"], notes["float"]) == (1, 0, {})
    model = onnx.load(tmp_path / "int8.onnx")
    (node,) = [n for n in model.graph.node if n.op_type == "DynamicQuantizeLSTM"]
    assert not [n for n in model.graph.node if n.op_type == "LSTM"]
    value = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    w, r, bias = (value[node.input[i]] for i in (1, 2, 3))
    w_scale, w_zero, r_scale, r_zero = (value[name] for name in node.input[8:12])
    assert w.dtype == r.dtype == np.int8
    assert (w.shape, r.shape) == ((2, 8, 64), (2, 16, 64))
    assert w_scale.shape == r_scale.shape == (2, 64)  # of each row, in each direction
    assert np.abs(w).max() == np.abs(r).max() == (64 if reduced else 127)
    assert not w_zero.any()
    assert not r_zero.any()
    if not reduced:  # what they compute depends on the CPU
        return
    x = next(iter(feed.values())).transpose(1, 0, 2)
    found = []
    for d, ordered in enumerate((x, x[::-1])):
        biases = bias[d, :64] + bias[d, 64:]
        codes = w[d] * w_scale[d], r[d] * r_scale[d]
        steps = simulated(ordered, *codes, biases)
        found.append(steps if d == 0 else steps[::-1])
    expected = np.concatenate(found, 2).transpose(1, 0, 2)
    actual = run(tmp_path / "int8.onnx", feed)
    assert np.abs(actual - expected).max() < 1e-4  # a rounding of h that falls otherwise: 0.004
    assert 0 < np.abs(actual - run(source, feed)).max() < 0.05


def test_layers_and_their_head_are_all_in_int8(tmp_path: Path) -> None:
    source, feed = written(Tagger(head=5, layers=2), tmp_path)
    notes = quantize(source, tmp_path / "int8.onnx", DYNAMIC, [feed])
    assert (notes["recurrent"], notes["products"], notes["float"]) == (2, 1, {})
    assert file_bytes(tmp_path / "int8.onnx") < 0.6 * file_bytes(source)
    assert max(drift["error"] for drift in notes["drift"]) < 0.05


@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_others_stay_in_float_and_say_so(kind: str, tmp_path: Path) -> None:
    source, feed = written(Tagger(kind, head=5), tmp_path)
    notes = quantize(source, tmp_path / "int8.onnx", DYNAMIC, [feed])
    assert (notes["recurrent"], notes["products"]) == (0, 1)
    assert notes["float"] == {"rnn.weight_ih_l0": f"onnxruntime has no {kind} in int8"}
    source, feed = written(Tagger(kind), tmp_path)
    with pytest.raises(NothingToQuantizeError, match=f"no {kind} in int8"):
        quantize(source, tmp_path / "int8.onnx", DYNAMIC, [feed])


def test_other_schemes_have_no_recurrent_layer(tmp_path: Path) -> None:
    source, feed = written(Tagger(head=5), tmp_path)
    notes = quantize(source, tmp_path / "int4.onnx", Mark("int4-weights", block_size=16), [feed])
    assert notes["float"] == {"rnn.weight_ih_l0": "int4-weights has no recurrent layer"}


def test_an_lstm_is_left_in_float_by_name_and_by_error(tmp_path: Path) -> None:
    source, feed = written(Tagger(head=5), tmp_path)
    ignored = replace(DYNAMIC, ignored=("rnn.weight_ih_l0",))
    notes = quantize(source, tmp_path / "a.onnx", ignored, [feed])
    assert notes["float"] == {"rnn.weight_ih_l0": "left in float on request"}
    kept = quantize(source, tmp_path / "b.onnx", replace(DYNAMIC, keep_error=0.01), [feed])
    assert kept["error"] <= 0.01


def test_a_layer_that_is_called_twice_stays_right(tmp_path: Path) -> None:
    class Twice(Tagger):
        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0] + self.rnn(x.flip(1))[0]

    source, feed = written(Twice(), tmp_path)
    notes = quantize(source, tmp_path / "int8.onnx", DYNAMIC, [feed])
    assert (notes["recurrent"], notes["float"]) == (2, {})
    assert np.abs(run(tmp_path / "int8.onnx", feed) - run(source, feed)).max() < 0.1


def test_a_report_says_it(tmp_path: Path) -> None:
    inputs, steps = (torch.randn(2, 7, 8),), [Quantize("int8-dynamic")]
    compiled = gp.compile(Tagger(head=5).eval(), steps, example_inputs=inputs)
    artifact = compiled.export(tmp_path / "out")
    assert "1 product, 1 LSTM and 0 tables" in (tmp_path / "out" / "report.md").read_text()
    assert artifact.manifest["quantization"]["model.onnx"]["recurrent"] == 1
    weights = artifact.manifest["weights"]
    dense, small = (weights[file]["recurrent"] for file in ("baseline.onnx", "model.onnx"))
    assert dense == 4 * 2 * 64 * (8 + 16)
    assert small == 2 * 64 * (8 + 16) + 2 * 2 * 64 * 5  # codes, a scale and a zero point a row
    without = gp.compile(Tagger("GRU").eval(), steps, example_inputs=inputs)
    with pytest.raises(ExportError, match="no GRU in int8"):
        without.export(tmp_path / "gru")
