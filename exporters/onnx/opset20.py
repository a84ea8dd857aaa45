"""Rewrite a finished model to opset 20, for ONNX Runtime from 1.21 on (opset 23 needs 1.23).

Of what this exporter writes, two operators keep encoders above opset 20:

    Attention(q, k, v, bias)     ->  com.microsoft.MultiHeadAttention(q, k, v, "", "", bias)
    RMSNormalization(x, scale)   ->  x / Sqrt(ReduceMean(Pow(x, 2)) + epsilon) * scale, which ONNX
                                     Runtime fuses when it loads the file

MultiHeadAttention takes three dimensions, heads side by side; as many key as query heads; and a
finite bias of the query's full length, which `masks` makes already; a causal mask becomes one.
ONNX Runtime 1.20 computes it wrong, without an error, for batches above one with several heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from graphprune.exporters.onnx.masks import LOWEST

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 20
IR_VERSION = 9
CONTRIB = "com.microsoft"


def obstacle(model: ir.Model) -> str:
    """Why a model cannot be written in opset 20; empty where it can."""
    top = set(model.graph)
    for node in _nodes(model.graph):
        if node in top and is_op(node, "Attention"):
            if reason := _attention_obstacle(node):
                return reason
        elif node.domain == "" and not (
            (node in top and is_op(node, "RMSNormalization")) or _exists(node)
        ):
            return f"{node.op_type} at {node.name!r} is not in opset {OPSET}"
    return ""


def to_opset20(model: ir.Model) -> None:
    """Rewrite in place a model that has no `obstacle`."""
    biases: dict[tuple[str, ...], ir.Value] = {}
    for node in list(model.graph):
        if is_op(node, "Attention"):
            _replace(model.graph, node, _attention(node, biases))
        elif is_op(node, "RMSNormalization"):
            _replace(model.graph, node, _rms_norm(node))
    model.opset_imports[""] = OPSET
    if any(node.domain == CONTRIB for node in model.graph):
        model.opset_imports[CONTRIB] = 1
    model.ir_version = IR_VERSION


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes of a graph and of the bodies of its loops and branches."""
    import onnx_ir as ir

    return iter(ir.traversal.RecursiveGraphIterator(graph))


def is_op(node: ir.Node, kind: str) -> bool:
    return node.op_type == kind and node.domain == ""


def _exists(node: ir.Node) -> bool:
    """Whether opset 20 has the operator with these attributes and as many inputs."""
    import onnx

    try:
        schema = onnx.defs.get_schema(node.op_type, OPSET, "")
    except onnx.defs.SchemaError:
        return False
    return set(node.attributes) <= set(schema.attributes) and len(node.inputs) <= schema.max_input


def _attention_obstacle(node: ir.Node) -> str:
    inputs = [value for value in node.inputs if value is not None]
    if len(inputs) > 4 or len(node.outputs) > 1:
        return f"the attention at {node.name!r} has a key/value cache"
    if node.attributes.get_int("is_causal", 0) and len(inputs) > 3:
        return f"the attention at {node.name!r} has a mask and is causal too"
    query, key = (head_count(node, which) for which in (0, 1))
    if query != key:
        return f"the attention at {node.name!r} has {query} query heads and {key} key heads"
    return ""


def head_count(node: ir.Node, which: int) -> int:
    """How many heads the query (0) or the key (1) of an Attention has."""
    count = node.attributes.get_int(f"{'kv' if which else 'q'}_num_heads", None)
    if count is None:
        value = node.inputs[which]
        assert value is not None
        assert value.shape is not None
        count = int(value.shape[1])  # type: ignore[arg-type]
    return count


