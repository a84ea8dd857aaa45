"""128 operators between two weights, and what each leaves of the axis between them.

A probe takes what a weight makes, 24 features wide, and gives what the next weight reads:

    tokens    [2, 6, 24] from a linear layer
    image     [2, 24, 8, 8] from a convolution, read by a convolution or, with fewer dimensions,
              by a linear layer

`expected` is "" where units of the axis can go, on both sides of the operator, exactly; or a part
of the reason why not: of a freeze, or "normalized" for a statistic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

untyped: Any = torch  # some functions of torch have no types
aten: Any = torch.ops.aten
WIDTH = 24


@dataclass(frozen=True)
class Probe:
    """One operator between two weights.

    Attributes:
        name: of the operator, and of what it runs over where that matters.
        function: from the modules of a probe and h to what the next weight reads.
        expected: "" where the axis is free; a part of the reason where it is not.
        image: whether h is of a convolution.
    """

    name: str
    function: Callable[[Modules, Tensor], Tensor]
    expected: str = ""
    image: bool = False


class Modules(nn.Module):
    """The weights that some probes use beside the two."""

    def __init__(self, build: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.own: Any = build() if build else None


PROBES: list[Probe] = []
BUILDS: dict[str, Callable[[], nn.Module]] = {}


def tokens(name: str, function: Any, expected: str = "", build: Any = None) -> None:
    """Add a probe of tokens [2, 6, 24]."""
    PROBES.append(Probe(name, function, expected))
    if build:
        BUILDS[name] = build


def image(name: str, function: Any, expected: str = "", build: Any = None) -> None:
    """Add a probe of images [2, 24, 8, 8]."""
    PROBES.append(Probe(name, function, expected, image=True))
    if build:
        BUILDS[name] = build


class Tensors(nn.Module):
    """Random tensors as parameters: t0, t1, ..."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        for i, shape in enumerate(shapes):
            setattr(self, f"t{i}", nn.Parameter(torch.randn(shape)))


def weights(*shapes: tuple[int, ...]) -> Callable[[], nn.Module]:
    """What builds random tensors of these shapes."""
    return lambda: Tensors(*shapes)


PLACES = torch.tensor([4, 0, 3, 1, 5, 2])  # of the six positions

# Element by element.
tokens("relu", lambda m, h: h.relu())
tokens("gelu", lambda m, h: F.gelu(h))
tokens("silu", lambda m, h: F.silu(h))
tokens("elu + 1", lambda m, h: F.elu(h) + 1)
image("prelu of channels", lambda m, h: m.own(h), build=lambda: nn.PReLU(WIDTH))
tokens("clamp", lambda m, h: h.clamp(-0.5, 0.5))
tokens("pow", lambda m, h: h.abs().pow(1.5))
tokens("bucketize", lambda m, h: h * torch.bucketize(h.detach(), torch.tensor([-1.0, 0, 1])))
tokens("comparison", lambda m, h: h * (h > h.roll(1, 1)))
tokens("where", lambda m, h: torch.where(h > 0, h, m.own.t0), build=weights((WIDTH,)))
tokens("masked_fill", lambda m, h: h.masked_fill(h > 1, -1.0))
tokens("glu", lambda m, h: F.glu(h, -1))
tokens("halves, gated", lambda m, h: F.silu(h[..., :12]) * h[..., 12:])

