"""Names of the ONNX file: the model's own, nested, numbered, and never two of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

import graphprune as gp
from graphprune.exporters.onnx.convert import to_onnx
from graphprune.exporters.onnx.names import (
    input_names,
    is_tensor_output,
    limits_by_input,
    output_names,
    rename_symbols,
)
from graphprune.ir.program import Argument, Constant, Entry, Program

aten = torch.ops.aten


@pytest.fixture
def entry(program_of: Callable[..., Program]) -> Callable[[Any], Entry]:
    """An entry with inputs `x` and `past`, a nested pair, and some outputs of relu(x)."""

    def made(outputs: Callable[[fx.Node], Any]) -> Entry:
        def write(graph: fx.Graph, node: dict[str, fx.Node]) -> Any:
            return outputs(graph.call_function(aten.relu.default, (node["x"],)))

        inputs = {name: torch.randn(2, 3) for name in ("past_0", "x", "past_1")}
        forward = program_of({}, inputs, write, {"x": {0: "batch"}}).forward
        leaf, pair = (pytree.tree_flatten(t)[1] for t in (0, [(0, {"key": 0, "flag": 0})]))
        return replace(
            forward,
            arguments=(
                Argument("x", leaf, ("x",)),
                Argument("past", pair, ("past_0", "past_1", Constant(True))),
            ),
        )

    return made


def test_inputs_have_the_names_of_arguments_and_keys(entry: Callable[[Any], Entry]) -> None:
    """In the order of the placeholders, which is not that of the arguments."""
    made = entry(lambda y: (y,))
    assert input_names(made) == ["past.0.0", "x", "past.0.1.key"]


def test_limits_use_the_names_of_the_file(entry: Callable[[Any], Entry]) -> None:
    made = replace(
        entry(lambda y: (y,)), bounds={"batch": (2, 8)}, fixed={"past_1": {0: "a branch"}}
    )
    limits = limits_by_input(made)
    assert list(limits["fixed"]) == ["past.0.1.key"]
    assert limits["bounds"] == {"batch_size": [2, 8]}


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (lambda y: y, ["output_0"]),
        (lambda y: (y, y), ["output_0", "output_1"]),
        (lambda y: {"logits": y, "hidden": (y, y)}, ["logits", "hidden.0", "hidden.1"]),
        (lambda y: {"loss": None, "logits": y, "count": 3}, ["logits"]),
        (lambda y: (None, y), ["output_1"]),
        (lambda y: {"x": y, "x_out": y}, ["x_out", "x_out_out"]),
    ],
)
def test_outputs_are_named_by_keys_or_numbered(
    outputs: Any, names: list[str], entry: Callable[[Any], Entry]
) -> None:
    made = entry(outputs)
    assert output_names(made) == names
    assert sum(is_tensor_output(made)) == len(names)


def test_symbols_are_replaced_as_whole_words() -> None:
    names = {"s5": "batch", "s53": "sequence"}
    assert rename_symbols("2*s53 + s5 + s530", names) == "2*sequence + batch + s530"


def test_nodes_are_called_by_the_modules_that_they_come_from() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).relu())

    model = nn.Sequential(Part(), nn.Tanh(), Part())
    program = gp.compile(model, [], example_inputs=(torch.randn(2, 3, 4),)).program
    graph = to_onnx(program).graph
    names = [(str(node.name), node.op_type) for node in graph]
    assert len(set(names)) == len(names)
    found = {kind: [name for name, other in names if other == kind] for _, kind in names}
    assert found["MatMul"] == [
        "/0/up/MatMul", "/0/down/MatMul", "/2/up/MatMul", "/2/down/MatMul",
    ]  # fmt: skip
    assert found["Relu"] == ["/0/Relu", "/2/Relu"]
    assert found["Tanh"] == ["/Tanh"]
