"""Reductions and normalizations: exact sums, pinned means, statistics, and frozen choices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from graphprune.axes import algebra
from graphprune.axes.algebra import Axis
from graphprune.axes.facts import Dims
from graphprune.axes.rules.context import RewriteContext, RuleContext
from graphprune.axes.rules.registry import rewriter, rule
from graphprune.ir.graph import op_name


def _reduced(c: RuleContext, dims: Dims, over: list[int]) -> Dims:
    keep = bool(c.get("keepdim", False))
    return tuple(
        algebra.leaf(1) if i in over else axis
        for i, axis in enumerate(dims)
        if keep or i not in over
    )


@rule("sum", "mean", "linalg_vector_norm", "norm", "count_nonzero", "any")
def summed(c: RuleContext) -> Dims:
    """A sum over an axis: what is removed adds nothing. The largest magnitude is a norm too."""
    dims = c.dims(c.get("self"))
    over = c.dim_list(len(dims))
    power = c.get("ord", c.get("p", 2))
    if isinstance(power, int | float) and power <= 0:
        c.freeze([dims[i] for i in over])  # a masked zero would count, or win
    for i in over:
        c.contract("self", i)
    return _reduced(c, dims, over)


@rewriter("mean")
def pin_mean(r: RewriteContext) -> None:
    """A mean divides by the size: multiply by new/old, so that it divides by the old one."""
    dims = r.dims(r.get("self"))
    given = r.get("dim")
    over = [int(d) % len(dims) for d in given] if given else range(len(dims))
    ratio = 1.0
    for i in over:
        if r.changed(dims[i]):
            ratio *= r.static_size(dims[i]) / int(dims[i].size)
    if ratio != 1.0:
        r.scale_after(ratio)


@rule("cumsum")
def summed_so_far(c: RuleContext) -> Dims:
    """Sums of all that comes before: what is removed adds nothing to those after it."""
    dims = c.dims(c.get("self"))
    c.contract("self", c.dim(len(dims)))
    return dims


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax", "softmin",
      "cumprod", "logcumsumexp", "flip", "tril", "triu")  # fmt: skip
def ordered(c: RuleContext) -> Dims:
    """Every unit depends on the others along the axis, or on its place."""
    dims = c.dims(c.node.args[0])
    if op_name(c.node) in {"tril", "triu"}:
        c.freeze(dims[-2:])
        return dims
    over = c.dim_list(len(dims), "dims" if "dims" in c.arguments else "dim")
    c.freeze([dims[i] for i in over])
    return dims


@rule("cummax", "cummin")
def extreme_so_far(c: RuleContext) -> list[Dims]:
    """The largest of all that comes before, and its place."""
    dims = c.dims(c.get("self"))
    c.freeze(dims[c.dim(len(dims))])
    return [dims, dims]


@rule("quantile", "nanquantile")
def quantile(c: RuleContext) -> Dims:
    """A choice along an axis, one for each number of `q`, which come first."""
    dims, q = c.dims(c.get("self")), c.dims(c.get("q"))
    given = c.get("dim")
    over = list(range(len(dims))) if given is None else [c.dim(len(dims))]
    c.freeze([dims[i] for i in over])
    c.freeze(q)
    return (*q, *_reduced(c, dims, over))


@rule("amax", "amin", "all", "prod", "logsumexp", "argmax", "argmin")
def chosen(c: RuleContext) -> Dims:
    """A reduction that a removed unit may win."""
    dims = c.dims(c.node.args[0])
    over = c.dim_list(len(dims))
    c.freeze([dims[i] for i in over])
    return _reduced(c, dims, over)


@rule("max", "min")
def extreme(c: RuleContext) -> Dims | list[Dims]:
    """Elementwise against another tensor, or a choice along an axis."""
    dims = c.dims(c.get("self"))
    if c.get("other") is not None:
        return c.broadcast(dims, c.dims(c.get("other")))
    over = c.dim_list(len(dims))
    c.freeze([dims[i] for i in over])
    reduced = _reduced(c, dims, over)
    return [reduced, reduced] if isinstance(c.value, (tuple, list)) else reduced


@rule("topk", "sort", "kthvalue", "mode", "median")
def sorted_(c: RuleContext) -> list[Dims] | Dims:
    """A choice along an axis, with new places along it."""
    dims = c.dims(c.get("self"))
    if not isinstance(c.value, (tuple, list)):
        c.freeze(dims)
        return c.fresh()
    d = c.dim(len(dims), default=-1)
    c.freeze(dims[d])
    outputs = []
    for i in range(len(c.value)):
        fresh = c.fresh(i)
        if len(fresh) != len(dims):  # kthvalue and friends drop the axis
            outputs.append((*dims[:d], *dims[d + 1 :]))
            continue
        c.freeze(fresh[d])
        outputs.append((*dims[:d], fresh[d], *dims[d + 1 :]))
    return outputs


@rule("argsort")
def argsort(c: RuleContext) -> Dims:
    """Places along an axis."""
    dims = c.dims(c.get("self"))
    c.freeze(dims[c.dim(len(dims), default=-1)])
    return dims


@rule("var", "std")
def statistic(c: RuleContext) -> Dims:
    """Statistics over an axis change when units go."""
    dims = c.dims(c.get("self"))
    over = c.dim_list(len(dims))
    for i in over:
        algebra.normalize(dims[i])
    return _reduced(c, dims, over)


@rule("var_mean", "std_mean")
def statistics(c: RuleContext) -> list[Dims]:
    """Two statistics over an axis."""
    dims = statistic(c)
    return [dims, dims]


@rule("layer_norm")
def layer_norm(c: RuleContext) -> Dims:
    """The last dimensions are normalized: removing from them changes mean and variance."""
    dims = c.dims(c.get("input"))
    last = dims[len(dims) - len(c.get("normalized_shape")) :]
    for name in ("weight", "bias"):
        for a, b in zip(last, c.dims(c.get(name)), strict=False):
            c.unify(a, b)
    for axis in last:
        algebra.normalize(axis)
    return dims


@rule("rms_norm")
def rms_norm(c: RuleContext) -> Dims:
    """A mean of squares over the last dimensions: exact once it is rescaled."""
    dims = c.dims(c.get("input"))
    n = len(c.get("normalized_shape"))
    for a, b in zip(dims[len(dims) - n :], c.dims(c.get("weight")), strict=False):
        c.unify(a, b)
    for i in range(len(dims) - n, len(dims)):
        c.contract("input", i)
    return dims


@rewriter("layer_norm")
def resize_layer_norm(r: RewriteContext) -> None:
    shape = r.get("normalized_shape")
    r.set(normalized_shape=r.resize(shape, r.output[len(r.output) - len(shape) :]))


@rewriter("rms_norm")
def rescale_rms_norm(r: RewriteContext) -> None:
    """x / √(Σx²/old + eps) = x / √(Σx²/new + eps·old/new) · √(old/new)."""
    shape = r.get("normalized_shape")
    dims = r.output[len(r.output) - len(shape) :]
    if not any(r.changed(a) for a in dims):
        return
    ratio = math.prod(int(a.size) for a in dims) / math.prod(r.static_size(a) for a in dims)
    eps = r.get("eps")
    if eps is None:
        eps = torch.finfo(r.node.meta["val"].dtype).eps
    r.set(normalized_shape=r.resize(shape, dims), eps=eps * ratio)
    r.scale_after(math.sqrt(ratio))


@rule("group_norm")
def group_norm(c: RuleContext) -> Dims:
    """Groups are exact; inside a group the channels are normalized.

    Channels that come from several inputs, one after the other, may have groups across a border:
    such a group stays, and the others of each input are an axis of their own.
    """
    dims = c.dims(c.get("input"))
    inner = algebra.leaf(dims[1].size // int(c.get("num_groups")))
    channels, groups = _grouped(c, [s.size for s in algebra.segments(dims[1])], inner)
    c.remember(groups=groups)
    c.unify(dims[1], channels)
    for axis in (inner, *dims[2:]):
        algebra.normalize(axis)
    for name in ("weight", "bias"):
        if c.dims(c.get(name)):
            c.unify(dims[1], c.dims(c.get(name))[0])
    return dims


def _grouped(c: RuleContext, sizes: Sequence[int], inner: Axis) -> tuple[Axis, Axis]:
    """Channels as segments of groups × inner, and the groups alone.

    Args:
        c: the call.
        sizes: channels of each input.
        inner: the channels of one group.
    """
    channels: list[Axis] = []
    groups: list[Axis] = []
    shared: list[Axis] = []
    begun = 0  # channels that a group has of the inputs before
    for size in sizes:
        first = min(-begun % inner.size, size)
        if first:
            shared.append(algebra.leaf(first))
            channels.append(shared[-1])
            begun = (begun + first) % inner.size
        whole, begun_here = divmod(size - first, inner.size)
        if whole:
            groups.append(algebra.leaf(whole))
            channels.append(algebra.product([groups[-1], inner]))
        if begun_here:
            shared.append(algebra.leaf(begun_here))
            channels.append(shared[-1])
            groups.append(algebra.leaf(1))
            begun = begun_here
    if shared:
        c.freeze((*shared, inner), "a group has channels of two inputs in")
    return algebra.concat(channels), algebra.concat(groups)


@rewriter("group_norm")
def resize_group_norm(r: RewriteContext) -> None:
    groups = r.extra("groups")
    if groups is not None and r.changed(groups):
        r.set(num_groups=r.static_size(groups))


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "native_batch_norm")
def batch_norm(c: RuleContext) -> Dims | list[Dims]:
    """Per channel, so exact; statistics of the input itself run over all other dimensions."""
    dims = c.dims(c.get("input"))
    if c.get("use_input_stats") or c.get("training") or c.get("running_mean") is None:
        for axis in dims[2:]:
            algebra.normalize(axis)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if c.dims(c.get(name)):
            c.unify(dims[1], c.dims(c.get(name))[0])
    if isinstance(c.value, (tuple, list)):
        return [dims, *(c.fresh(i) for i in range(1, len(c.value)))]
    return dims


_POOLS = (
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_nearest1d", "upsample_linear1d",
    "upsample_bicubic2d", "upsample_nearest3d", "upsample_trilinear3d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa",
)  # fmt: skip


@rule(*_POOLS)
def pool(c: RuleContext) -> Dims:
    """Channels pass; positions are mixed."""
    dims = c.dims(c.node.args[0])
    sides = int("".join(ch for ch in op_name(c.node) if ch.isdigit())[-1])
    kept = len(dims) - sides
    c.freeze(dims[kept:], "a position at")
    fresh = c.fresh()[kept:]
    c.freeze(fresh, "a position at")
    return (*dims[:kept], *fresh)


@rule("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices",
      "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")  # fmt: skip
def pool_with_places(c: RuleContext) -> list[Dims]:
    """The largest values, and where they are: numbers of positions, channel by channel."""
    dims, values = c.dims(c.node.args[0]), c.fresh(0)
    sides = int("".join(ch for ch in op_name(c.node) if ch.isdigit()))
    kept = len(dims) - sides
    c.freeze((*dims[kept:], *values[kept:]), "a position at")
    return [(*dims[:kept], *values[kept:])] * 2


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
      "replication_pad1d", "replication_pad2d", "replication_pad3d")  # fmt: skip
def pad(c: RuleContext) -> Dims:
    """A constant is put before and after an axis; what else is padded or cropped is frozen."""
    dims, fresh = list(c.dims(c.get("self"))), c.fresh()
    amounts = c.static("pad", c.static("padding"))
    constant = op_name(c.node) == "constant_pad_nd" or c.get("mode", "constant") == "constant"
    constant &= op_name(c.node) in {"pad", "constant_pad_nd"}
    for i, axis in enumerate(dims):
        k = 2 * (len(dims) - 1 - i)
        ends = list(amounts[k : k + 2])
        if not any(ends):
            continue
        if constant and min(ends) >= 0 and not c.is_frozen(axis):
            before, after = (algebra.leaf(n) for n in ends)
            c.remember(**{f"before{i}": before, f"after{i}": after})
            dims[i] = algebra.concat([before, axis, after])
        else:
            c.freeze([axis, fresh[i]], "padded by")
            dims[i] = fresh[i]
    return tuple(dims)


@rewriter("pad", "constant_pad_nd")
def resize_pad(r: RewriteContext) -> None:
    amounts, rank = list(r.get("pad")), len(r.output)
    for i in range(rank):
        k = 2 * (rank - 1 - i)
        for end, place in (("before", k), ("after", k + 1)):
            axis = r.extra(f"{end}{i}")
            if axis is not None and r.changed(axis):
                amounts[place] = r.static_size(axis)
    if amounts != list(r.get("pad")):
        r.set(pad=amounts)
