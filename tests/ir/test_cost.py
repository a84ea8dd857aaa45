"""Floating point operations, against what a person counts."""

import pytest
import torch
from torch import Tensor, nn

from graphprune.capture.capture import capture
from graphprune.ir.cost import flops


def test_a_linear_layer() -> None:
    assert flops(capture(nn.Linear(6, 5), (torch.randn(4, 6),))) == 2 * 4 * 6 * 5


def test_attention_counts_scores_and_values() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q)

    program = capture(Attention(), (torch.randn(2, 3, 7, 8),), dynamic_shapes=None)
    assert flops(program) == 2 * 2 * (2 * 3 * 7 * 7 * 8)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_count_every_step(kind: type[nn.LSTM] | type[nn.GRU]) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(6, 5, batch_first=True, bidirectional=True)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(x)[0]
            return result

    model = Tagger()
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert flops(capture(model, (torch.randn(2, 7, 6),))) == 2 * 2 * 7 * weights


def test_sizes_that_depend_on_values_are_run() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 5)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            result: Tensor = self.a(x[mask].view(x.shape[0], -1, x.shape[-1])[:, -1])
            return result

    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[:, 3] = True
    program = capture(Chosen(), (torch.randn(2, 7, 6), mask), dynamic_shapes=None)
    assert flops(program) == 2 * 2 * 6 * 5


def test_counting_leaves_symbols_alone() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(6, 5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(x)[0]
            return result

    program = capture(Tagger(), (torch.randn(2, 7, 6),))
    values = {n.name: str(n.meta["val"]) for n in program.forward.graph.nodes if "val" in n.meta}
    assert flops(program) > 0
    for node in program.forward.graph.nodes:
        if node.name in values:
            assert str(node.meta["val"]) == values[node.name]
    (x,) = (n for n in program.forward.graph.nodes if n.op == "placeholder")
    assert isinstance(x.meta["val"].shape[0], torch.SymInt)
    assert x.meta["val"].shape[0].node.expr.free_symbols
