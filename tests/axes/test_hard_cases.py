"""Operators in the forms that are easy to get wrong: cut what is free, and verify it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphprune.axes import AxisGroups, axis_groups
from graphprune.capture.capture import capture
from graphprune.rewrite.mask import mask
from graphprune.rewrite.shrink import shrink
from graphprune.verify.equivalence import verify_rewrite

Step = Callable[[Any, Any], Any]


class Case(nn.Module):
    """a: 8 -> 12, then what a case does with [batch, sequence, 12], then b."""

    def __init__(self, step: Step, width: int) -> None:
        super().__init__()
        self.step = step
        self.a, self.b = nn.Linear(8, 12), nn.Linear(width, 3)
        self.c = nn.Linear(8, 12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1, groups=4)
        self.depthwise = nn.Conv1d(12, 24, 1, groups=12)
        self.transposed = nn.ConvTranspose1d(12, 10, 1)
        self.plain = nn.InstanceNorm1d(12)
        self.own = nn.BatchNorm1d(12, track_running_stats=False)
        self.groups = nn.GroupNorm(4, 12)
        self.rms = nn.RMSNorm(12)
        self.prelu = nn.PReLU(12)
        self.lstm = nn.LSTM(12, 5, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(12, 5, bias=False)
        self.cell = nn.LSTMCell(12, 5)
        self.row = nn.Parameter(torch.randn(1, 12))
        self.register_buffer("chosen", torch.arange(12) % 3 == 0)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.step(self, self.a(x)))
        return result


CASES: dict[str, tuple[Step, int]] = {
    "unfold heads": (lambda m, h: h.unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2), 12),
    "negative slice": (lambda m, h: torch.cat([h[..., -4:], h[..., 2:-4]], -1), 10),
    "stride": (lambda m, h: h[..., 1::3], 4),
    "unequal split": (lambda m, h: torch.cat(h.split([2, 7, 3], -1)[::-1], -1), 12),
    "chunks": (lambda m, h: sum(h.chunk(3, -1)), 4),
    "tile": (lambda m, h: h.repeat(1, 1, 2), 24),
    "interleave": (lambda m, h: h.repeat_interleave(2, -1), 24),
    "glu": (lambda m, h: F.glu(h, -1), 6),
    "squeeze all": (lambda m, h: h.unsqueeze(1).squeeze(), 12),
    "view as": (lambda m, h: h.view_as(m.c.weight.new_zeros(1).expand(h.shape)), 12),
    "mean over two": (
        lambda m, h: h * h.unflatten(-1, (3, 4)).mean((-1, -2), keepdim=True).flatten(-2),
        12,
    ),
    "norm": (lambda m, h: F.normalize(h.exp(), dim=-1), 12),
    "norm 1": (lambda m, h: h / (1 + h.norm(p=1, dim=-1, keepdim=True)), 12),
    "rms": (lambda m, h: m.rms(h), 12),
    "prelu": (lambda m, h: m.prelu(h.transpose(1, 2)).transpose(1, 2), 12),
    # Slopes along the last dimension, where the second one is as long.
    "prelu kernel": (
        lambda m, h: torch.ops.aten._prelu_kernel(h[:, :1].expand(-1, 12, -1), m.prelu.weight).sum(
            1, True
        ),
        12,
    ),
    "grouped convolution": (lambda m, h: m.conv(h.transpose(1, 2)).transpose(1, 2), 12),
    "multiplier": (lambda m, h: m.depthwise(h.transpose(1, 2)).transpose(1, 2), 24),
    "transposed convolution": (lambda m, h: m.transposed(h.transpose(1, 2)).transpose(1, 2), 10),
    "group norm": (lambda m, h: m.groups(h.transpose(1, 2)).transpose(1, 2), 12),
    "instance norm over features": (lambda m, h: m.plain(h.transpose(1, 2)).transpose(1, 2), 12),
    "batch norm of the batch": (lambda m, h: m.own(h.transpose(1, 2)).transpose(1, 2), 12),
    "shift by padding": (lambda m, h: F.pad(h, (1, -1)), 12),
    "boolean index": (lambda m, h: h[..., m.chosen], 4),
    "index add": (
        lambda m, h: torch.zeros_like(h).index_add(2, torch.arange(12).flip(0), h),
        12,
    ),
    "gather": (lambda m, h: h.gather(2, h.argsort(1).clamp_max(11)), 12),
    "einsum size one": (lambda m, h: torch.einsum("bsk,kn->bsn", h.sum(-1, True), m.row), 12),
    "einsum ellipsis": (lambda m, h: torch.einsum("...k,...k,kn->...n", h, h, m.c.weight), 8),
    "outer": (lambda m, h: torch.einsum("bsi,bsj->bsij", h, h).sum(-1), 12),
    "bmm": (lambda m, h: torch.bmm(h, torch.bmm(h.transpose(1, 2), h)), 12),
    "cumsum": (lambda m, h: h.cumsum(-1), 12),
    "max": (lambda m, h: h - h.max(-1, keepdim=True).values, 12),
    "where": (lambda m, h: torch.where(h > 0, h, m.row), 12),
    "causal": (
        lambda m, h: F.scaled_dot_product_attention(h, h, h, is_causal=True),
        12,
    ),
    "positions mixed": (lambda m, h: h.transpose(1, 2) @ h, 12),
    "stack": (lambda m, h: torch.stack([h, h * 2], 2).flatten(2), 24),
    "expand": (lambda m, h: h[:, :, None].expand(-1, -1, 2, -1).reshape(*h.shape[:2], 24), 24),
    "mask of positions": (
        lambda m, h: h.sigmoid().index_put((h.sum(-1) > 0,), h[h.sum(-1) > 0] * 2),
        12,
    ),
    "mask of the batch": (lambda m, h: h.index_put((h.sum((1, 2)) > 0,), m.c.bias), 12),
    "numbers of positions": (lambda m, h: h[:, [0, 2, 5, 1]], 12),
    "written positions": (
        lambda m, h: h.transpose(0, 1).index_put((torch.tensor([0, 3]),), m.row).transpose(0, 1),
        12,
    ),
    "written between others": (
        lambda m, h: torch.ops.aten.index_put(h.mT, [None, None, torch.tensor([1])], m.row.mT).mT,
        12,
    ),
    "constant numbers": (lambda m, h: h[..., [3, 4, 5, 6]] * h[..., torch.arange(8, 12)], 4),
    "lstm": (lambda m, h: m.lstm(h)[0], 10),
    "gru": (lambda m, h: m.gru(h)[0] + m.gru(h)[1], 5),
    "cell": (lambda m, h: m.cell(h[:, 0], m.cell(h[:, 1]))[1].unsqueeze(1), 5),
    "vector norm -1": (lambda m, h: h / torch.linalg.vector_norm(h, -1, -1, True), 12),
}


def cut_everything(model: nn.Module, x: Tensor, kept: int) -> AxisGroups:
    """Cut each free axis alone, and all at once, to `kept` units; verify each."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    program = capture(model, (x,))
    groups = axis_groups(program)
    free = [g for g in groups if not g.frozen and not g.normalized and g.cost]
    for chosen in [*[[g] for g in free], free]:
        keep = {g.id: torch.randperm(g.size)[: min(kept, g.size)] for g in chosen}
        shrunk = shrink(program, keep)
        verify_rewrite(mask(program, keep), shrunk)
        assert shrunk.num_parameters() == groups.num_parameters(keep)
    return groups


