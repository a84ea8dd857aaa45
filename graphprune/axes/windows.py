"""Convolutions as matrix products: the geometry of windows, and the patches that they read.

A convolution with weight [out, in, *kernel] is a product of a matrix [out, in · taps] with patches:
row (sample, output position), column (channel, tap). A transposed one is a convolution too, of an
input with stride - 1 zeros between neighbors, its taps in reverse order:

    y[p] = Σ over t, k with t · stride - padding + k · dilation = p    of W[:, :, k]ᵀ x[t]
         = Σ over k of W[:, :, k]ᵀ z[p + padding - k · dilation]       z[t · stride] = x[t], else 0

So columns are in the weight's own order for both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

ROWS = 2048
"""Patches at a time, about: an unfolded batch never exists as a whole."""


@final
@dataclass(frozen=True, slots=True)
class Window:
    """The geometry of a convolution, a value for each side of the kernel.

    Attributes:
        kernel: taps.
        stride: steps between output positions; of a transposed one, between input positions.
        padding: zeros before and after; of a transposed one, what is cut off there.
        dilation: steps between taps.
        transposed: whether input positions are spread out.
        apart: whether each tap counts as an output of its own, so that a column is a channel.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    transposed: bool = False
    apart: bool = False

    @classmethod
    def of(cls, bound: Mapping[str, Any], kernel: Sequence[int], transposed: bool) -> Window:
        """Read the arguments of a convolution.

        Args:
            bound: the operator's arguments by schema name.
            kernel: sizes of the weight after its channels.
            transposed: whether it is a transposed one.
        """
        rank = len(kernel)
        stride, dilation = (_sides(bound.get(name, 1), rank) for name in ("stride", "dilation"))
        given = bound.get("padding", 0)
        if isinstance(given, str):
            # "same" pads more after than before where the sum is odd, as torch does.
            whole = [
                d * (k - 1) if given == "same" else 0 for k, d in zip(kernel, dilation, strict=True)
            ]
            padding = tuple((w // 2, w - w // 2) for w in whole)
        else:
            padding = tuple((p, p) for p in _sides(given, rank))
        if transposed:
            extra = _sides(bound.get("output_padding", 0), rank)
            padding = tuple((a, b - e) for (a, b), e in zip(padding, extra, strict=True))
        return cls(tuple(kernel), stride, padding, dilation, transposed)

    @property
    def taps(self) -> int:
        """Number of inputs of one channel in a patch."""
        return math.prod(self.kernel)

    def patches(self, x: Tensor) -> Iterator[Tensor]:
        """The patches of an input in pieces of about `ROWS` rows; together all, in order.

        How many rows a piece has depends on positions alone, so that two models with other
        channels are read side by side.

        Args:
            x: [n, channels, *positions], or without n.

        Yields:
            [rows, channels · taps], or [rows, channels] of every position where taps are apart.
        """
        rank = len(self.kernel)
        if x.dim() == rank + 1:
            x = x[None]
        view = x if self.apart else self.unfolded(x)
        # [n, *positions, channels, *taps]
        view = view.movedim(1, 1 + rank)
        columns = math.prod(view.shape[1 + rank :])
        per_sample = math.prod(view.shape[1 : 1 + rank])
        if not per_sample:
            return
        samples = max(1, ROWS // per_sample)
        for some in view.split(samples):
            # One sample of many positions is cut along the first side.
            lines = max(1, ROWS * view.shape[1] // per_sample)
            for piece in some.split(lines, 1) if len(some) == 1 else (some,):
                if self.transposed and not self.apart:
                    piece = piece.flip(list(range(piece.dim() - rank, piece.dim())))
                yield piece.reshape(-1, columns)

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight as [out, in · taps], or [out · taps, in] where taps are apart."""
        weight = weight.transpose(0, 1) if self.transposed else weight
        if self.apart:
            return weight.flatten(2).transpose(1, 2).flatten(0, 1)
        return weight.flatten(1)

    def weight(self, matrix: Tensor, channels: int) -> Tensor:
        """The weight of a matrix; the inverse of `matrix`.

        Args:
            matrix: as `matrix` gives it.
            channels: input channels.
        """
        if self.apart:
            matrix = matrix.unflatten(0, (-1, self.taps)).transpose(1, 2)
        weight = matrix.reshape(-1, channels, *self.kernel)
        return weight.transpose(0, 1) if self.transposed else weight

    def columns(self, channels: Tensor) -> Tensor:
        """A value for each channel as one for each column of the matrix."""
        return channels if self.apart else channels.repeat_interleave(self.taps)

    def unfolded(self, x: Tensor, but: int | None = None) -> Tensor:
        """A view [n, channels, *output positions, *taps]; taps of a transposed one in reverse.

        Args:
            x: [n, channels, *positions].
            but: a side that is only padded, and has no taps.
        """
        rank = len(self.kernel)
        padding, stride = self.padding, self.stride
        if self.transposed:
            x = _spread(x, self.stride)
            reach = [d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True)]
            padding = tuple((r - a, r - b) for r, (a, b) in zip(reach, padding, strict=True))
            stride = (1,) * rank
        if any(p != (0, 0) for p in padding):
            x = nn.functional.pad(x, [p for pair in reversed(padding) for p in pair])
        for i in range(rank):
            if i == but:
                continue
            reach_i = self.dilation[i] * (self.kernel[i] - 1) + 1
            x = x.unfold(2 + i, reach_i, stride[i])[..., :: self.dilation[i]]
        return x


def _spread(x: Tensor, stride: Sequence[int]) -> Tensor:
    """The input with stride - 1 zeros between neighboring positions."""
    if all(s == 1 for s in stride):
        return x
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    result = x.new_zeros(*x.shape[:2], *sizes)
    spread = result
    for dim, step in enumerate(stride, 2):
        spread = spread.movedim(dim, 0)[::step].movedim(0, dim)  # a view
    spread.copy_(x)
    return result


def _sides(value: Any, rank: int) -> tuple[int, ...]:
    """A value for each side: a single one stands for all."""
    given = (value,) if isinstance(value, int) else tuple(value)
    return given * rank if len(given) == 1 else given
