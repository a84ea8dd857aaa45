"""num_logits_to_keep: logits of the last positions alone.

    MatMul(hidden, head)  ->  MatMul(hidden[:, -num_logits_to_keep:], head)

A prompt needs the logits after its last token; those of the others are a product with the whole
vocabulary each. The input is an initializer that may be fed: 0, its value otherwise, keeps all.
So runtimes that do not know it, or look at the inputs that must be fed alone, read all logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from graphprune.exporters.onnx.opset20 import constant
from graphprune.ir.decoding import IDS, KEEP, LOGITS

if TYPE_CHECKING:
    import onnx_ir as ir

_ALL = np.iinfo(np.int64).max
# Position by position, when all but one of their operands are weights or numbers.
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity", "Clip"}


def keep_last_logits(model: ir.Model) -> bool:
    """Add the input to a decode graph; False where the logits are no product of a hidden state."""
    import onnx_ir as ir

    graph = model.graph
    logits = next((value for value in graph.outputs if value.name == LOGITS), None)
    product = None if logits is None or logits.uses() else _product(logits)
    if product is None:
        return False
    hidden = product.inputs[0]
    assert hidden is not None
    ids = next(value for value in graph.inputs if value.name == IDS)
    if hidden.shape is None or ids.shape is None or hidden.shape[:2] != ids.shape[:2]:
        return False
    keep = ir.Value(name=KEEP, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    keep.const_value = ir.tensor(np.array(0, dtype=np.int64), name=KEEP)
    one, end = (constant(np.array([n], dtype=np.int64)) for n in (1, _ALL))
    count = ir.node("Reshape", [keep, one.outputs[0]])
    # From -n on; -0 is the first.
    start = ir.node("Neg", [count.outputs[0]])
    bounds = [start.outputs[0], end.outputs[0], one.outputs[0]]
    last = ir.node("Slice", [hidden, *bounds])
    last.outputs[0].type = hidden.type
    last.outputs[0].shape = ir.Shape([hidden.shape[0], KEEP, hidden.shape[2]])
    graph.insert_before(product, [one, end, count, start, last])
    product.replace_input_with(0, last.outputs[0])
    assert logits is not None
    _rename(product.outputs[0], logits)
    graph.inputs.append(keep)
    graph.register_initializer(keep)
    return True


def _product(value: ir.Value) -> ir.Node | None:
    """The product with the vocabulary, through what scales, shifts or caps its result."""
    node = value.producer()
    if node is None:
        return None
    moving = [v for v in node.inputs if v is not None and not _constant(v)]
    if len(moving) != 1:
        return None
    if node.op_type == "MatMul":
        return node if moving[0] is node.inputs[0] else None
    alone = len(moving[0].uses()) == 1 and not moving[0].is_graph_output()
    return _product(moving[0]) if alone and node.op_type in _ELEMENTWISE else None


def _constant(value: ir.Value) -> bool:
    """Whether a value follows from weights alone."""
    node = value.producer()
    if node is None:
        return value.is_initializer()
    return all(v is None or _constant(v) for v in node.inputs)


def _rename(value: ir.Value, last: ir.Value) -> None:
    """Say of what lies between product and output that its length is another one."""
    import onnx_ir as ir

    while value is not last:
        if value.shape is not None:
            value.shape = ir.Shape([value.shape[0], KEEP, *value.shape[2:]])
        ((node, _),) = value.uses()
        value = node.outputs[0]
