"""The steps over images [batch, channels, side, side], whose sides are numbers at capture."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.fuzz.activations import PAIRS, applied, is_zero
from benchmarks.fuzz.source import SEQUENCE, Builder, Choices, Source

IMAGE_STEPS: dict[str, tuple[Builder, float]] = {}


def step(weight: float = 1.0) -> Callable[[Builder], Builder]:
    """Register a step over images."""

    def register(function: Builder) -> Builder:
        IMAGE_STEPS[function.__name__] = function, weight
        return function

    return register


def convolution(b: Source, inner: int, outer: int, kernel: int = 1, more: str = "") -> str:
    """A convolution that keeps the sides."""
    padding = f", padding={kernel // 2}" if kernel > 1 else ""
    return b.layer(f"nn.Conv2d({inner}, {outer}, {kernel}{padding}{more})")


def hidden(b: Source, c: Choices, width: int) -> str:
    """Activated hidden channels of the stream."""
    layer = convolution(b, b.width, width, c.of(1, 3))
    return b.let(applied(c.act, b.let(f"{layer}(x)")))


def back(b: Source, c: Choices, value: str, width: int) -> None:
    """A convolution that reads hidden channels, into the stream."""
    layer = convolution(b, width, b.width, 1, ", bias=False" if c.odds(0.3) else "")
    form = c.of("x + {}({})", "{}({})", "x * torch.sigmoid({}({}))")
    b.stream(form.format(layer, value), zero=b.zero or form == "{}({})")


@step(2)
def dense(b: Source, c: Choices) -> None:
    """Another number of channels."""
    width = 2 * c.n * c.of(2, 1)
    b.stream(
        applied(c.act, b.let(f"{convolution(b, b.width, width, c.of(3, 1))}(x)")),
        width,
        is_zero(c.act),
    )


@step(2)
def bottleneck(b: Source, c: Choices) -> None:
    """1 × 1, then 3 × 3 grouped, by channel or dense, then 1 × 1."""
    width = c.n * c.of(4, 2)
    h = hidden(b, c, width)
    if c.odds(0.5):
        h = b.let(f"{b.layer(f'nn.BatchNorm2d({width})')}({h})")
    groups = c.of(width, c.n, 1)
    outer = width * c.of(1, 2)
    if groups == 1:
        outer = width
    text = f"nn.Conv2d({width}, {outer}, 3, padding=1, groups={groups})"
    h = b.let(applied(c.act, b.let(f"{b.layer(text)}({h})")))
    if c.odds(0.4):
        parts = c.of(2, c.n)
        h = b.let(
            f"{h}.view({h}.shape[0], {parts}, {outer // parts}, *{h}.shape[2:])"
            f".transpose(1, 2).reshape({h}.shape)"
        )
    back(b, c, h, outer)


@step()
def squeeze_excite(b: Source, c: Choices) -> None:
    """Channels scaled by what their means say."""
    width = 2 * c.n
    pooled = b.let(c.of(
        "x.mean((2, 3), keepdim=True)", "F.adaptive_avg_pool2d(x, 1)",
        "x.mean((-1, -2))[:, :, None, None]",
        f"F.adaptive_avg_pool2d(x, (1, 1)).flatten(1).view(-1, {b.width}, 1, 1)",
    ))  # fmt: skip
    up, down = convolution(b, b.width, width), convolution(b, width, b.width)
    b.stream(f"x * torch.sigmoid({down}({applied(c.act, b.let(f'{up}({pooled})'))}))")


@step(2)
def pooled(b: Source, c: Choices) -> None:
    """Positions mixed, channels passed on; sides kept or brought back."""
    h = hidden(b, c, 3 * c.n)
    s = b.side
    y = b.let(c.of(
        f"F.max_pool2d({h}, 3, 1, 1)", f"F.avg_pool2d({h}, 3, 1, 1)",
        f"F.adaptive_avg_pool2d({h}, {s})", f"F.interpolate({h}, scale_factor=2)[..., ::2, ::2]",
        f"F.interpolate({h}, size=({s}, {s}), mode='bilinear')",
        f"F.interpolate({h}, scale_factor=2, mode='bicubic')[..., ::2, 1::2]",
        f"F.pad({h}, (1, 1, 1, 1))[..., 1:-1, 1:-1]",
        f"F.pad({h}, (1, 1, 1, 1), mode='reflect')[..., :-2, :-2]",
        f"F.pad({h}, (0, 2, 0, 2), mode='replicate')[..., 2:, 2:]",
        f"{h}.softmax(1)", f"{h}.flip(-1)", f"{h}.roll((1, 1), (2, 3))",
        f"F.avg_pool1d({h}.flatten(2), 3, 1, 1).view({h}.shape)",
        f"F.max_pool1d({h}.flatten(2), 3, 1, 1).unflatten(2, ({s}, {s}))",
        f"F.pad({h}.flatten(2), (1, 1), mode='reflect')[..., 2:].view({h}.shape)",
        f"F.max_pool3d({h}.unsqueeze(2), (1, 3, 3), 1, (0, 1, 1)).squeeze(2)",
        f"F.avg_pool3d({h}.unsqueeze(2), (1, 3, 3), 1, (0, 1, 1)).squeeze(2)",
        f"F.adaptive_avg_pool3d({h}.unsqueeze(2), 1).squeeze(2) * {h}",
        f"F.interpolate({h}.flatten(2), scale_factor=2, mode='linear')[..., ::2].view({h}.shape)",
        f"F.interpolate({h}.flatten(2), scale_factor=2)[..., ::2].view({h}.shape)",
        f"F.pad({h}, (0, 0, 0, 0, 1, 1))[:, 1:-1]",
    ))  # fmt: skip
    back(b, c, y, 3 * c.n)


@step(1.5)
def normalized(b: Source, c: Choices) -> None:
    """Norms of channels."""
    width = 2 * c.n
    h = hidden(b, c, width)
    last = b.let(f"{h}.permute(0, 2, 3, 1)")
    b.summed(is_zero(c.act))
    text = c.of(
        f"{b.layer(f'nn.BatchNorm2d({width})')}({h})",
        f"{b.layer(f'nn.GroupNorm({c.n}, {width})')}({h})",
        f"{b.layer(f'nn.GroupNorm({width}, {width})')}({h})",
        f"{b.layer(f'nn.GroupNorm(1, {width})')}({h})",
        f"{b.layer(f'nn.InstanceNorm2d({width}, affine=True)')}({h})",
        f"{b.layer(f'nn.LayerNorm({width})')}({last}).permute(0, 3, 1, 2)",
        f"F.rms_norm({last}, ({width},), {b.parameter(width)}, 1e-3).permute(0, 3, 1, 2)",
        f"F.normalize({h}, dim=1)", f"{b.layer(f'nn.PReLU({width})')}({h})",
        f"{b.layer('nn.PReLU()')}({h})",
        f"{h} * torch.rsqrt({h}.square().mean(1, keepdim=True) + 1e-3)",
        f"{h} / ({h}.norm(dim=(2, 3), keepdim=True) + 1)",
        f"F.instance_norm({h}, use_input_stats=True)",
        f"{b.layer(f'nn.BatchNorm2d({width}, affine=False)')}({h})",
    )  # fmt: skip
    back(b, c, b.let(text), width)


@step(1.5)
def rearranged(b: Source, c: Choices) -> None:
    """Pixel shuffles and their like, by reshapes; splits and joins of channels."""
    n, s = c.n, b.side
    way = c.of("shuffle", "unshuffle", "split", "join", "ghost", "glu", "windows", "reduce")
    if way == "shuffle" and s % 2 == 0:
        h = hidden(b, c, 4 * n)
        y = b.let(
            f"{h}.view(-1, {n}, 2, 2, {s}, {s}).permute(0, 1, 4, 2, 5, 3)"
            f".reshape(-1, {n}, {2 * s}, {2 * s})"
        )
        layer = b.layer(f"nn.Conv2d({n}, {b.width}, 2, stride=2)")
        b.stream(f"x + {layer}({y})")
    elif way == "unshuffle" and s % 2 == 0:
        h = hidden(b, c, n)
        y = b.let(
            f"{h}.view(-1, {n}, {s // 2}, 2, {s // 2}, 2).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)"
        )
        layer = b.layer(f"nn.ConvTranspose2d({4 * n}, {b.width}, 2, stride=2)")
        b.stream(f"x + {layer}({y})")
    elif way == "join":
        h = hidden(b, c, 2 * n)
        b.stream(f"torch.cat([x, {h}], 1)", b.width + 2 * n, b.zero and is_zero(c.act))
    elif way == "ghost":
        h = hidden(b, c, n)
        cheap = b.layer(f"nn.Conv2d({n}, {n}, 3, padding=1, groups={n})")
        back(b, c, b.let(f"torch.cat([{h}, {cheap}({h})], dim=1)"), 2 * n)
    elif way == "glu":
        back(b, c, b.let(f"F.glu({hidden(b, c, 4 * n)}, 1)"), 2 * n)
    elif way == "windows" and s % 2 == 0:
        h = hidden(b, c, 2 * n)
        w = b.let(
            f"{h}.view(-1, {2 * n}, {s // 2}, 2, {s // 2}, 2).permute(0, 2, 4, 3, 5, 1)"
            f".reshape(-1, 4, {2 * n})"
        )
        z = b.let(f"F.scaled_dot_product_attention({w}, {w}, {w})")
        y = b.let(
            f"{z}.view(-1, {s // 2}, {s // 2}, 2, 2, {2 * n}).permute(0, 5, 1, 3, 2, 4)"
            f".reshape(-1, {2 * n}, {s}, {s})"
        )
        b.summed(is_zero(c.act))
        back(b, c, y, 2 * n)
    elif way == "reduce":
        h = hidden(b, c, 2 * n)
        b.summed(is_zero(c.act))
        b.stream(f"x * {c.of(f'{h}.mean(1, keepdim=True)', f'{h}.sum(1, True)')}.tanh()")
    else:
        h = hidden(b, c, 4 * n)
        a, d = b.let(f"{h}.chunk(2, 1)[0]"), b.let(f"{h}[:, {2 * n}:]")
        layer = b.layer(f"nn.Conv2d({2 * n}, {2 * n}, 3, padding=1)")
        back(b, c, b.let(f"torch.cat([{d}, {layer}({a})], 1)"), 4 * n)


@step()
def transposed(b: Source, c: Choices) -> None:
    """A stride down and a transposed convolution up again."""
    width = 2 * c.n
    if b.side % 2:
        back(b, c, hidden(b, c, width), width)
        return
    down = b.layer(f"nn.Conv2d({b.width}, {width}, 2, stride=2)")
    groups = c.of(1, c.n)
    up = b.layer(f"nn.ConvTranspose2d({width}, {width}, 2, stride=2, groups={groups})")
    h = b.let(f"{up}({applied(c.act, b.let(f'{down}(x)'))})")
    back(b, c, h, width)


@step(0.7)
def volume(b: Source, c: Choices) -> None:
    """Three-dimensional convolutions."""
    width = 2 * c.n
    first = b.layer(f"nn.Conv3d({b.width}, {width}, (1, 3, 3), padding=(0, 1, 1))")
    h = b.let(applied(c.act, b.let(f"{first}(x.unsqueeze(2))")))
    second = c.of(
        b.layer(f"nn.Conv3d({width}, {width}, 1, groups={c.n})"),
        b.layer(f"nn.ConvTranspose3d({width}, {width}, 1)"),
        b.layer(f"nn.BatchNorm3d({width})"),
    )
    back(b, c, b.let(f"{second}({h}).squeeze(2)"), width)


@step()
def pairs(b: Source, c: Choices) -> None:
    """Two images of one number of channels met element by element."""
    width = 2 * c.n
    h = hidden(b, c, width)
    other = b.let(c.of(
        f"{convolution(b, b.width, width)}(x)", b.parameter(width, 1, 1),
        b.parameter(1, width, 1, 1), b.buffer(f"torch.rand({width}, 1, 1)"),
    ))  # fmt: skip
    text = c.of(*PAIRS)
    for i in range(text.count("{}")):
        text = text.replace("{}", (h, other)[i % 2], 1)
    back(b, c, b.let(f"{text} + 0 * {h}"), width)


@step(0.8)
def tokens(b: Source, c: Choices) -> None:
    """Positions become a sequence; the steps after this one work on that."""
    width = 2 * c.n
    patch = b.layer(f"nn.Conv2d({b.width}, {width}, {c.of(1, 2)})")
    b.stream(c.of(
        f"{patch}(x).flatten(2).transpose(1, 2)", f"{patch}(x).permute(0, 2, 3, 1).flatten(1, 2)",
        f"torch.einsum('bchw->bhwc', {patch}(x)).flatten(1, 2)",
    ), width, True)  # fmt: skip
    b.domain, b.saved = SEQUENCE, []
