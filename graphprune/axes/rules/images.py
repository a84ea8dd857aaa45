"""Images and signals: channels that positions are folded into, windows, and sampling."""

from __future__ import annotations

import math

from graphprune.axes import algebra
from graphprune.axes.facts import Dims
from graphprune.axes.rules.context import RewriteContext, RuleContext
from graphprune.axes.rules.registry import rewriter, rule

_POSITION = "a position at"


@rule("im2col")
def im2col(c: RuleContext) -> Dims:
    """Windows of an image: channels × places in the window, and positions."""
    dims, positions = c.dims(c.get("self")), c.fresh()[-1]
    window = algebra.leaf(math.prod(c.get("kernel_size")))
    c.freeze((*dims[-2:], window, positions), _POSITION)
    return (*dims[:-3], algebra.product([dims[-3], window]), positions)


@rule("col2im")
def col2im(c: RuleContext) -> Dims:
    """The image of windows, which are summed where they overlap: each channel for itself."""
    dims, image = c.dims(c.get("self")), c.fresh()
    window = algebra.leaf(math.prod(c.get("kernel_size")))
    c.freeze((*image[-2:], window, dims[-1]), _POSITION)
    c.unify(dims[-2], algebra.product([image[-3], window]))
    return (*dims[:-2], *image[-3:])


@rule("pixel_shuffle")
def pixel_shuffle(c: RuleContext) -> Dims:
    """Channels c × r × r become c channels of an image r times as large."""
    dims, image = c.dims(c.get("self")), c.fresh()
    places = algebra.leaf(int(c.get("upscale_factor")) ** 2)
    c.freeze((*dims[-2:], *image[-2:], places), _POSITION)
    c.unify(dims[-3], algebra.product([image[-3], places]))
    return (*dims[:-3], *image[-3:])


@rule("pixel_unshuffle")
def pixel_unshuffle(c: RuleContext) -> Dims:
    """Channels c of an image become c × r × r of one r times as small."""
    dims, positions = c.dims(c.get("self")), c.fresh()[-2:]
    places = algebra.leaf(int(c.get("downscale_factor")) ** 2)
    c.freeze((*dims[-2:], *positions, places), _POSITION)
    return (*dims[:-3], algebra.product([dims[-3], places]), *positions)


@rule("native_channel_shuffle")
def channel_shuffle(c: RuleContext) -> Dims:
    """Channels g × n become n × g."""
    dims, count = c.dims(c.get("self")), int(c.get("groups"))
    groups, inner = algebra.leaf(count), algebra.leaf(dims[1].size // count)
    c.remember(groups=groups)
    c.unify(dims[1], algebra.product([groups, inner]))
    return (dims[0], algebra.product([inner, groups]), *dims[2:])


@rewriter("native_channel_shuffle")
def resize_channel_shuffle(r: RewriteContext) -> None:
    groups = r.extra("groups")
    if groups is not None and r.changed(groups):
        r.set(groups=r.static_size(groups))


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(c: RuleContext) -> Dims:
    """Values of an image [n, c, ...] at the positions of a grid [n, ..., 2 or 3]."""
    image, grid = c.dims(c.get("input")), c.dims(c.get("grid"))
    c.unify(image[0], grid[0])
    c.freeze((*image[2:], *grid[1:]), _POSITION)
    return (*image[:2], *grid[1:-1])


@rule("affine_grid_generator")
def affine_grid(c: RuleContext) -> Dims:
    """A grid of positions for each map theta [n, 2, 3]; of the size's channels it knows nothing."""
    theta, fresh = c.dims(c.get("theta")), c.fresh()
    c.freeze((*theta[1:], *fresh[1:]), _POSITION)
    return (theta[0], *fresh[1:])


@rule("max_unpool2d", "max_unpool3d")
def max_unpool(c: RuleContext) -> Dims:
    """Values put back where the largest ones were, channel by channel; zeros elsewhere."""
    dims, places, fresh = c.dims(c.get("self")), c.dims(c.get("indices")), c.fresh()
    kept = len(dims) - (3 if c.op == "max_unpool3d" else 2)
    for one, other in zip(dims, places, strict=True):
        c.unify(one, other)
    c.freeze((*dims[kept:], *fresh[kept:]), _POSITION)
    return (*dims[:kept], *fresh[kept:])
