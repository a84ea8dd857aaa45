"""Rewrite a finished decode graph for runtimes that keep past and present in one buffer.

    Attention(q, k, v, bias, past_key, past_value)
        ->  com.microsoft.GroupQueryAttention(q, k, v, past_key, past_value, seqlens_k,
                                              total_sequence_length, "", "", "", bias)

Such a runtime hands in a cache as long as the longest text, and expects the new keys and values to
be written into it: nothing is copied from step to step. So the shape of the cache no longer says
how much has been read. The mask does, as [batch, past + new]:

1. wherever the graph asks for the length of the past, it is that of the mask less that of the ids;
2. seqlens_k, which is past + new - 1, and total_sequence_length are made once for all layers;
3. the bias of the mask stays, over past + new positions. The operator alone would look at
   seqlens_k, and see padding on the left as tokens; with the bias, padding may be on either side.

A cache just as long as the past works as well; the operator then gives back a longer one.

The operator refuses one thing that Attention does: several new tokens on top of a past, in a batch
above one. Prompts and single tokens of any batch are what generation feeds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from graphprune.errors import ExportError
from graphprune.exporters.onnx.opset20 import (
    CONTRIB,
    constant,
    head_count,
    heads_apart,
    heads_together,
    is_op,
)
from graphprune.ir.decoding import IDS, MASK, is_past

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphprune.ir.program import Entry

_WIDTH = 8  # the operator takes heads of multiples of it


def check_cache(target: str, entry: Entry) -> None:
    """Refuse, before any work, a cache that the operator does not take.

    Args:
        target: the target that needs the operator.
        entry: what is exported.

    Raises:
        ExportError: there is none, keys and values of a layer differ in shape, or their width is no
            multiple of 8.
    """
    if not entry.cache:
        raise ExportError(
            f"target {target!r} needs a decoder with a key/value cache: compile(..., cache=True), "
            "on the command line --cache"
        )
    given = dict(zip(entry.input_names, entry.example, strict=True))
    names = list(entry.cache)
    for number, (key, value) in enumerate(zip(names[::2], names[1::2], strict=True)):
        heads, values = (given[name].shape for name in (key, value))
        if heads != values:
            raise ExportError(
                f"target {target!r} takes keys and values of one width; in layer {number} they "
                f"are {heads[3]} and {values[3]} wide: prune both alike, or omit target"
            )
        if heads[3] % _WIDTH:
            raise ExportError(
                f"target {target!r} takes heads as wide as a multiple of {_WIDTH}; those of layer "
                f"{number} are {heads[3]} wide: omit target"
            )


def to_grouped(model: ir.Model) -> None:
    """Rewrite in place a decode graph, which has token ids, their mask and a cache.

    Raises:
        ExportError: a part of the cache is read by anything but one attention; it is named.
    """
    graph = model.graph
    pasts = [value for value in graph.inputs if is_past(value.name or "")]
    attentions = [_reader(past) for past in pasts]
    sizes = _Sizes(graph)
    for past in pasts:
        for node in [use.node for use in past.uses() if is_op(use.node, "Shape")]:
            sizes.replace(node)
    for node in dict.fromkeys(attentions):
        _replace(graph, node, sizes)
    model.opset_imports[CONTRIB] = 1


def _reader(past: ir.Value) -> ir.Node:
    """The attention that appends to a part of the cache, and that nothing else reads."""
    readers = [use.node for use in past.uses() if not is_op(use.node, "Shape")]
    for node in readers:
        appended = any(value.uses() for value in node.outputs[1:])
        if len(readers) > 1 or appended or not is_op(node, "Attention"):
            raise ExportError(
                f"{past.name!r} is read by {node.op_type} at {node.name!r}, so that its length "
                "cannot be another one than the past's: omit target"
            )
    if not readers:
        raise ExportError(f"{past.name!r} is read by no attention: omit target")
    return readers[0]


class _Sizes:
    """Lengths of past and new tokens, from ids and mask; computed once, at the graph's start.

    Attributes:
        seqlens_k: int32 [batch], past + new - 1.
        total: int32 [1], past + new.
    """

    def __init__(self, graph: ir.Graph) -> None:
        import onnx_ir as ir

        self._graph, self._first = graph, graph[0]
        inputs = {value.name: value for value in graph.inputs}
        self._batch = self._size(inputs[IDS], 0)
        total, new = self._size(inputs[MASK], 1), self._size(inputs[IDS], 1)
        self._past = self._add(ir.node("Sub", [total, new]))
        one = self._add(constant(np.array([1], dtype=np.int64)))
        last = self._add(ir.node("Sub", [total, one]))
        lasts = self._add(ir.node("Expand", [last, self._batch]))
        as_int32 = {"to": ir.DataType.INT32}
        self.seqlens_k = self._add(ir.node("Cast", [lasts], as_int32))
        self.total = self._add(ir.node("Cast", [total], as_int32))

    def replace(self, node: ir.Node) -> None:
        """Let a Shape of a cache say what it would where the cache is as long as the past."""
        import onnx_ir as ir

        (past,) = node.inputs
        assert past is not None
        assert past.shape is not None
        known = {0: self._batch, 2: self._past}
        dims = range(4)[node.attributes.get_int("start", 0) : node.attributes.get_int("end", 4)]
        asked = [
            known[d]
            if d in known
            else self._add(constant(np.array([past.shape[d]], dtype=np.int64)))
            for d in dims
        ]
        new = asked[0] if len(asked) == 1 else self._add(ir.node("Concat", asked, {"axis": 0}))
        node.outputs[0].replace_all_uses_with(new)
        self._graph.remove(node, safe=True)

    def _size(self, value: ir.Value, dim: int) -> ir.Value:
        import onnx_ir as ir

        return self._add(ir.node("Shape", [value], {"start": dim, "end": dim + 1}))

    def _add(self, node: ir.Node) -> ir.Value:
        self._graph.insert_before(self._first, [node])
        return node.outputs[0]


def _replace(graph: ir.Graph, node: ir.Node, sizes: _Sizes) -> None:
    """Put GroupQueryAttention in the place of an Attention with a cache."""
    import onnx_ir as ir

    query, key, value, bias, *pasts = node.inputs
    assert query is not None
    heads, kv_heads = head_count(node, 0), head_count(node, 1)
    apart = "q_num_heads" not in node.attributes
    new: list[ir.Node] = []
    operands = [query, key, value]
    if apart:
        together = [heads_together(operand) for operand in operands if operand is not None]
        new += [step for steps in together for step in steps]
        operands = [steps[-1].outputs[0] for steps in together]
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 0}
    scale = node.attributes.get_float("scale", None)
    grouped = ir.node(
        "GroupQueryAttention",
        [*operands, *pasts[:2], sizes.seqlens_k, sizes.total, None, None, None, bias],
        {**attributes, **({} if scale is None else {"scale": scale})},
        domain=CONTRIB,
        num_outputs=3,
        name=node.name,
    )
    new.append(grouped)
    if apart:
        new += heads_apart(grouped.outputs[0], heads)
    graph.insert_before(node, new)
    made = (new[-1].outputs[0], *grouped.outputs[1:])
    for old, result in zip(node.outputs, made, strict=True):
        result.name, result.shape, result.type = old.name, old.shape, old.type
        old.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
