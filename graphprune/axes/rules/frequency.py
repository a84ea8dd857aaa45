"""Fourier transforms, and complex numbers as pairs of real ones."""

from __future__ import annotations

from graphprune.axes import algebra
from graphprune.axes.facts import Dims
from graphprune.axes.rules.context import RuleContext
from graphprune.axes.rules.registry import rule

_ONE = ("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft")
_SEVERAL = (
    *(f"{name}2" for name in _ONE), *(f"{name}n" for name in _ONE), "fft_fftshift", "fft_ifftshift",
)  # fmt: skip


@rule(*_ONE, *_SEVERAL)
def transform(c: RuleContext) -> Dims:
    """Every frequency is made of all values along the dimensions; the others pass."""
    dims, fresh = c.dims(c.node.args[0]), c.fresh()
    name, given = c.op, c.get("dim")
    if given is None:
        lengths = c.get("s")
        count = 1 if name in _ONE else 2 if name.endswith("2") else len(dims)
        given = range(-(len(lengths) if lengths else count), 0)
    over = {int(d) % len(dims) for d in ([given] if isinstance(given, int) else given)}
    c.freeze([axis for d in over for axis in (dims[d], fresh[d])])
    return tuple(fresh[d] if d in over else axis for d, axis in enumerate(dims))


@rule("stft", "istft")
def short_time_transform(c: RuleContext) -> Dims:
    """Each signal of a batch for itself."""
    dims, fresh = c.dims(c.get("self")), c.fresh()
    batched = len(dims) > (1 if c.op == "stft" else 2)
    c.freeze((*dims[batched:], *fresh[batched:], *c.dims(c.get("window"))))
    return (*dims[:batched], *fresh[batched:])


@rule("view_as_complex", "view_as_complex_copy")
def view_as_complex(c: RuleContext) -> Dims:
    """Pairs in the last dimension become one complex number each."""
    dims = c.dims(c.get("self"))
    c.freeze(dims[-1], "real and imaginary parts of")
    return dims[:-1]


@rule("view_as_real", "view_as_real_copy")
def view_as_real(c: RuleContext) -> Dims:
    """Each complex number becomes a pair in a new last dimension."""
    pair = algebra.leaf(2)
    c.freeze(pair, "real and imaginary parts of")
    return (*c.dims(c.get("self")), pair)
