"""The loss of a model's output: which output counts, how, and without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphprune.capture.capture import capture
from graphprune.errors import UnsupportedError
from graphprune.ir.program import Program
from graphprune.passes.solvers.output_loss import output_loss

Captured = Callable[[str], Program]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tiny-roberta", "kl"),  # called logits
        ("tiny-encoder", "kl"),  # the last linear layer, without a name
        ("tiny-cnn", "kl"),
        ("tiny-bert", "cosine"),  # hidden states
    ],
)
def test_the_kind_follows_from_the_answer(name: str, kind: str, captured: Captured) -> None:
    loss = output_loss(captured(name))
    assert (loss.number, loss.kind) == (0, kind)


def test_one_number_a_sample_is_compared_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).eval()
    for part in (model, model[:1]):
        program = capture(part, {"input": torch.randn(3, 4)})
        loss = output_loss(program)
        assert loss.kind == "squared"
        dense = program.run(program.forward.example)
        found = loss(dense, [dense[0] + 2], program.forward.example)
        assert torch.allclose(found, torch.full((3,), 4.0))


def test_padding_does_not_count(captured: Captured) -> None:
    program = captured("tiny-bert")
    flat = list(program.forward.example)
    place = program.forward.input_names.index("attention_mask")
    flat[place] = torch.ones_like(flat[place])
    flat[place][-1, 5:] = 0
    seen = flat[place].bool()
    dense = program.run(flat)
    other = [dense[0].clone(), *dense[1:]]
    other[0][~seen] = 99.0
    loss = output_loss(program)
    found = loss(dense, other, flat)
    assert found.shape == (int(seen.sum()),)
    assert float(found.abs().max()) < 1e-6
    other[0] = torch.randn_like(dense[0])
    expected = 1 - F.cosine_similarity(dense[0], other[0], dim=-1)[seen]
    assert torch.allclose(loss(dense, other, flat), expected, atol=1e-6)


def test_logits_are_compared_by_kl(captured: Captured) -> None:
    program = captured("tiny-roberta")
    flat = program.forward.example
    dense = program.run(flat)
    other = [torch.randn_like(dense[0])]
    p, q = dense[0].softmax(-1), other[0].softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    assert torch.allclose(output_loss(program)(dense, other, flat), expected, atol=1e-5)
    # A constant for all classes is no difference.
    assert float(output_loss(program)(dense, [dense[0] + 5], flat).abs().max()) < 1e-5


def test_a_model_without_floats_is_refused() -> None:
    class Ids(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.argmax(-1)

    with pytest.raises(UnsupportedError, match="no floating-point output"):
        output_loss(capture(Ids().eval(), {"x": torch.randn(2, 3)}))
