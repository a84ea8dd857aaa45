"""What the ONNX file looks like from outside: names, sizes, weights stored once, float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from graphprune.capture.capture import capture
from graphprune.errors import ExportError
from graphprune.exporters.onnx.convert import to_onnx
from graphprune.exporters.onnx.files import files_of, save_onnx
from graphprune.exporters.runtime.parity import check_parity
from graphprune.exporters.runtime.session import open_session
from graphprune.ir.program import Program

Captured = Callable[[str], Program]


def exported(program: Program, folder: Path) -> tuple[Any, Any]:
    """(onnx model, ORT session) of a program, verified equal."""
    path = folder / "model.onnx"
    save_onnx(to_onnx(program), path)
    session = open_session(path, 1)
    check_parity(program, session)
    return onnx.load(path), session


def shape_of(value: Any) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_inputs_outputs_and_sizes_have_the_models_names(captured: Captured, tmp_path: Path) -> None:
    model, _ = exported(captured("tiny-bert"), tmp_path)
    inputs = {v.name: shape_of(v) for v in model.graph.input}
    assert inputs["input_ids"] == inputs["attention_mask"] == ["batch_size", "sequence_length"]
    assert {v.name: shape_of(v) for v in model.graph.output} == {
        "last_hidden_state": ["batch_size", "sequence_length", 32],
        "pooler_output": ["batch_size", 32],
    }


def test_norms_and_activations_are_single_operators(captured: Captured, tmp_path: Path) -> None:
    model, _ = exported(captured("tiny-bert"), tmp_path)
    kinds = [n.op_type for n in model.graph.node]
    assert kinds.count("LayerNormalization") == 5
    assert kinds.count("Gelu") == 2
    assert kinds.count("Attention") == 2
    assert not {"Erf", "ReduceMean", "Softmax", "Transpose", "Reshape"} & set(kinds)


def test_numbers_of_heads_are_written_into_reshapes(captured: Captured, tmp_path: Path) -> None:
    """Runtimes that infer shapes otherwise than ONNX Runtime get them from nowhere else."""
    model = onnx.shape_inference.infer_shapes(exported(captured("tiny-llama"), tmp_path)[0])
    known = {v.name: shape_of(v) for v in model.graph.value_info}
    attention = next(n for n in model.graph.node if n.op_type == "Attention")
    assert [known[name][1] for name in attention.input[:3]] == [4, 2, 2]
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    made = {n.output[0]: n for n in model.graph.node}
    for reshape in (n for n in model.graph.node if n.op_type == "Reshape"):
        parts = made[reshape.input[1]].input if reshape.input[1] in made else reshape.input[1:]
        assert not any(-1 in constants[name] for name in parts if name in constants)


class Tied(nn.Module):
    """One matrix that embeds and scores, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(77, 8)
        self.head = nn.Linear(8, 77, bias=False)
        self.head.weight = self.embedding.weight
        self.inner = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.inner(self.inner(self.embedding(ids)))
        return self.head(hidden)


def test_tied_and_shared_weights_are_one_initializer(tmp_path: Path) -> None:
    program = capture(Tied(), {"ids": torch.randint(0, 77, (2, 5))})
    model, _ = exported(program, tmp_path)
    weights = [i for i in model.graph.initializer if np.prod(i.dims) >= 8]
    assert sum(int(np.prod(i.dims)) for i in weights) == 77 * 8 + 8 * 8 + 8


