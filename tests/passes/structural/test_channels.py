"""Channels that several axes are the factors of: a ratio is a fraction of the channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.axes import axis_groups
from graphprune.capture.capture import capture
from graphprune.ir.program import Program
from graphprune.passes import PruneAxis, PruneNeurons
from graphprune.pipeline.base import Context
from graphprune.pipeline.pipeline import Pipeline


class Grouped(nn.Module):
    """16 channels, which the second convolution reads in groups; it makes 16 as well."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 1)
        self.b = nn.Conv2d(16, 16, 3, padding=1, groups=groups)
        self.c = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return result


class Shuffled(nn.Module):
    """Channels in another order, by a reshape and a transposition."""

    def __init__(self, outer: int = 4, inner: int = 4) -> None:
        super().__init__()
        self.sizes = outer, inner
        self.a, self.b = nn.Conv2d(3, outer * inner, 1), nn.Conv2d(outer * inner, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        n, c, h, w = x.shape
        x = x.view(n, *self.sizes, h, w).transpose(1, 2).reshape(n, c, h, w)
        result: Tensor = self.b(x)
        return result


def _captured(model: nn.Module) -> Program:
    return capture(model, (torch.randn(2, 3, 8, 8),))


def _channels(program: Program) -> dict[str, int]:
    return {n.removesuffix(".bias"): len(t) for n, t in program.tensors.items() if "bias" in n}


@pytest.mark.parametrize(
    ("model", "widths", "words"),
    [
        (Grouped(4), {"a": 8, "b": 8, "c": 5}, "16 of 32 neurons in 2 groups"),
        (Grouped(2), {"a": 8, "b": 8, "c": 5}, "16 of 32 neurons in 2 groups"),
        (Grouped(16), {"a": 8, "b": 8, "c": 5}, "8 of 16 neurons in 1 group"),
        (Shuffled(), {"a": 8, "b": 5}, "8 of 16 neurons in 1 group"),
        (Shuffled(2, 8), {"a": 8, "b": 5}, "8 of 16 neurons in 1 group"),
    ],
)
def test_half_of_the_channels_go(model: nn.Module, widths: Any, words: str) -> None:
    compiled = gp.compile(_captured(model), [PruneNeurons(0.5)])
    assert _channels(compiled.program) == widths
    assert words in str(compiled.report)


def test_a_ranking_over_all_groups_counts_one_factor_too() -> None:
    compiled = gp.compile(_captured(Shuffled()), [PruneNeurons(0.5, allocation="global")])
    assert _channels(compiled.program)["a"] == 8


def test_the_factor_that_is_left_alone_is_named() -> None:
    compiled = gp.compile(_captured(Shuffled()), [PruneNeurons(0.5)])
    (skipped,) = compiled.report.skipped_lines()
    assert "a.weight[0].1: it is a factor of 16 = 4 × 4 channels; 'a.weight[0].0'" in skipped
    (group,) = compiled.report.passes[0].details["groups"]
    assert (group["before"], group["after"]) == (4, 2)
    assert group["channels"] == [{"id": "a.weight[0]", "before": 16, "after": 8}]


@pytest.mark.parametrize(
    ("sizes", "ratio", "left"), [((2, 8), 0.25, 12), ((8, 2), 0.25, 12), ((2, 8), 0.1, 14)]
)
def test_the_finer_factor_comes_nearer_to_the_ratio(
    sizes: tuple[int, int], ratio: float, left: int
) -> None:
    compiled = gp.compile(_captured(Shuffled(*sizes)), [PruneNeurons(ratio)])
    assert _channels(compiled.program)["a"] == left


def test_counts_round_up_in_channels() -> None:
    program = _captured(Shuffled())
    for round_to, left in ((1, 8), (8, 8), (3, 12), (16, 16)):
        compiled = gp.compile(program, [PruneNeurons(0.5, round_to=round_to)])
        assert _channels(compiled.program)["a"] == left


def test_groups_named_by_id_lose_the_ratio_each() -> None:
    program = _captured(Shuffled())
    both = PruneAxis(0.5, groups=("a.weight[0].*",))
    compiled = gp.compile(program, [both])
    assert _channels(compiled.program)["a"] == 4
    assert "12 of 16 neurons in 1 group" in str(compiled.report)
    inner = PruneAxis(0.5, groups=("a.weight[0].1",), round_to=2)
    assert _channels(gp.compile(program, [inner]).program)["a"] == 8
    by_role = PruneAxis(0.5, role="neuron")
    assert _channels(gp.compile(program, [by_role]).program)["a"] == 8


def test_factors_of_other_roles_are_each_their_own(captured: Any) -> None:
    """Heads and the dims inside them: one pass, two roles, two ratios."""
    step = PruneAxis(0.5, role=("head", "qk_dim"))
    program = captured("tiny-bert")
    small = gp.compile(program, [step]).program
    name = "encoder.layer.0.attention.self.query.weight"
    assert len(small.tensors[name]) == len(program.tensors[name]) // 4


@pytest.mark.parametrize(("first", "left"), [(0.25, 6), (0.5, 4), (0.75, 4)])
def test_parts_of_the_dense_model_count_what_other_factors_have_lost(
    first: float, left: int
) -> None:
    """Then the inner factor goes, which has lost nothing yet, until 12 of 16 are gone in all."""
    dense = _captured(Shuffled())
    outer = PruneAxis(first, groups=("a.weight[0].0",))
    rest = PruneNeurons(0.75, of="dense")
    result = Pipeline([outer, rest]).run(dense, Context(reference=dense))
    assert _channels(result.program)["a"] == left


def test_channels_are_found_once_whatever_their_order() -> None:
    groups = axis_groups(_captured(Grouped(4)))
    outer, inner, made = groups.with_role("neuron")
    assert [(c.id, c.size) for c in groups.channels(outer)] == [
        ("a.weight[0]", 16),
        ("b.weight[0]", 16),
    ]
    assert [c.factors for c in groups.channels(inner)] == [(outer.id, inner.id)]
    assert [c.factors for c in groups.channels(made)] == [(outer.id, made.id)]
    groups = axis_groups(_captured(Shuffled()))
    assert all(len(groups.channels(g)) == 1 for g in groups.with_role("neuron"))
    plain = axis_groups(_captured(Grouped(1)))
    assert not any(plain.channels(g) for g in plain)