# Norms and sums over features.
tokens("layer_norm", lambda m, h: m.own(h), "normalized", lambda: nn.LayerNorm(WIDTH))
tokens("rms_norm", lambda m, h: m.own(h), build=lambda: nn.RMSNorm(WIDTH))
image("batch_norm", lambda m, h: m.own(h), build=lambda: nn.BatchNorm2d(WIDTH))
image("group_norm", lambda m, h: m.own(h), build=lambda: nn.GroupNorm(6, WIDTH))
image(
    "group_norm over a skip",
    lambda m, h: m.own(torch.cat([h, h.new_ones(2, 8, 8, 8)], 1)),
    build=lambda: nn.GroupNorm(8, WIDTH + 8),
)
image(
    "group_norm across a skip",  # groups of five: the fifth has channels of both
    lambda m, h: m.own[1](torch.cat([h, m.own[0](h)], 1)),
    build=lambda: nn.ModuleList([nn.Conv2d(WIDTH, 16, 1), nn.GroupNorm(8, WIDTH + 16)]),
)
image("instance_norm", lambda m, h: m.own(h), build=lambda: nn.InstanceNorm2d(WIDTH, affine=True))
image("local_response_norm", lambda m, h: F.local_response_norm(h, 3), "a position at")
tokens("normalize", lambda m, h: F.normalize(h, dim=-1))
tokens("linalg_norm", lambda m, h: h / torch.linalg.norm(h, dim=-1, keepdim=True))
tokens("largest magnitude", lambda m, h: h / torch.linalg.vector_norm(h, float("inf"), -1, True))
tokens("matrix_norm", lambda m, h: h / torch.linalg.matrix_norm(h, keepdim=True))
tokens("cosine_similarity", lambda m, h: h * F.cosine_similarity(h, h.tanh(), -1).unsqueeze(-1))
tokens("gate by a mean", lambda m, h: h * h.mean(-1, keepdim=True).sigmoid())
tokens("any", lambda m, h: h * (h > 2).any(-1, keepdim=True))
tokens("amax of features", lambda m, h: h / h.exp().amax(-1, keepdim=True), "fixed by")
tokens("logsumexp of features", lambda m, h: h - h.logsumexp(-1, keepdim=True), "fixed by")
tokens("softmax of features", lambda m, h: h.softmax(-1), "fixed by")
tokens("cumsum of features", lambda m, h: h.cumsum(-1))
tokens("cumprod of features", lambda m, h: h.cumprod(-1), "fixed by")
tokens("sort of features", lambda m, h: h.sort(-1).values, "fixed by")
tokens("topk of features", lambda m, h: h.topk(4, -1).values, "fixed by")
tokens("var of features", lambda m, h: h / h.var(-1, keepdim=True), "normalized")

# Reductions over positions.
tokens("mean of positions", lambda m, h: h.mean(1))
tokens("amax of positions", lambda m, h: h.amax(1))
tokens("argmax of positions", lambda m, h: h[:, 0] * h.argmax(1))
tokens("prod of positions", lambda m, h: h.prod(1))
tokens("median of positions", lambda m, h: h.median(1).values)
tokens("quantile of positions", lambda m, h: torch.quantile(h, 0.3, 1))
tokens("topk of positions", lambda m, h: h.topk(3, 1).values)
tokens("sort of positions", lambda m, h: h.sort(1).values)
tokens("cumsum of positions", lambda m, h: h.cumsum(1))
tokens("cummax of positions", lambda m, h: h.cummax(1).values)
tokens("logcumsumexp of positions", lambda m, h: h.logcumsumexp(1))
tokens("softmax of positions", lambda m, h: h.softmax(1))
tokens("diff of positions", lambda m, h: h.diff(dim=1))

# Pools.
image("max_pool2d", lambda m, h: F.max_pool2d(h, 2))
image("avg_pool2d", lambda m, h: F.avg_pool2d(h, 2))
image("lp_pool2d", lambda m, h: F.lp_pool2d(h.abs(), 2.0, 2))
image("adaptive_avg_pool2d", lambda m, h: F.adaptive_avg_pool2d(h, 1).flatten(1))
image("adaptive_max_pool2d", lambda m, h: F.adaptive_max_pool2d(h, 2))
image("max_pool2d with places", lambda m, h: F.max_pool2d(h, 2, return_indices=True)[0])
image("max_unpool2d", lambda m, h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), (2, 2)))
tokens("avg_pool1d", lambda m, h: F.avg_pool1d(h.mT, 2).mT)

