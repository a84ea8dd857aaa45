"""Masks as finite biases: attention with them is attention with the masks, unseen rows included."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from graphprune.capture.capture import capture
from graphprune.exporters.onnx.convert import lower
from graphprune.exporters.onnx.masks import Biases, narrowed
from graphprune.exporters.onnx.names import output_names
from graphprune.exporters.onnx.patterns import same
from graphprune.ir.batches import second_inputs
from graphprune.ir.graph import flat_outputs, is_op, output_node, value_of
from graphprune.ir.program import Program
from graphprune.verify.error import relative_error

ProgramOf = Callable[..., Program]
aten = torch.ops.aten
B, H, L, P, W = 2, 3, 4, 6, 5


def graph_of(program_of: ProgramOf, mask: Tensor) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """Query, key and mask as inputs of a graph with their shapes, and a copy of the mask."""

    def write(graph: fx.Graph, node: dict[str, fx.Node]) -> tuple[fx.Node, ...]:
        return (graph.call_function(aten.contiguous.default, (node["mask"],)),)

    inputs = {"query": torch.zeros(B, H, L, W), "key": torch.zeros(B, H, P, W), "mask": mask}
    graph = program_of({}, inputs, write).fork_graphs()["forward"]
    return graph, {node.name: node for node in graph.nodes}


def seen(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6


@pytest.mark.parametrize(
    "shape", [(P,), (L, P), (H, L, P), (B, 1, L, P), (B, 1, 1, P), (1, H, 1, P)]
)
@pytest.mark.parametrize("kind", ["bool", "-inf", "finite"])
def test_attention_with_the_bias_is_attention_with_the_mask(
    shape: tuple[int, ...], kind: str, program_of: ProgramOf
) -> None:
    mask = seen(*shape)
    mask.view(-1, P)[0] = False  # a row that sees nothing
    if kind != "bool":
        low = -math.inf if kind == "-inf" else -7.5
        mask = torch.where(mask, torch.randn(shape), low)
    graph, node = graph_of(program_of, mask)
    with graph.inserting_before(output_node(graph)):
        bias, alive = Biases(graph).of(node["mask"], node["query"], node["key"])
    output_node(graph).args = ((bias, alive),)
    q, k, v = torch.randn(B, H, L, W), torch.randn(B, H, P, W), torch.randn(B, H, P, W)
    found, rows = fx.GraphModule(torch.nn.Module(), graph)(q, k, mask)
    assert found.dim() == 4
    assert bool(found.isfinite().all())
    assert bool((rows == 0).any()) == (kind != "finite")
    actual = F.scaled_dot_product_attention(q, k, v, found) * rows
    wide = mask.expand(L, P) if mask.dim() == 1 else mask  # torch takes no single row
    expected = F.scaled_dot_product_attention(q, k, v, wide)
    torch.testing.assert_close(actual, expected)


def test_one_bias_is_made_for_all_that_share_a_mask(program_of: ProgramOf) -> None:
    graph, node = graph_of(program_of, seen(B, 1, L, P))
    biases = Biases(graph)
    (copy,) = flat_outputs(graph)
    with graph.inserting_before(output_node(graph)):
        first = biases.of(node["mask"], node["query"], node["key"])
        count = len(graph.nodes)
        assert biases.of(copy, node["query"], node["key"]) == first
        assert len(graph.nodes) == count
        # Of queries of another length it is another one.
        assert biases.of(node["mask"], node["key"], node["key"]) != first
    assert biases.of(None, node["query"], node["key"]) == (None, None)


def counted(n: int, dim: int, start: int = 0) -> Tensor:
    """Numbers from `start` on along one of four dimensions."""
    numbers = torch.arange(start, start + n)
    for place in range(4):
        if place != dim:
            numbers = numbers.unsqueeze(place)
    return numbers


def _at(m: Tensor, columns: Tensor) -> Tensor:
    return m[counted(m.shape[0], 0), columns]


# Masks that are made of m, [batch, length], and have [batch, 1, 1, length] in them.
WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda m: m[:, None, None].expand(-1, 1, m.shape[1], -1),
    "indexed": lambda m: _at(m, counted(m.shape[1], 3)),
    "with_what_is_true": lambda m: (counted(m.shape[1], 2) >= 0) & _at(m, counted(m.shape[1], 3)),
    "with_ones": lambda m: m.new_ones([]) & _at(m, counted(m.shape[1], 3) + 0),
}
# Masks that an index makes another one.
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "reversed": lambda m: _at(m, counted(m.shape[1], 3).flip(3)),
    "from_one": lambda m: _at(m, counted(m.shape[1], 3, 1) % m.shape[1]),
    "column_by_query": lambda m: m[counted(m.shape[0], 0), counted(m.shape[1], 2)],
    "causal": lambda m: counted(m.shape[1], 2) >= counted(m.shape[1], 3) + 0 * m[:, None, None],
    "from_second_on": lambda m: (counted(m.shape[1], 2) >= 1) & m[:, None, None],
}


class Masked(torch.nn.Module):
    """Attentions with all these masks."""

    def forward(self, x: Tensor, m: Tensor) -> dict[str, Tensor]:
        cases = WHOLE | OTHERS
        return {
            name: F.scaled_dot_product_attention(x, x, x, make(m != 0))
            for name, make in cases.items()
        }


def test_a_mask_is_narrowed_to_what_it_is_made_of() -> None:
    m = (torch.arange(12).view(3, 4) % 3 != 0).long()
    m[1] = 0
    program = capture(Masked(), {"x": torch.randn(3, 2, 4, 5), "m": m})
    module = lower(program)
    for inputs in (list(program.forward.example), second_inputs(program.forward)):
        names = output_names(program.forward)
        for name, a, b in zip(names, program.run(inputs), module(*inputs), strict=True):
            assert relative_error(a, b) < 1e-6, name
    masks: dict[str, fx.Node] = {}
    for node in program.forward.graph.nodes:
        if is_op(node, "scaled_dot_product_attention"):
            masks[names[len(masks)]] = narrowed(node.args[3])
    for name, mask in masks.items():
        small = same(value_of(mask).shape[1:3], (1, 1)) and not is_op(mask, "index")
        assert small == (name in WHOLE), name
