"""Second moments of a convolution's patches from products of shifted inputs.

Patches overlap, so their Gram matrix repeats itself. Along one side of K taps, d apart, with O
output positions a stride of 1 apart, and z_u [f] the padded input at position u (a feature f is a
channel, and a tap of the other sides; sums over samples and over the other sides are left out):

    H_ij = Σ over u < O of z_(u + i d) z_(u + j d)ᵀ                                     [f, f]
    H_(i+1)(j+1) = H_ij + C_ij
    C_ij = Σ over u < d of  z_(O + i d + u) z_(O + j d + u)ᵀ - z_(i d + u) z_(j d + u)ᵀ

Only H_0j needs all positions: K products of f x f instead of K², and C two of K f x K f with d rows
a sample instead of O.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from graphprune.axes.windows import Window
from graphprune.calibration.gram import Gram

_WORTH = 0.5  # of the work that the patches themselves would be
_VALUES = 2**24  # of what is unfolded along the other sides at a time


@final
class LaggedGram:
    """The Gram matrix of a convolution's patches while batches come.

    Args:
        window: the geometry.
        channels: that a patch has.
        side: along which the patches are shifted; its stride is 1.
    """

    def __init__(self, window: Window, channels: int, side: int) -> None:
        self.window, self.side = window, side
        self.taps = window.kernel[side]
        self.features = channels * window.taps // self.taps
        self.first = torch.zeros(self.taps, self.features, self.features, dtype=torch.float64)
        whole = (self.taps - 1) * self.features
        self.change = torch.zeros(whole, whole, dtype=torch.float64)
        self.total = torch.zeros(channels, *window.kernel, dtype=torch.float64)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Add the patches of an input [n, channels, *positions]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide[None] if wide.dim() == len(self.window.kernel) + 1 else wide
        each = math.prod(wide.shape[1:]) * self.window.taps // self.taps
        for some in wide.split(max(1, _VALUES // max(each, 1))):
            self._add(some)

    def _add(self, x: Tensor) -> None:
        window, side = self.window, self.side
        rank = len(window.kernel)
        view = window.unfolded(x)  # [n, channels, *positions, *taps]
        self.count += len(x) * math.prod(view.shape[2 : 2 + rank])
        self.total += view.sum([0, *range(2, 2 + rank)], dtype=torch.float64)
        outputs, step = view.shape[2 + side], window.dilation[side]
        z = window.unfolded(x, but=side).movedim(2 + side, 0)
        # [positions, n · other positions, channels · other taps]
        z = z.movedim(2, 1 + rank).flatten(1, rank).flatten(2)
        reach = step * (self.taps - 1)
        here = z[:outputs].flatten(0, 1)
        for j in range(self.taps):
            self.first[j] += here.T @ z[j * step : j * step + outputs].flatten(0, 1)
        for start, sign in ((outputs, 1.0), (0, -1.0)):
            rows = z[start : start + reach].unflatten(0, (self.taps - 1, step)).movedim(0, 2)
            rows = rows.flatten(0, 1).flatten(1)  # [step · n · other positions, (taps - 1) · f]
            self.change.add_(rows.T @ rows, alpha=sign)

    def gram(self) -> Gram:
        """The Gram matrix of the patches, as `Window.patches` orders their columns."""
        k, f = self.taps, self.features
        whole = torch.empty(k, f, k, f, dtype=torch.float64)
        whole[0] = self.first.movedim(0, 1)
        whole[:, :, 0] = self.first.transpose(1, 2)
        change = self.change.view(k - 1, f, k - 1, f)
        for i in range(k - 1):
            whole[i + 1, :, 1:] = whole[i, :, :-1] + change[i]
        # Features are (channel, other taps); the side's taps belong among those.
        kernel = self.window.kernel
        others = [n for i, n in enumerate(kernel) if i != self.side]
        shape = [k, len(self.total), *others]
        order = [1, *(2 + i - (i > self.side) if i != self.side else 0 for i in range(len(kernel)))]
        both = whole.view(*shape, *shape).permute(*order, *(len(shape) + i for i in order))
        size = self.total.numel()
        return Gram(both.reshape(size, size), self.total.flatten(), self.count)


def best_side(window: Window, outputs: tuple[int, ...]) -> int | None:
    """The side along which patches repeat themselves most; None where it would not be worth it.

    Args:
        window: the geometry.
        outputs: output positions along each side.
    """
    if window.transposed or window.apart:
        return None
    costs = {
        side: 1 / taps + 2 * window.dilation[side] / max(outputs[side], 1)
        for side, taps in enumerate(window.kernel)
        if taps > 1 and window.stride[side] == 1
    }
    side = min(costs, key=costs.__getitem__, default=None)
    return side if side is not None and costs[side] < _WORTH else None
