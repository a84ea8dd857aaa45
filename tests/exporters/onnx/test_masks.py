"""Masks as finite biases: attention with them is attention with the masks, unseen rows included."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from graphprune.exporters.onnx.masks import Biases
from graphprune.ir.graph import flat_outputs, output_node
from graphprune.ir.program import Program

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
