"""Group norm over concatenated skips, as U-shaped networks have it: what two inputs share stays."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphprune.axes import axis_groups, frozen_parameters
from graphprune.capture.capture import capture
from graphprune.rewrite.mask import mask
from graphprune.rewrite.shrink import shrink
from graphprune.verify.equivalence import verify_rewrite

GROUPS, WIDTHS = 4, (20, 40, 80)


class Residual(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.GroupNorm(GROUPS, inner), nn.GroupNorm(GROUPS, outer)
        self.a = nn.Conv2d(inner, outer, 3, padding=1)
        self.b = nn.Conv2d(outer, outer, 3, padding=1)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(F.silu(self.norm2(self.a(F.silu(self.norm(x))))))
        result: Tensor = self.skip(x) + h
        return result


class Shaped(nn.Module):
    """Down over three widths and up again, with a skip from every step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 3, 3, padding=1)
        channels = [20]
        before = 20
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for width in WIDTHS:
            self.down.append(Residual(before, width))
            channels.append(width)
            before = width
        for width in reversed(WIDTHS):
            for _ in range(1 + (width == WIDTHS[0])):
                self.up.append(Residual(before + channels.pop(), width))
                before = width
        self.norm = nn.GroupNorm(GROUPS, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        skips = [x]
        for layer in self.down:
            x = layer(x)
            skips.append(x)
        for layer in self.up:
            x = layer(torch.cat([x, skips.pop()], 1))
        result: Tensor = self.last(F.silu(self.norm(x)))
        return result


def test_most_of_a_u_shaped_network_is_free() -> None:
    model = Shaped().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    program = capture(model, (torch.randn(2, 3, 8, 8),))
    groups = axis_groups(program)
    assert sum(frozen.share for frozen in frozen_parameters(groups)) < 0.2
    free = [g for g in groups if not g.frozen and not g.normalized]
    kept = {g.id: list(range(0, g.size, 2)) for g in free}
    small = shrink(program, kept)
    assert small.num_parameters() < 0.5 * program.num_parameters()
    verify_rewrite(mask(program, kept), small, also=[mask(program, kept, everywhere=True)])
