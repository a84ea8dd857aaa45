"""Lower every scaled_dot_product_attention of a graph to graphprune::attention.

ONNX Runtime's CPU kernels, six layers of width 384 at 1 x 128 tokens on one thread, attention only:
MatMul + Softmax 1.8 ms, com.microsoft.MultiHeadAttention 1.7 ms, Attention-23 1.1 ms (1.31;
`python -m benchmarks.attention`). So Attention-23 is used, with three changes around it:

1. heads stay side by side, [batch, length, heads x width], where the graph only splits them for
   the attention: four transposes and their reshapes disappear;
2. the mask becomes one finite bias, built once for all layers that share it; rows that see
   nothing become 0, as in torch, by a product after the attention (a -inf row would give NaN);
3. key and value heads that the graph repeats for grouped queries are not repeated.

Keys and values that the graph appends to a cache go into the operator beside their past, and come
out of it appended. In a decode step of 30 layers, 9 heads on 3, attention is little: on one thread
all forms lie within 3 % at 128 tokens of past (`python -m benchmarks.decode`). At 2,048, appending
outside takes as long, MatMul + Softmax over grouped heads 7 % less, but it is slower in prompts;
com.microsoft.GroupQueryAttention 16 % more, and it refuses several new tokens on top of a past in a
batch above one. MultiHeadAttention knows no grouped queries: repeating heads for it costs 12 % at
128 already.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import fx

import graphprune.exporters.onnx.operators  # noqa: F401  (registers graphprune::attention)
from graphprune.exporters.onnx.masks import Biases
from graphprune.exporters.onnx.patterns import heads_together, rejoined, same, shared, unchanged
from graphprune.exporters.onnx.plain_attention import spell_out
from graphprune.ir.graph import bound_arguments, is_op, output_node, value_of

_aten = torch.ops.aten
_CACHED = torch.ops.graphprune.cached_attention.default
_SDPA = _aten.scaled_dot_product_attention.default


def lower_attention(graph: fx.Graph) -> int:
    """Rewrite a graph with fresh metadata in place; returns how many attentions ORT's kernel gets.

    Others (not four dimensions, heads of unknown number, broadcast batches) become MatMul and
    Softmax.
    """
    biases = Biases(graph)
    fused = 0
    for node in list(graph.nodes):
        if node.target is not _SDPA:
            continue
        with graph.inserting_before(node):
            if _fusible(node):
                _lower(node, biases)
                fused += 1
            else:
                spell_out(node)
    return fused


def _fusible(node: fx.Node) -> bool:
    a = bound_arguments(node)
    query, key, value = (value_of(a[n]) for n in ("query", "key", "value"))
    if not query.dim() == key.dim() == value.dim() == 4 or query.dtype is not torch.float32:
        return False
    heads, kv_heads = query.shape[1], key.shape[1]
    return (
        all(isinstance(n, int) for n in (heads, kv_heads, query.shape[3], value.shape[3]))
        and same(query.shape[:1], key.shape[:1])
        and same(key.shape[:3], value.shape[:3])
        and heads % kv_heads == 0
        and (a["attn_mask"] is None or value_of(a["attn_mask"]).dim() in (2, 3, 4))
    )


def _lower(node: fx.Node, biases: Biases) -> None:
    a = bound_arguments(node)
    query, (key, value) = unchanged(a["query"]), shared(a["key"], a["value"])
    shape = value_of(a["query"]).shape
    heads, kv_heads, width = shape[1], value_of(key).shape[1], value_of(value).shape[3]
    scale = a["scale"] if a["scale"] is not None else 1 / math.sqrt(shape[3])
    bias, alive = biases.of(a["attn_mask"], a["query"], a["key"])
    call: Callable[..., fx.Node] = node.graph.call_function
    attention = torch.ops.graphprune.attention.default
    pasts = None if a["is_causal"] else _pasts(key, value)
    cached: tuple[fx.Node, ...] = ()
    if pasts is not None:
        cached, (key, value) = pasts
    flat = [heads_together(x) for x in (query, key, value)]

    def attend(*operands: fx.Node) -> fx.Node:
        rest = (bias, heads, kv_heads, float(scale))
        if not cached:
            return call(attention, (*operands, *rest, bool(a["is_causal"])))
        results = call(_CACHED, (*operands, *cached, *rest))
        first, *present = (call(operator.getitem, (results, i)) for i in range(3))
        _hand_out(node.graph, cached, present)
        return first

    if any(x is None for x in flat):
        result = attend(query, key, value)
        if alive is not None:
            result = call(_aten.mul.Tensor, (result, alive))
        node.replace_all_uses_with(result)
        result.meta = dict(node.meta)
        return
    # The chain of users that puts heads together again is met by a result that never split them.
    together = attend(*(x() for x in flat if x is not None))
    if alive is not None:
        together = _silence(together, alive, heads, width)
    apart = call(_aten.unflatten.int, (together, 2, [heads, width]))
    split = call(_aten.transpose.int, (apart, 1, 2))
    split.meta = dict(node.meta)
    node.replace_all_uses_with(split)
    for user in rejoined(split):
        user.replace_all_uses_with(together)
        together.meta = dict(user.meta)


def _pasts(
    key: fx.Node, value: fx.Node
) -> tuple[tuple[fx.Node, fx.Node], tuple[fx.Node, fx.Node]] | None:
    """(past key, past value), (new key, new value), where both are appended to an input."""
    parts = []
    for node in (key, value):
        if not is_op(node, "cat") or bound_arguments(node).get("dim") not in (2, -2):
            return None
        tensors = bound_arguments(node)["tensors"]
        if len(tensors) != 2 or tensors[0].op != "placeholder":
            return None
        parts.append(tensors)
    (past_key, new_key), (past_value, new_value) = parts
    return (past_key, past_value), (unchanged(new_key), unchanged(new_value))


def _hand_out(graph: fx.Graph, pasts: Sequence[fx.Node], present: Sequence[fx.Node]) -> None:
    """Let the graph's outputs come from the operator where it appended to the cache itself."""
    output = output_node(graph)
    for past, new in zip(pasts, present, strict=True):
        for user in past.users:
            if is_op(user, "cat") and output in user.users:
                output.replace_input_with(user, new)
                break


def _silence(together: fx.Node, alive: fx.Node, heads: int, width: int) -> fx.Node:
    """Rows that see nothing become 0; alive is [batch or 1, heads or 1, length, 1]."""
    call = together.graph.call_function
    if value_of(alive).shape[1] == 1:
        return call(_aten.mul.Tensor, (together, call(_aten.squeeze.dim, (alive, 1))))
    apart = call(_aten.unflatten.int, (together, 2, [heads, width]))
    rows = call(_aten.transpose.int, (alive, 1, 2))
    return call(_aten.flatten.using_ints, (call(_aten.mul.Tensor, (apart, rows)), 2, 3))
