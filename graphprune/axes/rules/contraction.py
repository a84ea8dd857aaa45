"""Matrix products, convolutions and attention: where axes meet weights and vanish in sums."""

from __future__ import annotations

import math

from graphprune.axes import algebra
from graphprune.axes.algebra import Axis
from graphprune.axes.facts import Dims
from graphprune.axes.rules.context import RewriteContext, RuleContext
from graphprune.axes.rules.registry import rewriter, rule


@rule("linear")
def linear(c: RuleContext) -> Dims:
    """x[..., k] · w[n, k] + b[n]."""
    x, w, b = c.dims(c.get("input")), c.dims(c.get("weight")), c.dims(c.get("bias"))
    c.unify(x[-1], w[-1])
    c.contract("input", len(x) - 1, "weight")
    if len(w) == 1:
        return x[:-1]
    if b:
        c.unify(b[0], w[0])
    return (*x[:-1], w[0])


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(c: RuleContext) -> Dims:
    """a[…, m, k] · b[…, k, n], batch dimensions broadcast."""
    names = list(c.arguments)[:2]
    a, b = (c.dims(c.get(n)) for n in names)
    return _product(c, names[0], names[1], a, b)


@rule("addmm", "baddbmm")
def addmm(c: RuleContext) -> Dims:
    """bias + a · b."""
    names = ["mat1", "mat2"] if "mat1" in c.arguments else ["batch1", "batch2"]
    result = _product(c, names[0], names[1], c.dims(c.get(names[0])), c.dims(c.get(names[1])))
    return c.broadcast(result, c.dims(c.get("self")))


def _product(c: RuleContext, left: str, right: str, a: Dims, b: Dims) -> Dims:
    row, column = a[-1], b[-2] if len(b) > 1 else b[-1]
    c.unify(row, column)
    sizes = c.sizes()
    free = (len(a) > 1) + (len(b) > 1)
    batch = c.broadcast(a[:-2], b[:-2], sizes=sizes[: len(sizes) - free])
    c.contract(left, len(a) - 1, right)
    if {c.operand(left), c.operand(right)} <= c.facts.learned:
        _activations(c, batch, row, b[-1] if len(b) > 1 else None)
    return (*batch, *([a[-2]] if len(a) > 1 else []), *([b[-1]] if len(b) > 1 else []))


def _activations(c: RuleContext, batch: Dims, contracted: Axis, free: Axis | None) -> None:
    """A product of two activations is attention written out: scores, or weighted values.

    Both are made of weights: a graph's adjacency, which is an input, mixes nodes and is none.
    """
    for axis in batch:
        c.attention("head", axis)
    c.attention("qk_dim", contracted)
    if free is not None:
        c.attention("v_dim", free)


@rule("einsum")
def einsum(c: RuleContext) -> Dims:
    """One letter, one axis; letters that vanish are contracted."""
    equation = str(c.get("equation")).replace(" ", "")
    tensors = c.get("tensors")
    inputs, arrow, output = equation.partition("->")
    terms = _spelled_out(inputs.split(","), [len(c.dims(t)) for t in tensors])
    output = _spelled_out([output], [len(c.sizes())])[0]
    if not arrow or any(len(set(t)) != len(t) for t in terms):
        result: Dims = c.unknown()
        return result
    letters: dict[str, Axis] = {}
    for term, tensor in zip(terms, tensors, strict=True):
        for letter, axis in zip(term, c.dims(tensor), strict=True):
            if letter not in letters or letters[letter].size == 1:
                letters[letter] = axis
            elif axis.size != 1:
                c.unify(letters[letter], axis)
    for letter in letters:
        if letter not in output:
            owners = [i for i, term in enumerate(terms) if letter in term]
            # A size-1 operand is broadcast over the letter: the mask belongs on another one.
            sizes = {i: c.dims(tensors[i])[terms[i].index(letter)].size for i in owners}
            owners.sort(key=lambda i: sizes[i] == 1)
            other = f"tensors:{owners[1]}" if len(owners) > 1 else None
            first = owners[0]
            c.contract(f"tensors:{first}", terms[first].index(letter), other)
    if len(terms) == 2 and {c.operand("tensors:0"), c.operand("tensors:1")} <= c.facts.learned:
        for letter in output:
            c.attention("head" if all(letter in t for t in terms) else "v_dim", letters[letter])
        for letter in set("".join(terms)) - set(output):
            c.attention("qk_dim", letters[letter])
    return tuple(letters[letter] for letter in output)


def _spelled_out(terms: list[str], ranks: list[int]) -> list[str]:
    """Replace an ellipsis by letters of its own, aligned from the right."""
    result = []
    for term, rank in zip(terms, ranks, strict=True):
        hidden = rank - len(term.replace("...", ""))
        letters = "".join(chr(0x3B1 + i) for i in reversed(range(hidden)))
        result.append(term.replace("...", letters))
    return result


@rule("grouped_mm")
def grouped_mm(c: RuleContext) -> Dims:
    """x[t, k] · w[e, k, n], rows of x belonging to group e up to offs[e]."""
    x, w, offsets = (c.dims(c.node.args[i]) for i in range(3))
    names = list(c.arguments)
    c.unify(x[-1], w[-2])
    c.contract(names[0], len(x) - 1, names[1])
    c.unify(w[0], offsets[0])
    c.freeze(w[0], "tokens are routed over it by")
    c.facts.experts.append(w[0])
    return (*x[:-1], w[-1])