@pytest.mark.parametrize("name", CASES)
def test_what_is_free_can_be_cut(name: str) -> None:
    step, width = CASES[name]
    for kept in (1, 5):
        cut_everything(Case(step, width), torch.randn(2, 6, 8), kept)


@pytest.mark.parametrize(
    ("name", "free"),
    [
        ("squeeze all", True),
        ("tile", True),
        ("rms", True),
        ("shift by padding", False),
        ("boolean index", False),
        ("index add", False),
        ("cumsum", True),
        ("max", False),
        ("vector norm -1", False),
        ("gather", False),
        ("mask of positions", True),
        ("mask of the batch", True),
        ("numbers of positions", True),
        ("written positions", True),
        ("written between others", True),
        ("constant numbers", True),
        ("lstm", True),
        ("gru", True),
        ("cell", True),
    ],
)
def test_free_or_frozen(name: str, free: bool) -> None:
    step, width = CASES[name]
    groups = axis_groups(capture(Case(step, width), (torch.randn(2, 6, 8),)))
    assert (not any(g.frozen for g in groups.of("a.weight", 0))) is free


def test_statistics_of_the_input_normalize_the_features_they_run_over() -> None:
    class Over(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(8, 12), norm, nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(self.norm(self.a(x)))
            return result

    for norm in (nn.InstanceNorm1d(6), nn.GroupNorm(2, 6), nn.BatchNorm1d(6, affine=False)):
        groups = axis_groups(capture(Over(norm), (torch.randn(2, 6, 8),)))
        expected = not isinstance(norm, nn.BatchNorm1d)  # with running statistics it is per channel
        assert all(g.normalized is expected for g in groups.of("a.weight", 0))


def test_unread_parameters_are_frozen_and_say_so() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.spare = nn.Linear(8, 3), nn.Linear(12, 7)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.a(x)
            return result

    groups = axis_groups(capture(Unread(), (torch.randn(2, 8),)))
    assert "spare.weight is never read" in groups["spare.weight[0]"].frozen
