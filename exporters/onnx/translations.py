"""ONNX for the operators that torch.onnx does not know, or does not know well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import graphprune.exporters.onnx.operators
import graphprune.ir.operators  # noqa: F401  (both register the operators translated here)
from graphprune.exporters.onnx.recurrent import onnx_layer

OPSET = 23  # the first with Attention and RMSNormalization


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the custom_translation_table of torch.onnx.export."""
    return {
        torch.ops.graphprune.attention.default: _attention,
        torch.ops.graphprune.cached_attention.default: _cached_attention,
        torch.ops.graphprune.grouped_mm.default: _grouped_mm,
        torch.ops.graphprune.recurrent_layer.default: onnx_layer(_op()),
        torch.ops.aten.histc.default: _histc,
    }


def _op() -> Any:
    from onnxscript import opset23

    return opset23


def _attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    heads: int,
    kv_heads: int,
    scale: float,
    is_causal: bool,
) -> Any:
    # With four dimensions the heads are read off the shapes, and the attributes must be absent.
    counts = {"q_num_heads": heads, "kv_num_heads": kv_heads} if len(query.shape) == 3 else {}
    return _op().Attention(
        query, key, value, bias, scale=scale, is_causal=int(is_causal), **counts
    )[0]


def _cached_attention(
    query: Any,
    key: Any,
    value: Any,
    past_key: Any,
    past_value: Any,
    bias: Any,
    heads: int,
    kv_heads: int,
    scale: float,
) -> Any:
    counts = {"q_num_heads": heads, "kv_num_heads": kv_heads} if len(query.shape) == 3 else {}
    results = _op().Attention(query, key, value, bias, past_key, past_value, scale=scale, **counts)
    return results[0], results[1], results[2]


def _ints(*values: int) -> Any:
    return _op().Constant(value_ints=list(values))


def _grouped_mm(input: Any, weight: Any, offs: Any) -> Any:
    """One Slice and one MatMul a group; ONNX has no grouped matmul. Rows after the last are 0."""
    op = _op()
    ends = op.Cast(offs, to=7)  # INT64
    start = _ints(0)
    parts = []
    for group in range(weight.shape[0]):
        end = op.Slice(ends, _ints(group), _ints(group + 1), _ints(0))
        rows = op.Slice(input, start, end, _ints(0))
        parts.append(op.MatMul(rows, op.Gather(weight, op.Constant(value_int=group), axis=0)))
        start = end
    rest = op.Sub(op.Shape(input, start=0, end=1), start)
    zero = op.Cast(op.Constant(value_float=0.0), to=int(weight.dtype))
    parts.append(op.Expand(zero, op.Concat(rest, _ints(int(weight.shape[2])), axis=0)))
    return op.Concat(*parts, axis=0)


def _histc(self: Any, bins: int = 100, min: float = 0.0, max: float = 0.0) -> Any:
    """Counts in equal bins between min and max; the last bin holds its right end too."""
    if min == max:
        raise NotImplementedError("histc over the range of its values")
    op = _op()
    as_float: Callable[[float], Any] = lambda x: op.Constant(value_float=float(x))  # noqa: E731
    x = op.Reshape(op.Cast(self, to=1), _ints(-1, 1))
    place = op.Floor(op.Mul(op.Div(op.Sub(x, as_float(min)), as_float(max - min)), as_float(bins)))
    place = op.Where(op.Equal(x, as_float(max)), as_float(bins - 1), place)
    hit = op.Equal(place, op.Constant(value_floats=[float(i) for i in range(bins)]))
    return op.CastLike(op.ReduceSum(op.Cast(hit, to=1), _ints(0), keepdims=0), self)
