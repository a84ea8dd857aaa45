"""Attention of any shape as matmul and softmax, with torch's meaning of rows that see nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from graphprune.ir.graph import bound_arguments, value_of

_aten = torch.ops.aten


def spell_out(node: fx.Node) -> None:
    """Replace a scaled_dot_product_attention; the caller has set the graph's insertion point."""
    call: Callable[..., fx.Node] = node.graph.call_function
    a = bound_arguments(node)
    query, key, value, mask = (a[n] for n in ("query", "key", "value", "attn_mask"))
    shape = value_of(query).shape
    scale = a["scale"] if a["scale"] is not None else 1 / math.sqrt(int(shape[-1]))
    if a["enable_gqa"]:
        times = int(shape[-3]) // int(value_of(key).shape[-3])
        key, value = (call(_aten.repeat_interleave.self_int, (x, times, -3)) for x in (key, value))
    scores = call(_aten.matmul.default, (query, call(_aten.transpose.int, (key, -2, -1))))
    scores = call(_aten.mul.Tensor, (scores, scale))
    if a["is_causal"]:
        length, positions = (call(_aten.sym_size.int, (x, -2)) for x in (query, key))
        ones = call(_aten.ones.default, ([length, positions],), {"dtype": torch.bool})
        mask = call(_aten.tril.default, (ones,))
        scores = call(_aten.where.ScalarOther, (mask, scores, -math.inf))
    elif mask is not None and value_of(mask).dtype is torch.bool:
        scores = call(_aten.where.ScalarOther, (mask, scores, -math.inf))
    elif mask is not None:
        scores = call(_aten.add.Tensor, (scores, mask))
    weights = call(_aten.softmax.int, (scores, -1))
    if mask is not None:
        top = call(_aten.amax.default, (scores, [-1], True))
        unseen = call(_aten.eq.Scalar, (top, -math.inf))
        weights = call(_aten.where.ScalarSelf, (unseen, 0.0, weights))
    result = call(_aten.matmul.default, (weights, value))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
