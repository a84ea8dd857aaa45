"""The steps over sequences [batch, length, width]; each keeps or changes the stream's width.

A step makes the widths it needs, so that it fits after any other and can be taken out.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.fuzz.activations import PAIRS, applied, is_zero
from benchmarks.fuzz.source import Builder, Choices, Source

# name -> (function, how often it is drawn)
SEQUENCE_STEPS: dict[str, tuple[Builder, float]] = {}


def step(weight: float = 1.0) -> Callable[[Builder], Builder]:
    """Register a step over sequences."""

    def register(function: Builder) -> Builder:
        SEQUENCE_STEPS[function.__name__] = function, weight
        return function

    return register


def hidden(b: Source, c: Choices, width: int) -> tuple[str, bool]:
    """An activated hidden layer of the stream; the variable, and whether f(0) = 0."""
    layer = b.linear(b.width, width, share=c.odds(0.2))
    return b.let(applied(c.act, b.let(f"{layer}(x)"))), is_zero(c.act)


def back(b: Source, c: Choices, value: str, width: int) -> None:
    """A weight that reads a hidden value, into the stream."""
    layer = b.linear(width, b.width, bias=c.odds(0.5), share=c.odds(0.2))
    form = c.of("x + {}({})", "{}({})", "x * torch.sigmoid({}({}))", "x - 0.5 * {}({})")
    b.stream(form.format(layer, value), zero=b.zero or form == "{}({})")


@step(2)
def linear(b: Source, c: Choices) -> None:
    """Another width."""
    width = c.n * c.of(3, 2, 4)
    layer = b.linear(b.width, width, bias=not c.odds(0.3))
    b.stream(applied(c.act, b.let(f"{layer}(x)")), width, is_zero(c.act))


@step(2)
def feedforward(b: Source, c: Choices) -> None:
    """Hidden units between two weights, in each way that a weight can be read."""
    width = c.n * c.of(3, 2, 4)
    h, _ = hidden(b, c, width)
    if c.odds(0.3):
        b.stream(f"x + {h} @ {b.parameter(width, b.width)}")
    elif c.odds(0.3):
        weight, bias = b.parameter(width, b.width), b.parameter(b.width)
        flat = b.let(f"{h}.reshape(-1, {width})")
        b.stream(f"x + torch.addmm({bias}, {flat}, {weight}).view(x.shape)")
    elif c.odds(0.3):
        flat = b.let(f"{h}.flatten(0, 1)")
        b.stream(f"x + torch.mm({flat}, {b.parameter(width, b.width)}).view_as(x)")
    elif c.odds(0.2):
        b.stream(
            f"x * torch.mv({h}.reshape(-1, {width}), {b.parameter(width)}).view(x.shape[0], -1, 1)"
        )
    elif c.odds(0.2):
        b.stream(f"x * ({h} @ {b.parameter(width)}).unsqueeze(-1)")
    else:
        back(b, c, h, width)


@step()
def gated(b: Source, c: Choices) -> None:
    """Two halves of one layer, or two layers, multiplied."""
    half = c.n * c.of(2, 3)
    double = b.let(f"{b.linear(b.width, 2 * half)}(x)")
    way = c.of("chunk", "split", "slice", "glu", "unbind", "narrow", "sizes", "tensor_split")
    if way == "glu":
        h = b.let(f"F.glu({double}, {c.of(-1, 2)})")
    else:
        first, second = {
            "chunk": (f"{double}.chunk(2, -1)[0]", f"{double}.chunk(2, -1)[1]"),
            "split": (f"{double}.split({half}, -1)[0]", f"{double}.split({half}, -1)[1]"),
            "sizes": (f"{double}.split([{half}, {half}], 2)[0]",
                      f"{double}.split([{half}, {half}], 2)[1]"),
            "slice": (f"{double}[..., :{half}]", f"{double}[..., {half}:]"),
            "narrow": (f"{double}.narrow(2, 0, {half})", f"{double}.narrow(-1, {half}, {half})"),
            "unbind": (f"{double}.view(*x.shape[:2], 2, {half}).unbind(2)[0]",
                       f"{double}.view(*x.shape[:2], 2, {half}).unbind(2)[1]"),
            "tensor_split": (f"{double}.tensor_split(2, -1)[0]",
                             f"torch.unsafe_chunk({double}, 2, -1)[1]"),
        }[way]  # fmt: skip
        h = b.let(f"{applied(c.act, b.let(first))} * {second}")
    back(b, c, h, half)


@step(2)
def pairs(b: Source, c: Choices) -> None:
    """Two values of one width met element by element: two layers, or one and a parameter."""
    width = c.n * 3
    h, _ = hidden(b, c, width)
    other = c.of(
        b.parameter(width), f"{b.linear(b.width, width)}(x)", b.parameter(1, width),
        b.parameter(1), b.buffer(f"torch.rand({width})"), b.parameter(1, 1, width),
        f"{h}.roll(1, 1)",
    )  # fmt: skip
    other = b.let(other)
    text = c.of(*PAIRS)
    for i in range(text.count("{}")):
        text = text.replace("{}", (h, other)[i % 2], 1)
    pair = b.let(f"{text} + 0 * {h}")
    if c.odds(0.3):  # a sum without a weight: only what is zero may go there
        b.summed(False)
        b.stream(f"x * {pair}.sum(-1, keepdim=True).tanh()", zero=None)
    else:
        back(b, c, pair, width)


@step(0.7)
def low_rank(b: Source, c: Choices) -> None:
    """A weight that is the product of two."""
    rank, width = c.n, 3 * c.n
    u, v = b.parameter(width, rank), b.parameter(rank, b.width)
    product = b.let(c.of(f"{u} @ {v}", f"torch.matmul({u}, {v})", f"torch.mm({u}, {v})"))
    h = b.let(applied(c.act, b.let(f"F.linear(x, {product})")))
    back(b, c, h, width)


@step(0.5)
def weights_alone(b: Source, c: Choices) -> None:
    """A weight that is normalized, centered or masked before it is used."""
    width = 3 * c.n
    h, _ = hidden(b, c, width)
    w = b.parameter(b.width, width)
    text = c.of(
        "{} * 2.0", "F.normalize({}, dim=1)", "{} - {}.mean(1, keepdim=True)",
        "{} / {}.norm()", "torch.tanh({})", "{}.softmax(0)", "{} * ({}.abs() > 0.1)",
        "{}.t().contiguous().t()", "{} / {}.abs().sum(1, keepdim=True)",
        "F.normalize({}, dim=0)", "torch._weight_norm({}, {}[:, :1].abs(), 0)",
        "{}.cumsum(0)", "torch.tril({})", "{} / ({}.std(1, keepdim=True) + 1)",
    ).replace("{}", w)  # fmt: skip
    b.summed(False)
    b.stream(f"x + F.linear({h}, {b.let(text)})")


def _heads(b: Source, c: Choices, value: str, heads: int, width: int) -> str:
    """[b, l, heads × width] -> [b, heads, l, width]."""
    return b.let(c.of(
        f"{value}.view(x.shape[0], x.shape[1], {heads}, {width}).transpose(1, 2)",
        f"{value}.view(x.shape[0], -1, {heads}, {width}).permute(0, 2, 1, 3)",
        f"{value}.unflatten(-1, ({heads}, {width})).swapaxes(1, 2)",
        f"{value}.reshape(*x.shape[:2], {heads}, -1).movedim(2, 1)",
        f"torch.stack({value}.split({width}, -1), 1)" if c.odds(0.3) else
        f"{value}.unflatten(2, (-1, {width})).transpose(-3, -2)",
    ))  # fmt: skip


def _joined(b: Source, c: Choices, value: str, heads: int, width: int) -> str:
    """[b, heads, l, width] -> [b, l, heads × width]."""
    return b.let(c.of(
        f"{value}.transpose(1, 2).reshape(x.shape[0], x.shape[1], {heads * width})",
        f"{value}.transpose(1, 2).flatten(2)",
        f"{value}.permute(0, 2, 1, 3).contiguous().view(*x.shape[:2], -1)",
        f"torch.einsum('bhld->blhd', {value}).flatten(-2)",
    ))  # fmt: skip


def _rotated(b: Source, value: str, width: int) -> str:
    """Rotary positions over an even width."""
    frequencies = b.buffer(f"torch.rand({width // 2})")
    angles = b.let(f"torch.arange(x.shape[1], dtype=torch.float64)[:, None] * {frequencies}")
    angles = b.let(f"torch.cat([{angles}, {angles}], -1)")
    half = width // 2
    turned = b.let(f"torch.cat([-{value}[..., {half}:], {value}[..., :{half}]], -1)")
    return b.let(f"{value} * {angles}.cos() + {turned} * {angles}.sin()")


def _scores(b: Source, c: Choices, q: str, k: str, heads: int, width: int) -> str:
    scores = b.let(c.of(
        f"{q} @ {k}.transpose(-2, -1)",
        f"torch.einsum('bhid,bhjd->bhij', {q}, {k})",
        f"torch.matmul({q}, {k}.mT)",
        f"torch.bmm({q}.flatten(0, 1), {k}.flatten(0, 1).transpose(1, 2))"
        f".view(-1, {heads}, {q}.shape[2], {k}.shape[2])",
    ))  # fmt: skip
    scores = b.let(f"{scores} {c.of('/', '*')} {c.of(width**0.5, 2.0)}")
    if c.odds(0.3):
        scores = b.let(f"{scores} + {b.parameter(heads, 1, 1)} * {scores}.tanh()")
    if c.odds(0.2):
        scores = b.let(
            f"{scores}.masked_fill(torch.ones({q}.shape[2], {k}.shape[2], "
            "dtype=torch.bool).triu(1), -torch.inf)"
        )
    return b.let(f"{c.of('F.softmax', 'torch.softmax')}({scores}, -1)")


@step(5)
def attention(b: Source, c: Choices) -> None:
    """Self-attention in many spellings: fused or not, grouped queries, norms, rotary, biases."""
    heads, width = c.n, c.of(4, 2, 6)
    groups = c.of(1, 1, 2)
    value_width = c.of(width, 3, width)
    queries = heads * groups
    if groups == 1 and value_width == width and c.odds(0.5):
        q, k, v = _fused(b, c, heads, width)
    else:
        q = _heads(b, c, f"{b.linear(b.width, queries * width)}(x)", queries, width)
        k = _heads(b, c, f"{b.linear(b.width, heads * width, c.odds(0.5))}(x)", heads, width)
        v = _heads(b, c, f"{b.linear(b.width, heads * value_width)}(x)", heads, value_width)
    if c.odds(0.15):
        q, k = (_head_norm(b, c, t, width) for t in (q, k))
    if c.odds(0.25):
        q, k = (_rotated(b, t, width) for t in (q, k))
    z = _weighted(b, c, q, k, v, heads, groups, width)
    if c.odds(0.15):
        z = b.let(f"{z} * {b.parameter(queries, 1, 1)}")
    elif c.odds(0.1):
        z = b.let(f"torch.einsum('bhld,hg->bgld', {z}, {b.parameter(queries, queries)})")
    if c.odds(0.2):
        b.stream(
            f"x + torch.einsum('bhld,hdw->blw', {z}, {b.parameter(queries, value_width, b.width)})"
        )
    else:
        back(b, c, _joined(b, c, z, queries, value_width), queries * value_width)


def _fused(b: Source, c: Choices, heads: int, width: int) -> tuple[str, str, str]:
    """One layer for queries, keys and values."""
    size = heads * width
    qkv = b.let(f"{b.linear(b.width, 3 * size)}(x)")
    way = c.of("chunk", "unbind", "interleaved", "slices")
    if way == "unbind":
        order = c.of((2, 0, 3, 1, 4), (2, 0, 3, 1, 4))
        stacked = b.let(f"{qkv}.reshape(*x.shape[:2], 3, {heads}, {width}).permute{order}")
        parts = [f"{stacked}[{i}]" for i in range(3)] if c.odds(0.5) else [
            f"{stacked}.unbind(0)[{i}]" for i in range(3)]  # fmt: skip
        return tuple(b.let(p) for p in parts)  # type: ignore[return-value]
    if way == "interleaved":
        whole = b.let(f"{qkv}.view(*x.shape[:2], {heads}, {3 * width}).transpose(1, 2)")
        return tuple(  # type: ignore[return-value]
            b.let(f"{whole}[..., {i * width}:{(i + 1) * width}]") for i in range(3)
        )
    parts = [
        f"{qkv}.chunk(3, -1)[{i}]" if way == "chunk" else f"{qkv}[..., {i * size}:{(i + 1) * size}]"
        for i in range(3)
    ]
    return tuple(_heads(b, c, b.let(p), heads, width) for p in parts)  # type: ignore[return-value]


def _head_norm(b: Source, c: Choices, value: str, width: int) -> str:
    weight = b.parameter(width)
    return b.let(c.of(
        f"F.rms_norm({value}, ({width},), {weight}, 1e-3)",
        f"{value} * torch.rsqrt({value}.pow(2).mean(-1, keepdim=True) + 1e-3) * {weight}",
        f"F.normalize({value}, dim=-1)",
    ))  # fmt: skip


def _weighted(
    b: Source, c: Choices, q: str, k: str, v: str, heads: int, groups: int, width: int
) -> str:
    """softmax(q · k) · v, by hand or as the one operator."""
    queries = heads * groups
    by_hand = c.odds(0.4)
    if groups > 1 and (by_hand or c.odds(0.5)):
        way = c.of("interleave", "expand", "reshape")
        for_k, for_v = (
            b.let(
                f"{t}.repeat_interleave({groups}, 1)"
                if way == "interleave"
                else f"{t}[:, :, None].expand(-1, -1, {groups}, -1, -1).flatten(1, 2)"
            )
            for t in (k, v)
        )
        k, v, groups = for_k, for_v, 1
    if by_hand:
        weights = _scores(b, c, q, k, queries, width)
        return b.let(c.of(
            f"{weights} @ {v}", f"torch.einsum('bhij,bhjd->bhid', {weights}, {v})",
            f"torch.matmul({weights}, {v})",
        ))  # fmt: skip
    options = c.of(
        "", ", is_causal=True", ", scale=0.3",
        f", attn_mask={b.let('torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()')}",
        f", attn_mask={b.let(f'{b.parameter(queries, 1, 1)} + {q}.new_zeros(x.shape[1])')}",
        ", attn_mask=(x.sum(-1) * 0).cos()[:, None, None, :].expand(-1, -1, x.shape[1], -1)",
    )  # fmt: skip
    gqa = ", enable_gqa=True" if groups > 1 else ""
    return b.let(f"F.scaled_dot_product_attention({q}, {k}, {v}{options}{gqa})")


@step(0.7)
def shifted_attention(b: Source, c: Choices) -> None:
    """Scores with a term by distance: a reshape between the heads and the end, or slopes."""
    heads, width = c.n, c.of(4, 2)
    layers = [b.linear(b.width, heads * width) for _ in range(3)]
    q, k, v = (_heads(b, c, f"{layer}(x)", heads, width) for layer in layers)
    scores = b.let(f"{q} @ {k}.transpose(-2, -1)")
    way = c.of("shift", "transposed", "slopes", "table", "folded batch")
    length = "x.shape[1]"
    if way == "slopes":
        slopes = c.of(
            f"0.5 ** torch.arange(1, {heads + 1}, dtype=torch.float64)",
            f"torch.linspace(0.1, 1, {heads}, dtype=torch.float64)",
            f"torch.eye({heads}, dtype=torch.float64).cumsum(0).sum(1)",
        )
        bias = f"({slopes})[:, None, None] * torch.arange({length}, dtype=torch.float64)"
    elif way == "table":
        table = b.buffer(f"torch.rand({heads}, 9)")
        bias = f"({table}.softmax(-1) * 2)[..., :1, None]"
    else:
        distances = b.let(f"torch.cat([{scores}, {scores}.tanh(), {scores}[..., :1]], -1)")
        n = f"{distances}.shape[-1]"
        bias = {
            "shift": f"{distances}.reshape(x.shape[0], {heads}, {n}, {length})[:, :, 1:]"
                     f".reshape(x.shape[0], {heads}, {length}, {n} - 1)[..., :{length}]",
            "transposed": f"{distances}.view(x.shape[0], {heads}, -1)[..., :{length}].unsqueeze(2)",
            "folded batch": f"{distances}.reshape(-1, {n}, {length}).sum(-1)[:, :{length}]"
                            f".view(x.shape[0], {heads}, 1, {length})",
        }[way]  # fmt: skip
    z = b.let(f"({scores} + {bias}).softmax(-1) @ {v}")
    back(b, c, _joined(b, c, z, heads, width), heads * width)


@step()
def numbered(b: Source, c: Choices) -> None:
    """Lookups by masks and numbers: of places, and of units where the numbers are constant."""
    width = 4 * c.n
    h, _ = hidden(b, c, width)
    half = width // 2
    there = b.let("x.sum(-1) * 0 == 0")  # all of them, but nobody knows before
    text, left = c.of(
        (f"torch.zeros_like({h}).index_put(({there},), {h}[{there}])", width),
        (f"{h}.index_put(({there},), {h}[{there}].tanh() * 2)", width),
        (f"{h}.index_put((x.sum(-1) > 0,), {b.parameter(width)})", width),
        (f"{h}.index_put((x.sum(-1) > 0,), {h}.new_ones(1))", width),
        (f"{h}[torch.arange({h}.shape[0]), 0][:, None] * {h}", width),
        (f"{h}[:, torch.arange({h}.shape[1]).flip(0)]", width),
        (f"{h}[:, [0, 0, 1]].sum(1, keepdim=True)", width),
        (f"{h}[..., {list(range(1, half + 1))}]", half),
        (f"{h}[..., torch.arange({half}, {width})]", half),
        (f"{h}[..., torch.arange({width}) % 2 == 1]", half),
        (f"{h}[..., torch.arange({width}) >= {half}]", half),
        (f"{h}[..., torch.arange({width}).flip(0)]", width),
        (f"{h}.index_select(-1, torch.arange({half}) + 1)", half),
        (f"torch.cat([{h}[..., {list(range(half))}], {h}[..., [-1]]], -1)", half + 1),
        (f"{h}.view(*{h}.shape[:2], {half}, 2)[..., [1], :].expand(-1, -1, {half}, -1).flatten(2)",
         width),
    )  # fmt: skip
    if "x.sum(-1) > 0" in text:
        b.summed(b.zero)
    back(b, c, b.let(text), left)


@step(0.5)
def recurrent(b: Source, c: Choices) -> None:
    """A recurrent layer over hidden units, whose own width stays."""
    width, inner = 3 * c.n, c.of(4, 3)
    h, _ = hidden(b, c, width)
    both = c.odds(0.3)
    kind = c.of("LSTM", "GRU", "RNN", "RNN", "LSTMCell", "GRUCell", "RNNCell")
    if kind.endswith("Cell"):
        nonlinearity = c.of("", ", nonlinearity='relu'") if kind == "RNNCell" else ""
        cell = b.layer(f"nn.{kind}({width}, {inner}{nonlinearity})")
        state = b.let(f"{cell}({h}[:, 0])")
        state = b.let(f"{cell}({h}[:, -1], {state})")
        y = b.let(f"({state}[0] if isinstance({state}, tuple) else {state}).unsqueeze(1)")
        back(b, c, y, inner)
        return
    options = f"num_layers={c.of(1, 2)}, batch_first=True, bidirectional={both}"
    if kind == "RNN":
        options += f", nonlinearity={c.of('tanh', 'relu')!r}"
    layer = b.layer(f"nn.{kind}({width}, {inner}, {options}, bias={c.odds(0.7)})")
    y = b.let(f"{layer}({h})[0]")
    back(b, c, y, inner * (1 + both))


@step(0.7)
def cross_attention(b: Source, c: Choices) -> None:
    """Queries of learned tokens, or keys of another input."""
    heads, width = c.n, 4
    first, second = (b.linear(b.width, heads * width) for _ in range(2))
    if c.odds(0.5):
        memory = b.argument("memory", "float", "b", 3, 5)
        k_layer, v_layer = (b.linear(5, heads * width) for _ in range(2))
        k, v = (
            b.let(f"{f}({memory}).view(x.shape[0], 3, {heads}, {width}).transpose(1, 2)")
            for f in (k_layer, v_layer)
        )
        q = _heads(b, c, f"{first}(x)", heads, width)
        z = b.let(f"F.scaled_dot_product_attention({q}, {k}, {v})")
        back(b, c, _joined(b, c, z, heads, width), heads * width)
        return
    b.summed(False)  # a query of zeros looks at everything alike, and queries are averaged
    tokens = b.parameter(2, heads * width)
    q = b.let(f"{tokens}.view(2, {heads}, {width}).transpose(0, 1).expand(x.shape[0], -1, -1, -1)")
    k, v = (_heads(b, c, f"{f}(x)", heads, width) for f in (first, second))
    z = b.let(f"F.scaled_dot_product_attention({q}, {k}, {v}).transpose(1, 2).flatten(2)")
    out = b.linear(heads * width, b.width)
    b.stream(f"x + {out}({z}).mean(1, keepdim=True)")


@step(0.7)
def cached_attention(b: Source, c: Choices) -> None:
    """Keys and values of past tokens come in, and go out longer."""
    heads, width = c.n, c.of(4, 2)
    groups = c.of(1, 2)
    pasts = [b.argument("past", "float", "b", heads, "p", width) for _ in range(2)]
    q = _heads(b, c, f"{b.linear(b.width, heads * groups * width)}(x)", heads * groups, width)
    k, v = (_heads(b, c, f"{b.linear(b.width, heads * width)}(x)", heads, width) for _ in range(2))
    if c.odds(0.4) and width % 2 == 0:
        q, k = (_rotated(b, t, width) for t in (q, k))
    k, v = (
        b.let(f"torch.cat([{p}, {t}], {c.of(2, -2)})") for p, t in zip(pasts, (k, v), strict=True)
    )
    for past, present in zip(pasts, (k, v), strict=True):
        b.outputs.append(present)
        b.cache[past] = len(b.outputs)
    z = _weighted_cache(b, c, q, k, v, heads, groups, width)
    back(b, c, _joined(b, c, z, heads * groups, width), heads * groups * width)


def _weighted_cache(
    b: Source, c: Choices, q: str, k: str, v: str, heads: int, groups: int, width: int
) -> str:
    queries = heads * groups
    if groups > 1 and c.odds(0.5):
        k, v = (b.let(f"{t}.repeat_interleave({groups}, dim=1)") for t in (k, v))
        groups = 1
    if groups == 1 and c.odds(0.4):
        weights = _scores(b, c, q, k, queries, width)
        return b.let(f"{weights} @ {v}")
    gqa = ", enable_gqa=True" if groups > 1 else ""
    return b.let(f"F.scaled_dot_product_attention({q}, {k}, {v}{gqa})")


@step(0.5)
def products(b: Source, c: Choices) -> None:
    """Units met by units: bilinear forms, outer products, grams."""
    width = 3 * c.n
    h, zero = hidden(b, c, width)
    g = b.let(f"{b.linear(b.width, width)}(x)")
    b.summed(zero)
    text = c.of(
        f"x * ({h} * {g}).sum(-1, keepdim=True)",
        f"x + torch.einsum('bli,blj,ijw->blw', {h}, {g}, {b.parameter(width, width, b.width)})",
        f"x * torch.einsum('bld,bld->bl', {h}, {g}).unsqueeze(-1)",
        f"({h} @ {g}.transpose(1, 2)).softmax(-1) @ x",
        f"x + torch.bmm({h}, torch.bmm({g}.transpose(1, 2), x))",
        f"torch.baddbmm(x, {h}, {g}.transpose(1, 2) @ x, alpha=0.5)",
        f"x + torch.einsum('...d,...d->...', {h}, {g})[..., None]",
        f"x * torch.einsum('bli,blj->blij', {h}, {g}).sum((-1, -2)).unsqueeze(-1)",
        f"x + torch.bmm({h}.flatten(0, 1).unsqueeze(1), "
        f"{g}.flatten(0, 1).unsqueeze(2)).view(x.shape[0], -1, 1)",
        f"x * torch.dot({b.parameter(width)}, {h}.mean((0, 1)))",
    )
    # What is added to every unit alike makes the removed ones other than zero.
    b.stream(text, zero=b.zero and not text.startswith(("x + torch.bmm", "x + torch.einsum('...d")))


@step()
def experts(b: Source, c: Choices) -> None:
    """Three-dimensional weights: all experts, weighted, or one a group of rows."""
    width = 2 * c.n
    up, down = b.parameter(3, b.width, width), b.parameter(3, width, b.width)
    way = c.of("einsum", "routed", "matmul", "grouped", "baddbmm")
    if way == "grouped":
        flat = b.let("x.reshape(-1, x.shape[-1])")
        ends = b.let("torch.arange(1, 4, dtype=torch.int32) * (x.shape[0] * x.shape[1]) // 3")
        mm = "torch.ops.graphprune.grouped_mm"
        h = b.let(applied(c.act, b.let(f"{mm}({flat}, {up}, {ends})")))
        b.stream(f"x + {mm}({h}, {down}, {ends}).view_as(x)")
        return
    if way in ("matmul", "baddbmm"):
        flat = b.let(f"x.reshape(1, -1, {b.width}).expand(3, -1, -1)")
        bias = b.parameter(3, 1, width)
        inner = f"torch.baddbmm({bias}, {flat}, {up})" if way == "baddbmm" else f"{flat} @ {up}"
        h = b.let(applied(c.act, b.let(inner)))
        b.stream(f"x + torch.bmm({h}, {down}).sum(0).view(x.shape)")
        return
    h = b.let(applied(c.act, b.let(f"torch.einsum('bsd,edf->bsef', x, {up})")))
    if way == "einsum":
        b.stream(f"x + torch.einsum('bsef,efd->bsd', {h}, {down})")
        return
    router = b.linear(b.width, 3)
    weights = b.let(f"{router}(x).softmax(-1)")
    if c.odds(0.5):
        top = b.let(f"{weights}.topk(2, -1)")
        weights = b.let(f"torch.zeros_like({weights}).scatter(-1, {top}.indices, {top}.values)")
    b.stream(f"x + (torch.einsum('bsef,efd->bsed', {h}, {down}) * {weights}[..., None]).sum(2)")


@step(2.5)
def normalized(b: Source, c: Choices) -> None:
    """Norms of hidden units: by root mean square, which is exact, and by mean and variance."""
    width = 2 * c.n * c.of(2, 3)
    h, zero = hidden(b, c, width)
    weight, bias = b.parameter(width), b.parameter(width)
    channels = b.let(f"{h}.transpose(1, 2)")
    text, sums = c.of(
        (f"F.rms_norm({h}, ({width},), {weight}, 1e-3)", True),
        (f"{h} * torch.rsqrt({h}.pow(2).mean(-1, keepdim=True) + 1e-3) * {weight}", True),
        (f"{b.layer(f'nn.RMSNorm({width})')}({h})", True),
        (f"F.layer_norm({h}, ({width},), {weight}, {bias})", False),
        (f"{b.layer(f'nn.BatchNorm1d({width})')}({channels}).transpose(1, 2)", False),
        (f"{b.layer(f'nn.GroupNorm({c.n}, {width})')}({channels}).transpose(1, 2)", False),
        (f"{b.layer(f'nn.InstanceNorm1d({width}, affine=True, track_running_stats=True)')}"
         f"({channels}).transpose(1, 2)", False),
        (f"({h} - {h}.mean(-1, keepdim=True)) * torch.rsqrt({h}.var(-1, keepdim=True) + 0.1)",
         False),
        (f"{h} / ({h}.norm(dim=-1, keepdim=True) + 0.1)", True),
        (f"F.normalize({h}, dim=-1)", True),
        (f"{h} / (1 + torch.linalg.vector_norm({h}, {c.of(1, 2, 3, float('inf'))}, -1, True))",
         True),
        (f"F.rms_norm({h}.unflatten(-1, ({c.n}, -1)), ({width // c.n},)).flatten(-2)", True),
        (f"F.rms_norm({h}.unflatten(-1, ({c.n}, -1)), ({c.n}, {width // c.n})).flatten(-2)", True),
        (f"{h} * torch.rsqrt({h}.square().sum(-1, True) / {width} + 1e-3)", True),
    )  # fmt: skip
    b.summed(zero or not sums)
    y = b.let(text.replace(", inf,", ", torch.inf,"))
    back(b, c, y, width)


@step(0.7)
def stream_norm(b: Source, c: Choices) -> None:
    """A norm on the stream itself."""
    way = c.of("rms", "layer", "hand", "scaled")
    if way == "layer":
        b.stream(f"{b.layer(f'nn.LayerNorm({b.width})')}(x)")
        return
    b.summed(b.zero)
    if way == "rms":
        b.stream(f"{b.layer(f'nn.RMSNorm({b.width}, eps=1e-3)')}(x)")
    elif way == "hand":
        b.stream(
            f"x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * "
            f"(1 + {b.parameter(b.width)})"
        )
    else:
        b.stream(f"{b.parameter(b.width)} * x / (x.abs().mean(-1, keepdim=True) + 0.5)")


@step(0.5)
def centered(b: Source, c: Choices) -> None:
    """A layer norm written by hand: a mean subtracted along its own axis."""
    width = 3 * c.n
    h, zero = hidden(b, c, width)
    b.summed(zero)
    mean = b.let(f"{h}.mean(-1, keepdim=True)")
    b.stream(c.of(
        f"x * ({h} - {mean}).pow(2).sum(-1, keepdim=True).tanh()",
        f"x + {b.linear(width, b.width)}(({h} - {mean}) * torch.rsqrt(({h} - {mean}).square()"
        ".mean(-1, keepdim=True) + 1e-3))",
    ))  # fmt: skip


@step(2.5)
def reduced(b: Source, c: Choices) -> None:
    """Sums, means, norms of segments of the hidden units, and means of those."""
    outer, inner = c.n, c.of(4, 3)
    width = outer * inner
    h, zero = hidden(b, c, width)
    b.summed(zero)
    parts = b.let(f"{h}.unflatten(-1, ({outer}, {inner}))")
    text, left = c.of(
        (f"{parts}.mean(-1)", outer), (f"{parts}.sum(-2)", inner), (f"{parts}.mean(2)", inner),
        (f"{parts}.sum(-1) + {parts}.mean(3)", outer),
        (f"{parts}.mean(-1).mean(-1, keepdim=True)", 1),
        (f"{parts}.sum(-1).mean(-1, keepdim=True)", 1),
        (f"{parts}.mean((-1, -2)).unsqueeze(-1)", 1),
        (f"{parts}.norm(dim=-1)", outer),
        (f"torch.linalg.vector_norm({parts}, 2, dim=-2)", inner),
        (f"{parts}.pow(2).mean(-1).sqrt()", outer),
        (f"({parts} * {parts}.mean(-1, keepdim=True)).flatten(-2)", width),
        (f"({parts} * {parts}.mean((-1, -2), keepdim=True)).flatten(-2)", width),
        (f"({parts} + {parts}.sum(-2, keepdim=True)).flatten(-2)", width),
        (f"{h}.norm(p=1, dim=-1, keepdim=True)", 1),
        (f"torch.count_nonzero({parts}, -1).double()", outer),
        (f"{parts}.norm(p=3, dim=-1)", outer),
        (f"{parts}.mean(-1, keepdim=True).mean(-2).squeeze(-1).unsqueeze(-1)", 1),
        (f"{h}.mean(1, keepdim=True).expand_as({h})", width),
        (f"{h}.sum(0, keepdim=True).expand({h}.shape)", width),
        (f"{h} * {h}.mean(dim=1, keepdim=True)", width),
    )  # fmt: skip
    y = b.let(text)
    if left == 1:
        b.stream(f"x * {y}.tanh()")
    else:
        back(b, c, y, left)


@step()
def chosen(b: Source, c: Choices) -> None:
    """Operators that look along an axis: it must stay as it is."""
    width = 3 * c.n
    h, _ = hidden(b, c, width)
    d = c.of(-1, 1)
    index = b.buffer(f"torch.randint({width}, ({width},))") if c.odds(1.0) else ""
    text = c.of(
        f"{h}.softmax({d})", f"{h}.log_softmax({d})", f"{h}.cumsum({d})", f"{h}.flip({d})",
        f"{h}.roll(1, {d})", f"{h} - {h}.amax({d}, keepdim=True)",
        f"{h} - {h}.max({d}, keepdim=True).values", f"{h}.sort({d}).values",
        f"{h} * {h}.amin({d}, keepdim=True)", f"{h} - {h}.logsumexp({d}, keepdim=True)",
        f"{h}.tanh().cumprod({d})", f"{h}.tanh().prod({d}, keepdim=True) * {h}",
        f"{h} * ({h}.argmax({d}, keepdim=True) + 1)", f"{h} * ({h} > 1).any({d}, keepdim=True)",
        f"torch.tril({h})", f"torch.triu({h}, 1)", f"{h} * ({h} > -3).all({d}, keepdim=True)",
        f"{h} - {h}.median({d}, keepdim=True).values", f"{h} * {h}.argsort({d})",
        f"{h} * {h}.var({d}, keepdim=True, correction=0)", f"{h}.min({d}, keepdim=True)[0] + {h}",
        f"{h}.topk(1, {d}).values + {h}", f"{h}.logcumsumexp({d})",
        f"{h} + {h}.kthvalue(1, {d}, keepdim=True).values", f"F.softmin({h}, {d})",
        f"{h} * {h}.std({d}, keepdim=True, correction=0)",
        f"{h} + torch.var_mean({h}, {d}, keepdim=True, correction=0)[0]",
        f"{h} - torch.std_mean({h}, {d}, keepdim=True, correction=0)[1]",
        f"{h} * ({h}.argmin({d}, keepdim=True) + 1)", f"{h} + {h}.mode({d}, keepdim=True)[0]",
        f"{h} - torch.max({h})", f"{h} * torch.median({h})", f"torch.linalg.vector_norm({h}, 0, "
        f"{d}, True) * {h}", f"{h} / ({h}.norm(float('inf'), {d}, keepdim=True) + 1)",
        f"{h}.gather(2, {h}.argsort(1).clamp_max({width - 1}))",
        f"torch.take_along_dim({h}, {h}.argsort(-1), -1)", f"{h}.index_select(2, {index})",
        f"{h}[..., {index}]", f"{h}[:, :, [{width - 1}, *range({width - 1})]]",
        f"{h} * F.one_hot({h}.argmax(-1), {width})", f"{h} + torch.arange({width})",
        f"{h} + torch.linspace(0, 1, {width}, dtype=torch.float64)",
        f"{h} @ torch.eye({width}, dtype=torch.float64)", f"F.pad({h}, (1, -1))",
        f"F.pad({h}, (0, 0, 1, -1))", f"torch.constant_pad_nd({h}, (0, 0, 1, 0), 0.5)[:, :-1]",
        f"{h} * torch.bucketize({h}, {b.buffer('torch.linspace(-1, 1, 5)')})",
        f"{h} * torch.hann_window({width}, dtype=torch.float64)",
        f"{h} + torch.searchsorted({b.buffer('torch.linspace(-1, 1, 5)')}, {h})",
        f"{h}.scatter(-1, {h}.argmax(-1, True), 1.0)",
        f"torch.zeros_like({h}).scatter_add(2, {h}.argsort(-1), {h})",
        f"{h}.masked_scatter({h} > 5, {h})",
        f"{h}.scatter_reduce(-1, {h}.argsort(-1), {h}, 'amax')",
        f"torch.zeros_like({h}).index_add(2, torch.arange({width}).flip(0), {h})",
        f"{h}.index_fill(2, torch.arange(2), 0.5)",
        f"{h}.index_copy(2, torch.arange({width}).flip(0), {h} * 2)",
        f"{h} + {h}[..., :1]", f"{h} * {h}.select(-1, 1).unsqueeze(-1)",
        f"{h} @ torch.tril(torch.ones({width}, {width}, dtype=torch.float64))",
    )  # fmt: skip
    y = b.let(text)
    back(b, c, y, width)


@step(3)
def rearranged(b: Source, c: Choices) -> None:
    """Units moved, cut, joined, repeated; then read by a weight."""
    n = c.n
    width = 12 if c.odds(0.5) else 4 * n
    h, _ = hidden(b, c, width)
    half, third = width // 2, width // 4
    text, left = c.of(
        (f"torch.cat([{h}[..., {third}:], {h}[..., :{third}]], -1)", width),
        (f"{h} + torch.cat([-{h}[..., {half}:], {h}[..., :{half}]], dim=-1)", width),
        (f"{h}.view(*{h}.shape[:2], 2, {half}).transpose(2, 3).reshape({h}.shape)", width),
        (f"{h}[..., ::2]", half), (f"{h}[..., 1::2] * {h}[..., ::2]", half),
        (f"{h}[..., 1::4]", third), (f"{h}[:, :, -{third}:]", third),
        (f"{h}[..., 1:-1]", width - 2),
        (f"torch.cat({h}.split([1, {half}, {half - 1}], -1)[::-1], -1)", width),
        (f"{h}.repeat(1, 1, 2)", 2 * width), (f"torch.tile({h}, (2,))", 2 * width),
        (f"{h}.repeat_interleave(2, -1)", 2 * width),
        (f"{h}.repeat_interleave(2, dim=-1)[..., ::2]", width),
        (f"{h}[:, :, None].expand(-1, -1, 2, -1).reshape(*{h}.shape[:2], {2 * width})", 2 * width),
        (f"{h}.unsqueeze(-1).expand(-1, -1, -1, 2).flatten(2)", 2 * width),
        (f"torch.stack([{h}, {h} * 2], 2).flatten(2)", 2 * width),
        (f"torch.stack([{h}, {h}.tanh()], -1).flatten(-2)", 2 * width),
        (f"{h}.unflatten(-1, (2, {half})).transpose(-1, -2).flatten(-2)", width),
        (f"{h}.unflatten(-1, ({half}, 2)).mT.flatten(2)", width),
        (f"{h}.unsqueeze(1).squeeze(1)", width), (f"{h}.movedim(-1, 0).movedim(0, -1)", width),
        (f"{h}.narrow(-1, 1, {half})", half), (f"sum({h}.chunk(4, -1))", third),
        (f"torch.cat(torch.unsafe_split({h}, {third}, -1), 2)", width),
        (f"{h}.permute(2, 0, 1).permute(1, 2, 0)", width),
        (f"{h}.swapdims(1, 2).adjoint()", width), (f"{h}.mH.swapaxes(-1, -2)", width),
        (f"torch.cat([{h}, x], -1)", width + b.width),
        (f"torch.concat([x, {h}, {h}.tanh()], -1)", 2 * width + b.width),
        (f"torch.concatenate([{h}, {h}[..., :{third}]], 2)", width + third),
        (f"{h}.broadcast_to(2, *{h}.shape).mean(0)", width),
        (f"{h}.view(*{h}.shape[:2], 2, -1).unbind(2)[1]", half),
        (f"{h}.view(*{h}.shape[:2], 2, -1).select(2, 0)", half),
        (f"{h}.flatten(0, 1).T.T.view({h}.shape)", width),
        (f"{h}.flatten(0, 1).t().t().view_as({h})", width),
        (f"{h}.reshape({h}.shape[0], -1).view({h}.shape)", width),
        (f"torch.ops.aten._unsafe_view({h} * 1, {h}.shape)", width),
        (f"{h}.view(*{h}.shape[:2], {half}, 2).flip(-1).flatten(2)", width),
        (f"{h}.view(*{h}.shape[:2], 2, {half}).roll(1, 2).flatten(2)", width),
        (f"torch.cat([{h}.new_zeros(*{h}.shape[:2], 2), {h}], -1)", width + 2),
        (f"torch.cat([{h}, {h}.new_ones(*{h}.shape[:2], 1)], -1)", width + 1),
        (f"{h}.transpose(0, 1).transpose(1, 0).contiguous()", width),
        (f"{h}.view(*{h}.shape[:2], 2, {half // 2}, 2).permute(0, 1, 4, 2, 3).flatten(2)", width),
        (f"{h}.tensor_split([1, {half}], -1)[1]", half - 1),
        (f"{h} + {h}.view(*{h}.shape[:2], 2, {half}).roll(1, 2).reshape({h}.shape)", width),
    )  # fmt: skip
    y = b.let(applied(c.act, b.let(text))) if c.odds(0.4) else b.let(text)
    back(b, c, y, left)


@step(1.5)
def constants(b: Source, c: Choices) -> None:
    """Tensors made in forward that take the axis they meet."""
    width = 3 * c.n
    h, _ = hidden(b, c, width)
    shape = c.of(f"{h}.shape", f"x.shape[0], x.shape[1], {width}", f"{width}", f"1, {width}")
    size = shape if "," not in shape else f"({shape})"
    if size.isdigit():
        size = f"({size},)"
    text = c.of(
        f"torch.zeros({size}, dtype=torch.float64) + {h}",
        f"torch.ones({size}, dtype=torch.float64) * {h}",
        f"torch.full({size}, 0.5, dtype=torch.float64) * {h}", f"{h}.new_zeros({size}) - {h}",
        f"{h} + {h}.new_ones({size})", f"{h} * {h}.new_full({size}, 0.3)",
        f"torch.maximum({h}, {h}.new_full({size}, 0.1))",
        f"{h} + torch.zeros({size}, dtype=torch.float64).fill_(0.5)",
        f"{h}.new_empty({size}).zero_() + {h}",
        f"torch.empty({size}, dtype=torch.float64).fill_(0.5) * {h}",
        f"{h} * torch.scalar_tensor(0.5, dtype=torch.float64)",
        f"{h} / {h}.shape[-1] ** 0.5", f"{h} * {h}.size(1)", f"{h} / {h}[0, 0].numel()",
        f"{h} * torch.tensor(0.7, dtype=torch.float64)",
        f"{h} + torch.tensor([0.1] * {width}, dtype=torch.float64)",
    )  # fmt: skip
    back(b, c, b.let(text), width)


@step(2)
def written(b: Source, c: Choices) -> None:
    """In-place writes into hidden values, whole or in part."""
    width = 4 * c.n
    h, _ = hidden(b, c, width)
    g = b.let(f"{b.linear(b.width, width)}(x)")
    half = width // 2
    for text in [
        c.of(
            f"{h}.add_({g})", f"{h}.mul_({g})", f"{h} += {b.parameter(width)}",
            f"{h}.add_(1.0)", f"{h}.relu_()", f"{h}.clamp_(-1, 1)", f"{h}.masked_fill_({g} > 0, 0)",
            f"{h}[..., :{half}] = {g}[..., {half}:]", f"{h}[..., {half}:] += {g}[..., :{half}]",
            f"{h}[:, 0] = {b.parameter(width)}", f"{h}[:, :1] = {g}[:, -1:]",
            f"{h}[0] = {g}[0]", f"{h}[..., 0] = 0.5", f"{h}.copy_({g})", f"{h}.sub_({g}).tanh_()",
            f"{h}[:, torch.zeros(1, dtype=torch.int64)] = {g}[:, :1]",
            f"{h}.index_put_((torch.arange({h}.shape[0]),), {g})",
            f"{h}.index_add_(1, torch.zeros({g}.shape[1], dtype=torch.int64), {g})",
            f"{h}[..., 1:3].mul_(2.0)", f"{h}.view(*x.shape[:2], 2, {half})[:, :, 0] = 0.25",
            f"{h}.zero_().add_({g})", f"{h}.fill_(0.5).mul_({g})", f"{h}.div_({g}.abs() + 1)",
            f"{h}.chunk(2, -1)[0].add_(1.0)", f"{h}[..., ::2] = {g}[..., ::2]",
            f"{h}.transpose(1, 2).mul_({b.parameter(width, 1)})",
            f"{h}.index_copy_(2, torch.arange({width}), {g})",
            f"{h}.narrow(-1, 0, {half}).copy_({g}.narrow(-1, {half}, {half}))",
            f"{h}.lerp_({g}, 0.3)", f"{h}.addcmul_({g}, {g})", f"{h}[{h} > 1] = 1.0",
        )
    ]:  # fmt: skip
        b.line(text)
    back(b, c, h, width)


@step(1.5)
def convolved(b: Source, c: Choices) -> None:
    """One-dimensional convolutions: dense, grouped, by channel, transposed; pools."""
    groups = c.n
    width = groups * c.of(2, 4)
    first = b.layer(f"nn.Conv1d({b.width}, {width}, {c.of(1, 3)}, padding='same')")
    h = b.let(applied(c.act, b.let(f"{first}(x.transpose(1, 2))")))
    out = width
    for _ in range(c.of(1, 2)):
        kind = c.of("grouped", "channel", "dense", "norm", "transposed", "pool", "causal",
                    "multiplied", "shuffle", "functional", "group transposed")  # fmt: skip
        if kind == "grouped":
            outer = groups * c.of(2, 3)
            h = b.let(f"{b.layer(f'nn.Conv1d({out}, {outer}, 1, groups={groups})')}({h})")
            out = outer
        elif kind == "channel":
            h = b.let(f"{b.layer(f'nn.Conv1d({out}, {out}, 3, padding=1, groups={out})')}({h})")
        elif kind == "multiplied":
            h = b.let(f"{b.layer(f'nn.Conv1d({out}, {2 * out}, 1, groups={out})')}({h})")
            out *= 2
        elif kind == "dense":
            text = f"nn.Conv1d({out}, {width}, 3, padding=2, dilation=2, bias={c.odds(0.5)})"
            h, out = b.let(f"{b.layer(text)}({h})"), width
        elif kind == "norm":
            h = b.let(f"{b.layer(f'nn.BatchNorm1d({out})')}({h})")
        elif kind == "transposed":
            h = b.let(f"{b.layer(f'nn.ConvTranspose1d({out}, {width}, 3, padding=1)')}({h})")
            out = width
        elif kind == "group transposed":
            text = f"nn.ConvTranspose1d({out}, {out}, 1, groups={groups})"
            h = b.let(f"{b.layer(text)}({h})")
        elif kind == "pool":
            h = b.let(c.of(
                f"F.max_pool1d({h}, 3, 1, 1)", f"F.avg_pool1d({h}, 3, 1, 1)",
                f"F.adaptive_avg_pool1d({h}, 1) * {h}",
                f"F.interpolate({h}, scale_factor=2.0)[..., ::2]",
                f"F.interpolate({h}, scale_factor=2.0, mode='linear')[..., 1::2]"
            ))  # fmt: skip
        elif kind == "causal":
            text = f"nn.Conv1d({out}, {out}, 3, groups={out})"
            h = b.let(f"{b.layer(text)}(F.pad({h}, (2, 0)))")
        elif kind == "functional":
            h = b.let(f"F.conv1d({h}, {b.parameter(out, out, 1)}, {b.parameter(out)})")
        else:
            h = b.let(
                f"{h}.view({h}.shape[0], {groups}, -1, {h}.shape[-1]).transpose(1, 2)"
                f".reshape({h}.shape)"
            )
        if out % groups:
            break
    back(b, c, b.let(f"{h}.transpose(1, 2)"), out)


@step(1.2)
def looked_up(b: Source, c: Choices) -> None:
    """Tables: of ids, of positions, of a classification."""
    way = c.of("ids", "positions", "buffer", "index", "one hot", "tied", "arange", "type")
    by_ids = ("ids", "tied", "index", "one hot")
    if way in by_ids and len(b.inputs["x"][1]) == 4:  # an image's positions: there is no "l"
        way = "positions"
    if way in by_ids:
        ids = b.argument("ids", "ids", 7, "b", "l")
        table = b.layer(f"nn.Embedding(7, {b.width})")
        text = {
            "ids": f"x + {table}({ids})",
            "index": f"x + {b.parameter(7, b.width)}[{ids}]",
            "one hot": f"x + F.one_hot({ids}, 7).double() @ {b.parameter(7, b.width)}",
            "tied": f"x + {table}({ids}) * F.linear(x, {table}.weight).mean(-1, keepdim=True)",
        }[way]
        b.stream(text, zero=None)
    elif way == "positions":
        b.stream(f"x + {b.parameter(40, b.width)}[:x.shape[1]]")
    elif way == "arange":
        b.stream(f"x + {b.layer(f'nn.Embedding(40, {b.width})')}(torch.arange(x.shape[1]))")
    elif way == "type":
        b.stream(
            f"x + {b.layer(f'nn.Embedding(3, {b.width})')}"
            "(torch.zeros(x.shape[:2], dtype=torch.int64))"
        )
    else:
        b.stream(f"x * {b.buffer(f'torch.rand(1, 40, {b.width})')}[:, :x.shape[1]]")


@step(1.2)
def shared(b: Source, c: Choices) -> None:
    """One weight read twice: applied again, transposed, or as its own consumer."""
    width = 3 * c.n
    way = c.of("twice", "transposed", "loop", "square", "both", "self")
    if way == "self":
        w = b.parameter(b.width, b.width)
        b.stream(f"x + F.linear({applied(c.act, b.let(f'F.linear(x, {w})'))}, {w})")
        return
    up = b.linear(b.width, width)
    h = b.let(applied(c.act, b.let(f"{up}(x)")))
    if way == "twice":
        down = b.linear(width, b.width)
        b.stream(f"x + {down}({h})")
        again = b.let(applied(c.act, b.let(f"{up}(x)")))
        b.stream(f"x + {down}({again})")
    elif way == "transposed":
        b.stream(f"x + {h} @ {up}.weight")
    elif way == "both":
        b.stream(f"x + F.linear({h}, {up}.weight.t(), {b.parameter(b.width)})")
    else:
        square = b.linear(width, width)
        for _ in range(2):
            h = b.let(f"{applied(c.act, b.let(f'{square}({h})'))} {c.of('+', '*')} {h}")
        back(b, c, h, width)


@step(1.0)
def remembered(b: Source, c: Choices) -> None:
    """An earlier value of the stream, added or beside the present one."""
    if not b.saved:
        return
    old, width, zero = c.of(*b.saved)
    if width == b.width and c.odds(0.6):
        b.stream(
            c.of(f"x + {old}", f"x * {old}.tanh()", f"torch.where({old} > 0, x, {old})"),
            zero=b.zero and zero,
        )
    else:
        b.stream(
            c.of(f"torch.cat([x, {old}], -1)", f"torch.cat([{old}, x.tanh()], -1)"),
            b.width + width,
            b.zero and zero,
        )


@step(0.5)
def returned(b: Source, c: Choices) -> None:
    """Another output: through a weight, pooled, or of the hidden units themselves, which stay."""
    width = 3 * c.n
    h, zero = hidden(b, c, width)
    way = c.of("weight", "pooled", "itself", "norm")
    if way == "norm":
        b.summed(zero)
    b.outputs.append({
        "weight": f"{b.linear(width, 2)}({h})",
        "pooled": f"{b.linear(width, 2)}({h}.mean(1))",
        "itself": h,
        "norm": f"{h}.norm(dim=-1)",
    }[way])  # fmt: skip


@step(0.3)
def scanned(b: Source, c: Choices) -> None:
    """Operators without a rule: everything that they touch stays."""
    width = 2 * c.n
    h, _ = hidden(b, c, width)
    text = c.of(
        f"F.cosine_similarity({h}, {h} * 2, -1).unsqueeze(-1) * {h}",
        f"torch.cdist({h}, {h}) @ {h}",
        f"{h} @ torch.linalg.matrix_exp({b.parameter(width, width)} * 0.1)",
        f"torch.fft.rfft({h}, dim=1).abs()[:, :1] * {h}",
    )
    back(b, c, b.let(text), width)


@step(1.2)
def operators(b: Source, c: Choices) -> None:
    """ATen operators that modules rarely call, but captured graphs may hold."""
    width = 2 * c.n
    h, zero = hidden(b, c, width)
    channels = b.let(f"{h}.transpose(1, 2)")
    weight, bias, mean = (b.parameter(width) for _ in range(3))
    variance = b.buffer(f"torch.rand({width})")
    aten = "torch.ops.aten"
    text = c.of(
        f"{aten}.alias({h})",
        f"{aten}._softmax({h}, 1, False)",
        f"{aten}._log_softmax({h}, 1, False)",
        f"{aten}._safe_softmax({h}, 1)",
        f"{aten}.convolution({channels}, {b.parameter(width, width, 1)}, {bias}, [1], [0], [1], "
        "False, [0], 1).transpose(1, 2)",
        f"{aten}.convolution({channels}, {b.parameter(width, 2, 1)}, {bias}, [1], [0], [1], "
        f"False, [0], {c.n}).transpose(1, 2)",
        f"{aten}.convolution({channels}, {b.parameter(width, width, 1)}, {bias}, [1], [0], [1], "
        "True, [0], 1).transpose(1, 2)",
        f"{aten}.native_batch_norm({channels}, {weight}, {bias}, {mean}, {variance}, False, 0.1, "
        "1e-3)[0].transpose(1, 2)",
        f"{aten}._native_batch_norm_legit_no_training({channels}, {weight}, {bias}, {mean}, "
        f"{variance}, 0.1, 1e-3)[0].transpose(1, 2)",
        f"{aten}.lift({h})",
        f"{aten}.lift_fresh({h})",
        f"{aten}.lift_fresh_copy({h})",
        f"{aten}._prelu_kernel({h}, {weight})",
        f"{aten}.concat([{h}[..., :2], {h}[..., 2:]], -1)",
        f"{aten}.concatenate([{h}[..., 1:], {h}[..., :1]], -1)",
        f"{aten}.matrix_H({h}.flatten(0, 1)).t().view_as({h})",
        f"{aten}.numpy_T({h}.flatten(0, 1)).T.view_as({h})",
        f"{aten}._to_copy({h})",
        f"{h} * {h}.histc(3).sum()",
        f"{h} * {h}.amax((0, 1)).mul(0).histc(3)[0]",
        f"{h} + torch.tril_indices(2, 2).sum()",
        f"{h} + torch.triu_indices(2, 2).sum()",
        f"{h} / {h}.numel()",
        f"{h} / {h}.stride(0)",
        f"{h} + {h}.storage_offset()",
        f"{aten}.linalg_vector_norm({h}, 2, [-1], True) * {h}",
        f"{aten}.repeat_interleave.self_int({h}, 2, -1)[..., ::2]",
        f"{aten}.new_empty_strided({h}, [{width}], [1]).zero_() + {h}",
        f"{aten}.norm.ScalarOpt_dim({h}, 2, [-1], True) * {h}",
        f"{aten}.reflection_pad1d({h}, [1, 1])[..., 1:-1]",
        f"{aten}.reflection_pad2d({h}, [1, 1, 0, 0])[..., 2:]",
        f"{aten}.replication_pad2d({h}, [0, 1, 1, 0])[:, 1:, 1:]",
        f"{h} * torch.bincount(torch.arange({width}))",
        f"{aten}.special_log_softmax({h}, 1)",
    )
    b.summed(zero or not ("vector_norm" in text or "aten.norm" in text))
    back(b, c, b.let(text), width)
