"""graphprune::attention and ::cached_attention: as the ONNX operator Attention computes them.

Lowering writes them; they live only between a Program and the ONNX file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("graphprune::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """softmax(query key' scale + bias) value, heads side by side or in a dimension of their own.

    Args:
        query: [batch, length, heads x width], or [batch, heads, length, width]; the result too.
        key: as many dimensions as the query, with `kv_heads` heads; shared by heads / kv_heads.
        value: like the key; its width may differ.
        bias: added to the scores, finite, [batch or 1, heads or 1, length, positions].
        is_causal: position i sees the positions up to i.
    """
    split = query.dim() == 3
    if split:
        query, key, value = (
            torch.unflatten(x, 2, (n, -1)).transpose(1, 2)
            for x, n in ((query, heads), (key, kv_heads), (value, kv_heads))
        )
    key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    result = F.scaled_dot_product_attention(
        query, key, value, bias, is_causal=is_causal, scale=scale
    )
    return (result.transpose(1, 2).flatten(2) if split else result).clone()


@attention.register_fake
def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    is_causal: bool,
) -> Tensor:
    if query.dim() == 3:
        return query.new_empty(*query.shape[:2], value.shape[2] // kv_heads * heads)
    return query.new_empty(*query.shape[:3], value.shape[3])


@torch.library.custom_op("graphprune::cached_attention", mutates_args=())
def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    bias: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Like `attention`, over keys and values that come after those of the past.

    Args:
        query: as for `attention`; key, value, bias, heads, kv_heads and scale too.
        past_key: [batch, kv_heads, past, width], however the key comes; past_value likewise.

    Returns:
        The result, and the keys and values of past and present, in the form of the past.
    """
    split = query.dim() == 3
    if split:
        query, key, value = (
            torch.unflatten(x, 2, (n, -1)).transpose(1, 2)
            for x, n in ((query, heads), (key, kv_heads), (value, kv_heads))
        )
    key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    result = F.scaled_dot_product_attention(query, k, v, bias, scale=scale)
    return (result.transpose(1, 2).flatten(2) if split else result).clone(), key, value


@cached_attention.register_fake
def _fake_cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    bias: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    present = [
        x.new_empty(*x.shape[:2], x.shape[2] + key.shape[-2], x.shape[3])
        for x in (past_key, past_value)
    ]
    last = past_value.shape[3] * heads if query.dim() == 3 else past_value.shape[3]
    return query.new_empty(*query.shape[:-1], last), present[0], present[1]
