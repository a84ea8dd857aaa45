"""The measure by which programs are compared.

Every row (last dimension) against its own scale, so that neither a large constant nor one large
column nor masked scores hide an error elsewhere.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

_QUANTILE = 0.9  # of a row's magnitudes: its scale
_SMALL = 1e-3  # of the rows' typical scale: what a row of next to nothing counts as
_TINY = 1e-300


def relative_error(expected: Any, actual: Any) -> float:
    """The largest difference in any row (last dimension), relative to that row's own scale.

    The scale is the 90th percentile of the row's finite magnitudes, at least a thousandth of the
    median over rows. Infinite for another shape, or where finite values, infinities and NaN lie
    elsewhere. What is no float must be equal.
    """
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return 0.0 if expected is actual or expected == actual else math.inf
    if expected.shape != actual.shape:
        return math.inf
    difference, scale = row_errors(expected, actual)
    return float((difference / scale).max()) if difference.numel() else 0.0


def row_errors(expected: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    """Largest difference in each row, and each row's scale; float64 [rows].

    Tensors of one shape. A difference is infinite where one is finite and the other is not, where
    infinities differ, or where what is no float is not equal.
    """
    if not expected.numel():
        return torch.zeros(0, dtype=torch.float64), torch.ones(0, dtype=torch.float64)
    a, b = _rows(expected.detach()), _rows(actual.detach())
    if a.dtype is not b.dtype:
        a, b = a.double(), b.double()
    if not (expected.is_floating_point() or expected.is_complex()):
        difference = torch.where((a != b).any(1), math.inf, 0.0).double()
        return difference, torch.ones_like(difference)
    wide = torch.promote_types(a.dtype, torch.float32)  # differences of near numbers are exact
    a, b = a.to(wide), b.to(wide)
    difference = (a - b).abs_().amax(1)
    finite = None
    if not bool(difference.isfinite().all()):  # else both are finite throughout
        finite = a.isfinite()
        same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(same, 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf).amax(1)
    scale = _quantile(a.abs(), finite).double()
    typical = scale if finite is None else scale[finite.any(1)]
    least = _SMALL * float(typical.median()) if len(typical) else 0.0
    return difference.double().cpu(), scale.clamp_min(max(least, _TINY))


def rounding_of(exact: Tensor, rounded: Tensor) -> Tensor:
    """What each row loses in float32; float64 [rows].

    A row may be exact there by luck, or because a relu cuts it: it counts as the median of those
    that are not. What is finite in one alone counts nothing.
    """
    lost = row_errors(exact, rounded)[0].nan_to_num(0.0, 0.0, 0.0)
    lossy = lost[lost > 0]
    return lost.clamp_min(float(lossy.median())) if len(lossy) else lost


def _rows(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor).flatten(-2)
    return tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)


def _quantile(magnitude: Tensor, finite: Tensor | None) -> Tensor:
    """The percentile of each row over its finite values (None: all are), 0 without any; [rows]."""
    if finite is None or bool(finite.all()):
        # numpy selects five times faster than torch.kthvalue.
        k = int(_QUANTILE * (magnitude.shape[1] - 1))
        return torch.from_numpy(np.partition(magnitude.cpu().numpy(), k, axis=1)[:, k])
    # Others sort to the front as -1.
    order = magnitude.masked_fill(~finite, -1).sort(1).values
    count = finite.sum(1)
    at = magnitude.shape[1] - count + (_QUANTILE * (count - 1).clamp_min(0)).long()
    return order.gather(1, at.clamp_max(magnitude.shape[1] - 1)[:, None])[:, 0].clamp_min(0)
