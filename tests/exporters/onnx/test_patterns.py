"""What stands around an attention: heads split, joined, repeated; found, and left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from graphprune.exporters.onnx.patterns import heads_together, rejoined, same, shared, unchanged
from graphprune.ir.graph import flat_outputs
from graphprune.ir.program import Program

aten = torch.ops.aten
Call = Callable[..., fx.Node]
B, L, H, W = 2, 5, 3, 4


@pytest.fixture
def nodes(program_of: Callable[..., Program]) -> Callable[..., Any]:
    """Nodes that a function makes of an input of some sizes, with their shapes."""

    def made(write: Callable[[Call, fx.Node], tuple[fx.Node, ...]], *sizes: int) -> Any:
        def one(graph: fx.Graph, node: dict[str, fx.Node]) -> tuple[fx.Node, ...]:
            return write(graph.call_function, node["x"])

        inputs = {"x": torch.randn(sizes)}
        program = program_of({}, inputs, one, {"x": {0: "batch"}})
        return program, program.forward.graph

    return made


def outputs(graph: fx.Graph) -> list[fx.Node]:
    return list(flat_outputs(graph))


SPLITS: dict[str, Callable[[Call, fx.Node], fx.Node]] = {
    "view, transpose": lambda c, x: c(
        aten.transpose.int, (c(aten.view.default, (x, [-1, L, H, W])), 1, 2)
    ),
    "unflatten, permute": lambda c, x: c(
        aten.permute.default, (c(aten.unflatten.int, (x, -1, [H, W])), [0, 2, 1, -1])
    ),
    "reshape, copies, transpose": lambda c, x: c(
        aten.transpose.int,
        (c(aten.contiguous.default, (c(aten.reshape.default, (x, [-1, L, H, W])),)), -2, -3),
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_is_undone(name: str, nodes: Callable[..., Any]) -> None:
    _, graph = nodes(lambda c, x: (SPLITS[name](c, x),), B, L, H * W)
    (split,) = outputs(graph)
    undo = heads_together(split)
    assert undo is not None
    assert undo() is next(iter(graph.nodes))


def test_heads_that_were_never_together_are_flattened(nodes: Callable[..., Any]) -> None:
    _, graph = nodes(lambda c, x: (c(aten.transpose.int, (x, 1, 2)),), B, L, H, W)
    (split,) = outputs(graph)
    undo = heads_together(split)
    assert undo is not None
    split.graph.inserting_before(split)
    flat = undo()
    assert (flat.target, flat.args[1:]) == (aten.flatten.using_ints, (2, 3))


@pytest.mark.parametrize(
    "write",
    [
        lambda c, x: c(aten.transpose.int, (x, 2, 3)),
        lambda c, x: c(aten.permute.default, (x, [0, 2, 3, 1])),
        lambda c, x: c(aten.relu.default, (x,)),
    ],
)
def test_other_orders_are_no_split(write: Any, nodes: Callable[..., Any]) -> None:
    _, graph = nodes(lambda c, x: (write(c, x),), B, L, H, W)
    assert heads_together(outputs(graph)[0]) is None


def test_what_puts_heads_together_again_is_found(nodes: Callable[..., Any]) -> None:
    def write(c: Call, x: fx.Node) -> tuple[fx.Node, ...]:
        back = c(aten.transpose.int, (c(aten.clone.default, (x,)), 1, 2))
        solid = c(aten.contiguous.default, (back,))
        joined = c(aten.reshape.default, (solid, [-1, L, H * W]))
        return joined, c(aten.flatten.using_ints, (back, 2)), c(aten.flatten.using_ints, (back, 1))

    _, graph = nodes(write, B, H, L, W)
    first, second, neither = outputs(graph)
    found = rejoined(next(iter(graph.nodes)))
    assert set(found) == {first, second}
    assert neither not in found


def test_copies_are_seen_through_and_changes_are_not(nodes: Callable[..., Any]) -> None:
    def write(c: Call, x: fx.Node) -> tuple[fx.Node, ...]:
        copy = c(aten.contiguous.default, (c(aten.dropout.default, (x, 0.5, False)),))
        copy = c(aten.to.dtype, (c(aten.slice.Tensor, (copy, 1, 0, 99)), torch.float32))
        changes = (
            c(aten.dropout.default, (x, 0.5, True)),
            c(aten.to.dtype, (x, torch.float64)),
            c(aten.slice.Tensor, (x, 1, 1, 99)),
            c(aten.relu.default, (x,)),
        )
        return copy, *changes

    _, graph = nodes(write, B, L)
    copy, *changes = outputs(graph)
    assert unchanged(copy) is next(iter(graph.nodes))
    assert all(unchanged(node) is node for node in changes)


def repeated(c: Call, x: fx.Node) -> fx.Node:
    lifted = c(aten.unsqueeze.default, (x, 2))
    wide = c(aten.expand.default, (lifted, [-1, H, 2, L, W]))
    return c(aten.reshape.default, (wide, [-1, H * 2, L, W]))


def test_repeated_heads_are_found_where_key_and_value_are_alike(nodes: Callable[..., Any]) -> None:
    def write(c: Call, x: fx.Node) -> tuple[fx.Node, ...]:
        interleaved = c(aten.repeat_interleave.self_int, (x, 2, 1))
        other = c(aten.repeat_interleave.self_int, (x, 2, 2))
        tiled = c(aten.repeat.default, (x, [1, 2, 1, 1]))
        return repeated(c, x), interleaved, other, tiled

    program, graph = nodes(write, B, H, L, W)
    x = next(iter(graph.nodes))
    expanded, interleaved, other, tiled = outputs(graph)
    assert shared(expanded, interleaved) == (x, x)
    assert shared(expanded, other) == (expanded, other)
    assert shared(tiled, interleaved) == (tiled, interleaved)
    (example,) = program.forward.example
    first, second, *_ = program.run([example])
    assert torch.equal(first, second)
    assert torch.equal(first[:, ::2], example)


def test_shapes_are_compared_without_a_guard() -> None:
    assert same((1, 2), [1, 2])
    assert not same((1, 2), (1, 3))
    assert not same((1,), (1, 1))