# Resizing.
image("interpolate, nearest", lambda m, h: F.interpolate(h, scale_factor=2.0))
image("interpolate, bilinear", lambda m, h: F.interpolate(h, (5, 7), mode="bilinear"))
image("interpolate, bicubic", lambda m, h: F.interpolate(h, (5, 7), mode="bicubic"))
image("interpolate, nearest-exact", lambda m, h: F.interpolate(h, (5, 7), mode="nearest-exact"))
image(
    "interpolate, antialiased",
    lambda m, h: F.interpolate(h, (5, 7), mode="bilinear", antialias=True),
)
image("interpolate, area", lambda m, h: F.interpolate(h, (4, 4), mode="area"))
tokens("interpolate, linear", lambda m, h: F.interpolate(h.mT, 9, mode="linear").mT)
image("pixel_shuffle", lambda m, h: F.pixel_shuffle(h, 2))
image("pixel_unshuffle", lambda m, h: F.pixel_unshuffle(h, 2))
image(
    "grid_sample",
    lambda m, h: F.grid_sample(h, m.own.t0.tanh(), align_corners=False),
    build=weights((2, 5, 7, 2)),
)
image(
    "affine_grid",
    lambda m, h: F.grid_sample(
        h, F.affine_grid(m.own.t0, [2, 1, 6, 6], align_corners=False), align_corners=False
    ),
    build=weights((2, 2, 3)),
)

# Padding.
image("pad, constant", lambda m, h: F.pad(h, (1, 2, 1, 0), value=0.5))
image("pad, reflect", lambda m, h: F.pad(h, (1, 2, 1, 0), mode="reflect"))
image("pad, replicate", lambda m, h: F.pad(h, (1, 2, 1, 0), mode="replicate"))
image("pad, circular", lambda m, h: F.pad(h, (1, 2, 1, 0), mode="circular"))
tokens("pad of features", lambda m, h: F.pad(h, (2, 2), value=0.5))

# Shapes.
tokens("heads and back", lambda m, h: h.unflatten(-1, (4, 6)).transpose(1, 2).flatten(2))
image("flatten", lambda m, h: h.flatten(1))
image("channel_shuffle", lambda m, h: F.channel_shuffle(h, 3))
image("im2col", lambda m, h: F.unfold(h, 3).mT)
image("col2im", lambda m, h: F.fold(F.unfold(h, 2, stride=2) * 2, (8, 8), 2, stride=2))
tokens("unfold of positions", lambda m, h: h.unfold(1, 3, 2).sum(-1))
tokens("stack of features", lambda m, h: torch.stack([h, h.tanh()], -1).flatten(2))
tokens("stack of layers", lambda m, h: torch.stack([h, h.tanh()]).mean(0))
tokens("unbind of positions", lambda m, h: torch.cat(h.unbind(1)[::2], -1))
tokens("select of positions", lambda m, h: h[:, 0])
tokens("select of features", lambda m, h: h * h[..., 5].unsqueeze(-1))
tokens("unbind of features", lambda m, h: sum(h.unbind(-1)).unsqueeze(-1), "distinguished by")
tokens("slice of features", lambda m, h: h[..., 3:20])
tokens("slice in steps", lambda m, h: h[..., 1::5])
tokens(
    "slice of rotated pairs", lambda m, h: torch.stack([-h[..., 1::2], h[..., ::2]], -1).flatten(2)
)
tokens("unequal split", lambda m, h: torch.cat(h.split([5, 12, 7], -1)[::-1], -1))
tokens("roll of features", lambda m, h: h.roll(5, -1))
tokens("roll of positions", lambda m, h: h.roll(2, 1))
tokens("flip of features", lambda m, h: h.flip(-1), "fixed by")
tokens("flip of positions", lambda m, h: h.flip(1))
tokens("repeat", lambda m, h: h.repeat(1, 1, 2))
tokens("repeat_interleave", lambda m, h: h.repeat_interleave(2, -1))
image("diagonal of positions", lambda m, h: h.diagonal(dim1=2, dim2=3).mT)
tokens("tril of positions", lambda m, h: h.unflatten(-1, (4, 6)).mT.tril(), "fixed by")

