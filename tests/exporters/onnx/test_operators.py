"""Attention as ONNX has it, against softmax(q k' scale + bias) v written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphprune.exporters.onnx.operators import attention, cached_attention

HEADS, KV_HEADS, WIDTH, VALUE_WIDTH, SCALE = 4, 2, 3, 5, 0.7


def by_hand(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool
) -> Tensor:
    """[batch, heads, length, width]; every head by itself."""
    heads = []
    for h in range(query.shape[1]):
        k, v = (x[:, h // (HEADS // KV_HEADS)] for x in (key, value))
        scores = query[:, h] @ k.transpose(1, 2) * SCALE
        if bias is not None:
            scores = scores + bias[:, h if bias.shape[1] > 1 else 0]
        if is_causal:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        heads.append(scores.softmax(-1) @ v)
    return torch.stack(heads, 1)


def drawn(length: int, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, HEADS, length, WIDTH),
        torch.randn(2, KV_HEADS, positions, WIDTH),
        torch.randn(2, KV_HEADS, positions, VALUE_WIDTH),
    )


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    ("bias_heads", "is_causal"), [(None, False), (None, True), (1, False), (HEADS, False)]
)
def test_attention_is_its_formula(together: bool, bias_heads: int | None, is_causal: bool) -> None:
    q, k, v = drawn(6, 6)
    bias = None if bias_heads is None else torch.randn(1, bias_heads, 6, 6)
    expected = by_hand(q, k, v, bias, is_causal)
    if together:
        q, k, v, expected = map(joined, (q, k, v, expected))
    found = attention(q, k, v, bias, HEADS, KV_HEADS, SCALE, is_causal)
    torch.testing.assert_close(found, expected)
    fake = attention(*(x.to("meta") for x in (q, k, v)), None, HEADS, KV_HEADS, SCALE, is_causal)
    assert fake.shape == found.shape


@pytest.mark.parametrize("together", [True, False])
def test_a_cache_comes_first_and_goes_on(together: bool) -> None:
    """What a prompt and its continuation give is what both at once give."""
    q, k, v = drawn(6, 6)
    bias = torch.randn(2, 1, 6, 6)
    expected = by_hand(q, k, v, bias, False)[:, :, 4:]
    new = [x[:, :, 4:] for x in (q, k, v)]
    if together:
        new, expected = [joined(x) for x in new], joined(expected)
    past = k[:, :, :4], v[:, :, :4]
    options = (bias[:, :, 4:], HEADS, KV_HEADS, SCALE)
    found, key, value = cached_attention(*new, *past, *options)
    torch.testing.assert_close(found, expected)
    assert torch.equal(key, k)
    assert torch.equal(value, v)
    fakes = cached_attention(*(x.to("meta") for x in (*new, *past)), None, *options[1:])
    assert [x.shape for x in fakes] == [found.shape, key.shape, value.shape]