def _replace(graph: ir.Graph, node: ir.Node, new: list[ir.Node]) -> None:
    """Put nodes in the place of one; the last one's output takes over."""
    result, old = new[-1].outputs[0], node.outputs[0]
    result.name, result.shape, result.type = old.name, old.shape, old.type
    graph.insert_before(node, new)
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _rms_norm(node: ir.Node) -> list[ir.Node]:
    """x / sqrt(mean(x²) + epsilon) * scale, over the dimensions from `axis` on."""
    import onnx_ir as ir

    x, scale = node.inputs
    assert x is not None
    assert x.shape is not None
    first = node.attributes.get_int("axis", -1) % len(x.shape)
    two, least, axes = (
        constant(np.array(value, dtype=kind))
        for value, kind in (
            (2, np.float32),
            (node.attributes.get_float("epsilon", 1e-5), np.float32),
            (range(first, len(x.shape)), np.int64),
        )
    )
    steps = [two, least, axes, ir.node("Pow", [x, two.outputs[0]])]
    steps.append(ir.node("ReduceMean", [steps[-1].outputs[0], axes.outputs[0]]))
    steps.append(ir.node("Add", [steps[-1].outputs[0], least.outputs[0]]))
    steps.append(ir.node("Sqrt", [steps[-1].outputs[0]]))
    steps.append(ir.node("Div", [x, steps[-1].outputs[0]]))
    return [*steps, ir.node("Mul", [steps[-1].outputs[0], scale])]


def _attention(node: ir.Node, biases: dict[tuple[str, ...], ir.Value]) -> list[ir.Node]:
    """MultiHeadAttention, and what it needs before it; causal biases are shared by `biases`."""
    import onnx_ir as ir

    query, key, value = (v for v in node.inputs[:3] if v is not None)
    bias = node.inputs[3] if len(node.inputs) > 3 else None
    apart = "q_num_heads" not in node.attributes
    new: list[ir.Node] = []
    if node.attributes.get_int("is_causal", 0):
        sizes = str(query.name), str(key.name)
        if sizes not in biases:
            new += _causal(query, key, length_at=2 if apart else 1)
            biases[sizes] = new[-1].outputs[0]
        bias = biases[sizes]
    heads = head_count(node, 0)
    if apart:
        together = [heads_together(operand) for operand in (query, key, value)]
        new += [step for steps in together for step in steps]
        query, key, value = (steps[-1].outputs[0] for steps in together)
    scale = node.attributes.get_float("scale", None)
    new.append(
        ir.node(
            "MultiHeadAttention",
            [query, key, value, None, None, bias],
            {"num_heads": heads, **({} if scale is None else {"scale": scale})},
            domain=CONTRIB,
            name=node.name,
        )
    )
    if apart:
        new += heads_apart(new[-1].outputs[0], heads)
    return new


def constant(array: np.ndarray[Any, Any]) -> ir.Node:
    import onnx_ir as ir

    return ir.node("Constant", [], {"value": ir.tensor(array)})


def heads_together(value: ir.Value) -> list[ir.Node]:
    """[batch, heads, length, width] -> [batch, length, heads x width]."""
    import onnx_ir as ir

    moved = ir.node("Transpose", [value], {"perm": [0, 2, 1, 3]})
    shape = constant(np.array([0, 0, -1], dtype=np.int64))
    return [moved, shape, ir.node("Reshape", [moved.outputs[0], shape.outputs[0]])]


def heads_apart(value: ir.Value, heads: int) -> list[ir.Node]:
    """[batch, length, heads x width] -> [batch, heads, length, width]."""
    import onnx_ir as ir

    shape = constant(np.array([0, 0, heads, -1], dtype=np.int64))
    split = ir.node("Reshape", [value, shape.outputs[0]])
    return [shape, split, ir.node("Transpose", [split.outputs[0]], {"perm": [0, 2, 1, 3]})]


def _causal(query: ir.Value, key: ir.Value, length_at: int) -> list[ir.Node]:
    """Nodes that make the bias [1, 1, length, positions] of a causal mask."""
    import onnx_ir as ir

    at = {"start": length_at, "end": length_at + 1}
    sizes = [ir.node("Shape", [x], at) for x in (query, key)]
    ones = constant(np.array([1, 1], dtype=np.int64))
    shape = ir.node("Concat", [n.outputs[0] for n in (ones, *sizes)], {"axis": 0})
    lowest = ir.tensor(np.array([LOWEST], dtype=np.float32))
    filled = ir.node("ConstantOfShape", [shape.outputs[0]], {"value": lowest})
    above = constant(np.array(1, dtype=np.int64))
    cut = ir.node("Trilu", [filled.outputs[0], above.outputs[0]], {"upper": 1})
    return [*sizes, ones, shape, filled, above, cut]