class Odd(nn.Module):
    """Outputs that are an input, a weight, None, nested, equal, or named like an input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor, unused: Tensor, pair: tuple[Tensor, Tensor]) -> Any:
        doubled = x * 2
        return {
            "x": x,
            "weight": self.weight,
            "none": None,
            "nested": (doubled, [pair[0] + pair[1]]),
            "again": x * 2,
            "doubled": doubled,
        }


def test_odd_inputs_and_outputs(tmp_path: Path) -> None:
    x = torch.randn(2, 3)
    program = capture(Odd(), {"x": x, "unused": x + 1, "pair": (x + 2, x + 3)})
    model, session = exported(program, tmp_path)
    assert [i.name for i in model.graph.input] == ["x", "unused", "pair.0", "pair.1"]
    outputs = [o.name for o in model.graph.output]
    assert outputs == ["x_out", "weight", "nested.0", "nested.1.0", "again", "doubled"]
    feeds = {"x": x, "unused": x, "pair.0": x, "pair.1": x}
    results = session.run(None, {k: v.numpy() for k, v in feeds.items()})
    for name, value in zip(outputs, results, strict=True):
        wanted = {"x_out": x, "weight": program.tensors["weight"]}.get(name, 2 * x)
        assert torch.equal(torch.from_numpy(value), wanted), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_programs_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2)).to(dtype)
    program = capture(model, (torch.randn(2, 6, dtype=dtype),))
    file, _ = exported(program, tmp_path)
    kinds = {i.data_type for i in file.graph.initializer}
    assert kinds == {onnx.TensorProto.FLOAT}
    assert file.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


class Experts(nn.Module):
    """Rows to experts by given ends: some groups may be empty, some rows left over."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 5))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        import graphprune.ir.operators

        return graphprune.ir.operators.grouped_mm(x, self.weight, ends)


@pytest.mark.parametrize("ends", [[2, 2, 5, 7], [0, 0, 0, 3], [7, 7, 7, 7], [0, 0, 0, 0]], ids=str)
def test_grouped_matmul(ends: list[int], tmp_path: Path) -> None:
    inputs = {"x": torch.randn(7, 3), "ends": torch.tensor([1, 3, 4, 7])}
    program = capture(Experts(), inputs)
    file, session = exported(program, tmp_path)
    assert sum(int(np.prod(i.dims)) for i in file.graph.initializer if len(i.dims) == 3) == 60
    x = torch.randn(7, 3)
    expected = torch.zeros(7, 5)
    start = 0
    for group, end in enumerate(ends):
        expected[start:end] = x[start:end] @ program.tensors["weight"][group]
        start = end
    feeds = {"x": x.numpy(), "ends": np.array(ends)}
    (actual,) = session.run(None, feeds)
    torch.testing.assert_close(torch.from_numpy(actual), expected)


class Counts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.histc(x, bins=5, min=-1, max=4)


def test_histogram(tmp_path: Path) -> None:
    program = capture(Counts(), (torch.tensor([-1.0, 4, 4.1, -1.1, 0, 0.5, 3.999, 2]),))
    _, session = exported(program, tmp_path)
    values = torch.tensor([-1.0, -1, 0, 1, 2, 3, 4, 5])
    (actual,) = session.run(None, {session.get_inputs()[0].name: values.numpy()})
    assert actual.tolist() == [2, 1, 1, 1, 2]


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.histc(x, bins=5)


def test_an_operator_without_onnx_form_is_named() -> None:
    with pytest.raises(ExportError, match=r"histc over the range"):
        to_onnx(capture(Unknown(), (torch.randn(6),)))


def test_weights_above_the_limit_go_to_a_second_file(
    captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphprune.exporters.onnx.files.BESIDE_ABOVE", 100)
    program = captured("tiny-mlp")
    save_onnx(to_onnx(program), tmp_path / "model.onnx")
    files = files_of(tmp_path / "model.onnx")
    assert [f.name for f in files] == ["model.onnx", "model.onnx_data"]
    assert files[1].stat().st_size >= program.nbytes() * 0.9
    check_parity(program, open_session(files[0], 1))


def test_loops_keep_their_bodies(tmp_path: Path) -> None:
    """nn.EmbeddingBag becomes a Loop, whose outputs are names of its body."""
    program = capture(nn.EmbeddingBag(20, 8).eval(), (torch.randint(0, 20, (2, 5)),))
    exported(program, tmp_path)


class Plain:
    """An output class that is registered without the names of its fields."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.first, self.second = first, second


pytree.register_pytree_node(
    Plain, lambda p: ([p.first, p.second], None), lambda values, _: Plain(*values)
)


def test_outputs_without_names_are_numbered(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Plain:
            y = self.a(x)
            return Plain(y, y.relu())

    model, _ = exported(capture(Net().eval(), (torch.randn(2, 4),)), tmp_path)
    assert [v.name for v in model.graph.output] == ["output_0", "output_1"]
