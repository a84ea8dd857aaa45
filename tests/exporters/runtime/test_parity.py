"""Parity sees every difference: values, shapes, types, NaN; and names the output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphprune.capture.capture import capture
from graphprune.errors import ExportError
from graphprune.exporters.onnx.convert import to_onnx
from graphprune.exporters.onnx.files import save_onnx
from graphprune.exporters.runtime.parity import (
    TOLERANCE,
    _beyond_rounding,
    _in_float64,
    _in_the_last_bits,
    check_parity,
)
from graphprune.exporters.runtime.session import open_session
from graphprune.ir.program import Program
from graphprune.verify.error import relative_error


def test_a_batch_that_the_model_itself_refuses_is_left_out(tmp_path: Path) -> None:
    """Rows by arithmetic on what comes in: most drawn numbers are out of the table's range."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(x.round().long())

    program = capture(Rows().eval(), (torch.tensor([[0.0, 4.0, 1.0], [2.0, 2.0, 3.0]]),))
    save_onnx(to_onnx(program), tmp_path / "model.onnx")
    found = check_parity(program, open_session(tmp_path / "model.onnx", 1))
    assert [a.shape for a in found] == [(2, 3, 6), (3, 2, 6)]


def test_a_changed_weight_is_found_and_the_output_named(
    captured: Callable[[str], Program], tmp_path: Path
) -> None:
    program = captured("tiny-mlp")
    save_onnx(to_onnx(program), tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", 1)
    good = check_parity(program, session)
    assert [a.shape for a in good] == [(3, 5), (4, 5), (3, 5)]
    assert max(a.error for a in good) < 1e-5
    name = "layers.2.bias"
    changed = program.with_tensors({name: program.tensors[name] + 0.01})
    with pytest.raises(ExportError, match=r"output 'output_0'"):
        check_parity(changed, session)


def test_the_sigmoid_of_onnx_runtime_may_be_as_coarse_as_it_is_near_one(tmp_path: Path) -> None:
    """Rows of tiny activations: ORT is off by 1e-7 there, of values of 1e-5."""

    class Activations(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(x)

    example = torch.linspace(-13, -9, 512)[None].repeat(2, 1)
    program = capture(Activations().eval(), (example,))
    save_onnx(to_onnx(program), tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", 1)
    exact = torch.sigmoid(example.double())
    (ort,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    assert float((torch.from_numpy(ort) - exact).abs().max() / exact.max()) > 1e-4
    assert max(a.error for a in check_parity(program, session)) <= 1e-4


def test_a_sigmoid_that_is_off_by_more_is_found(tmp_path: Path) -> None:
    class Activations(nn.Module):
        def __init__(self, bias: float) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.tensor(bias))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(x + self.bias)

    example = torch.linspace(-13, -9, 512)[None].repeat(2, 1)
    save_onnx(to_onnx(capture(Activations(0.0).eval(), (example,))), tmp_path / "model.onnx")
    changed = capture(Activations(0.01).eval(), (example,))
    with pytest.raises(ExportError, match=r"output 'output_0'"):
        check_parity(changed, open_session(tmp_path / "model.onnx", 1))


def test_rounding_may_hit_other_rows_in_onnx_runtime() -> None:
    """Torch loses 2e-4 in the first row and nothing in the second; ORT the other way round."""
    exact = torch.ones(5, 8, dtype=torch.float64)
    torch32, ort, wrong = (exact.float() for _ in range(3))
    torch32[2:] += 1e-7
    torch32[0] += 2e-4
    ort[1] += 2e-4
    wrong[1] += 1e-3
    assert relative_error(torch32, ort) > TOLERANCE
    assert _beyond_rounding([torch32], ort, exact, TOLERANCE, 0.0) <= TOLERANCE
    assert _beyond_rounding([torch32], wrong, exact, TOLERANCE, 0.0) > TOLERANCE


class Cancels(nn.Module):
    """Adds nothing to x, by two equal products whose difference is magnified."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64, bias=False)
        self.second = nn.Linear(64, 64, bias=False)
        self.second.load_state_dict(self.first.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return x + 1e4 * (self.first(x) - self.second(x))


def test_torch_may_be_exact_by_luck() -> None:
    """Both sums lose the same in torch, so nothing; in another order they do not."""
    torch.manual_seed(0)
    model, x = Cancels(), torch.randn(3, 64)
    program = capture(model, (x,))
    exact = _in_float64(program, [x])[0]
    torch32 = program.run([x])[0]
    weight = program.tensors["first.weight"]
    assert relative_error(exact, torch32) < 1e-6

    def other(first: Tensor) -> Tensor:
        """As another library may compute it: the first product from right to left."""
        return x + 1e4 * (x.flip(1) @ first.flip(1).T - x @ weight.T)

    samples = [torch32, *(sample[0] for sample in _in_the_last_bits(program, [x]))]
    assert _beyond_rounding([torch32], other(weight), exact, TOLERANCE, 0.0) > TOLERANCE
    assert _beyond_rounding(samples, other(weight), exact, TOLERANCE, 0.0) <= TOLERANCE
    wrong = other(weight * (1 + 1e-4))
    assert _beyond_rounding(samples, wrong, exact, TOLERANCE, 0.0) > TOLERANCE


def test_a_row_that_a_last_bit_decides_excuses_no_other() -> None:
    exact = torch.ones(3, 8, dtype=torch.float64)
    torch32, flipped, ort = (exact.float() + 1e-7 for _ in range(3))
    flipped[0] += 1
    ort[1] += 1e-3
    assert _beyond_rounding([torch32, flipped], ort, exact, TOLERANCE, 0.0) > TOLERANCE
    assert _beyond_rounding([torch32, flipped], flipped, exact, TOLERANCE, 0.0) <= TOLERANCE