@rule("conv1d", "conv2d", "conv3d", "convolution")
def convolution(c: RuleContext) -> Dims:
    """Channels in contract, channels out are the weight's; groups are an outer factor of both."""
    x, w, b = c.dims(c.get("input")), c.dims(c.get("weight")), c.dims(c.get("bias"))
    if c.get("transposed"):
        return transposed_convolution(c)
    groups, rank = int(c.get("groups", 1)), len(w) - 2
    channels = len(x) - rank - 1
    c.freeze(w[2:], "a kernel's side at")
    c.freeze(x[channels + 1 :], "a position at")
    if groups == 1:
        c.unify(x[channels], w[1])
        out = w[0]
        c.contract("input", channels, "weight")
    else:
        group = algebra.leaf(groups)
        c.remember(groups=group)
        c.unify(x[channels], algebra.product([group, w[1]]))
        out = w[0]
        c.unify(out, algebra.product([group, algebra.leaf(out.size // groups)]))
        if w[1].size != 1:
            c.contract("input", channels, "weight")
    if b:
        c.unify(b[0], out)
    positions = c.fresh()[channels + 1 :]
    c.freeze(positions, "a position at")
    return (*x[:channels], out, *positions)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(c: RuleContext) -> Dims:
    """As a convolution, with the weight's first two dimensions the other way round.

    Of g groups the weight is [g × in, out], and the result has g × out channels.
    """
    x, w, b = c.dims(c.get("input")), c.dims(c.get("weight")), c.dims(c.get("bias"))
    groups, channels = int(c.get("groups", 1)), len(x) - len(w) + 1
    positions = c.fresh()[channels + 1 :]
    for axis in (*w[2:], *x[channels + 1 :], *positions):
        c.freeze(axis, "a position at")
    c.unify(x[channels], w[0])
    out = w[1]
    if groups > 1:
        group = algebra.leaf(groups)
        c.remember(groups=group)
        c.unify(w[0], algebra.product([group, algebra.leaf(w[0].size // groups)]))
        out = algebra.product([group, w[1]])
    if w[0].size != groups:
        c.contract("input", channels, "weight")
    if b:
        c.unify(b[0], out)
    return (*x[:channels], out, *positions)


@rewriter("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d",
          "conv_transpose3d")  # fmt: skip
def resize_groups(r: RewriteContext) -> None:
    groups = r.extra("groups")
    if groups is not None and r.changed(groups):
        r.set(groups=r.static_size(groups))


@rule("bilinear")
def bilinear(c: RuleContext) -> Dims:
    """x[..., i] · w[n, i, j] · y[..., j] + b[n]."""
    x, y = c.dims(c.get("input1")), c.dims(c.get("input2"))
    w, b = c.dims(c.get("weight")), c.dims(c.get("bias"))
    for slot, dims, side in (("input1", x, w[1]), ("input2", y, w[2])):
        c.unify(dims[-1], side)
        c.contract(slot, len(dims) - 1, "weight")
    for one, other in zip(x[:-1], y[:-1], strict=True):
        c.unify(one, other)
    if b:
        c.unify(b[0], w[0])
    return (*x[:-1], w[0])


@rule("cdist")
def distances(c: RuleContext) -> Dims:
    """|x[..., m, k] - y[..., n, k]| of any order: where both are zero they are not apart."""
    x, y = c.dims(c.get("x1")), c.dims(c.get("x2"))
    batch = c.broadcast(x[:-2], y[:-2], sizes=c.sizes()[:-2])
    c.unify(x[-1], y[-1])
    c.contract("x1", len(x) - 1, "x2")
    c.contract("x2", len(y) - 1, "x1")
    return (*batch, x[-2], y[-2])


@rule("scaled_dot_product_attention")
def attention(c: RuleContext) -> Dims:
    """softmax(q · kᵀ · scale + mask) · v, per head; softmax freezes the key positions."""
    q, k, v = (c.dims(c.get(n)) for n in ("query", "key", "value"))
    mask = c.dims(c.get("attn_mask"))
    c.unify(q[-1], k[-1])
    c.unify(k[-2], v[-2])
    c.freeze(k[-2], "softmax over it in")
    if c.get("is_causal"):
        c.freeze(q[-2], "ordered in time by")
    batch = _heads(c, q, k, v)
    c.contract("query", len(q) - 1, "key")
    c.attention("qk_dim", q[-1])
    c.attention("v_dim", v[-1])
    for axis in batch:
        c.attention("head", axis)
    if mask:
        sizes = (*(a.size for a in batch), q[-2].size, k[-2].size)
        c.broadcast((*batch, q[-2], k[-2]), mask, sizes=sizes)
    return (*batch, q[-2], v[-1])


def _heads(c: RuleContext, q: Dims, k: Dims, v: Dims) -> Dims:
    if not c.get("enable_gqa"):
        sizes = c.sizes()[:-2]
        return c.broadcast(q[:-2], k[:-2], v[:-2], sizes=sizes)
    c.broadcast(q[:-3], k[:-3], v[:-3], sizes=[a.size for a in q[:-3]])
    c.unify(k[-3], v[-3])
    repeats = algebra.divide(q[-3].size, k[-3].size)
    c.unify(q[-3], algebra.product([k[-3], algebra.leaf(repeats)]))
    return q[:-2]


@rewriter("scaled_dot_product_attention")
def pin_scale(r: RewriteContext) -> None:
    """The default scale is 1/√(head dim): keep that of the old head dim."""
    axis = r.dims(r.get("query"))[-1]
    if r.changed(axis) and r.get("scale") is None:
        r.set(scale=1.0 / math.sqrt(int(axis.size)))