# Products.
tokens("attention", lambda m, h: F.scaled_dot_product_attention(h, h.tanh(), h))
tokens("products of positions", lambda m, h: (h @ h.mT).softmax(-1) @ h)
tokens(
    "einsum of heads", lambda m, h: torch.einsum("bihd,bjhd->bijh", *[h.unflatten(-1, (4, 6))] * 2)
)
tokens("outer product", lambda m, h: torch.einsum("bsi,bsj->bsij", h, h.tanh()).flatten(2))
tokens("bilinear", lambda m, h: m.own(h, h.tanh()), build=lambda: nn.Bilinear(WIDTH, WIDTH, 6))
tokens("cdist", lambda m, h: torch.cdist(h, m.own.t0), build=weights((5, WIDTH)))
tokens("pairwise_distance", lambda m, h: h * F.pairwise_distance(h, h.tanh(), keepdim=True))
image(
    "grouped convolution",
    lambda m, h: m.own(h),
    build=lambda: nn.Conv2d(WIDTH, 12, 3, groups=4),
)
image("depthwise convolution", lambda m, h: m.own(h), build=lambda: nn.Conv2d(24, 48, 3, groups=24))
image("transposed convolution", lambda m, h: m.own(h), build=lambda: nn.ConvTranspose2d(24, 6, 2))
image(
    "transposed convolution, grouped",
    lambda m, h: m.own(h),
    build=lambda: nn.ConvTranspose2d(WIDTH, 12, 2, groups=4),
)
tokens(
    "inverse of a product",
    lambda m, h: torch.linalg.inv(h.mT @ h + 30 * torch.eye(24)).diagonal(dim1=1, dim2=2),
    "a side of a matrix",
)

# Lookups.
tokens("take_along_dim", lambda m, h: torch.take_along_dim(h, h.argsort(1), 1))
tokens("gather", lambda m, h: h.gather(1, PLACES[None, :, None].expand(2, -1, WIDTH)))
tokens("index of positions", lambda m, h: h[:, PLACES])
tokens("index_put of positions", lambda m, h: h.index_put((torch.tensor([1]), PLACES), h[0]))
tokens("index_add", lambda m, h: h.index_add(1, PLACES, h.tanh()))
tokens("scatter", lambda m, h: h.scatter(1, PLACES[None, :, None].expand(2, -1, WIDTH), h.tanh()))
tokens(
    "scatter_add",
    lambda m, h: h.new_zeros(2, 3, WIDTH).scatter_add(
        1, PLACES[None, :, None].expand(2, -1, WIDTH) % 3, h
    ),
)
tokens(
    "scatter_reduce",
    lambda m, h: h.scatter_reduce(1, PLACES[None, :, None].expand(2, -1, 24) % 3, h, "amax"),
)
tokens("slice_scatter", lambda m, h: h.slice_scatter(h[:, :2].tanh(), 1, 2, 4))
tokens("select_scatter", lambda m, h: h.select_scatter(h[:, 0].tanh(), 1, 2))
tokens("masked_scatter", lambda m, h: h.masked_scatter(h > 0, h.tanh()), "addressed by")
tokens("embedding_bag", lambda m, h: h * m.own(PLACES.expand(12, -1)).view(2, 6, 24),
       build=lambda: nn.EmbeddingBag(6, WIDTH, mode="max"))  # fmt: skip

# Frequencies and complex numbers.
tokens("rfft of positions", lambda m, h: torch.fft.rfft(h, dim=1).abs())
image("fft2 and back", lambda m, h: torch.fft.ifft2(torch.fft.fft2(h) * 1j).real)
tokens("rfft of features", lambda m, h: torch.fft.rfft(h, dim=-1).abs(), "fixed by")
tokens(
    "rotation by complex numbers",
    lambda m, h: torch.view_as_real(
        torch.view_as_complex(h.unflatten(-1, (12, 2))) * torch.polar(m.own.t0 * 0 + 1, m.own.t0)
    ).flatten(2),
    build=weights((6, 12)),
)

# Recurrent layers, over what they read.
tokens("lstm", lambda m, h: m.own(h)[0], build=lambda: nn.LSTM(WIDTH, 10, batch_first=True))
tokens("gru", lambda m, h: m.own(h)[0], build=lambda: nn.GRU(WIDTH, 10, 2, bidirectional=True))
tokens("lstm_cell", lambda m, h: m.own(h[:, 0])[0], build=lambda: nn.LSTMCell(WIDTH, 10))
