"""Inputs that need not be fed."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir


def make_optional(model: ir.Model, names: Collection[str]) -> None:
    """Give inputs the value zero where they are not fed; names that the model lacks are ignored.

    ONNX's way are initializers that are inputs too: of one element here, which is expanded to the
    shape of another input. An input whose shape no other has stays required.
    """
    import onnx_ir as ir

    graph = model.graph
    for value in [v for v in graph.inputs if v.name in names]:
        like = next(
            (v for v in graph.inputs if v.name not in names and v.shape == value.shape), None
        )
        if like is None or value.shape is None or value.dtype is None:
            continue
        shape = ir.node("Shape", [like])
        expand = ir.node("Expand", [value, shape.outputs[0]])
        shape.outputs[0].name, expand.outputs[0].name = f"{value.name}_shape", f"{value.name}_whole"
        expand.outputs[0].shape, expand.outputs[0].dtype = value.shape, value.dtype
        for node, index in list(value.uses()):
            if node is not expand:
                node.replace_input_with(index, expand.outputs[0])
        graph.insert_before(graph[0], [shape, expand])
        zero = np.zeros([1] * len(value.shape), value.dtype.numpy())
        value.const_value = ir.tensor(zero, name=value.name)
        graph.register_initializer(value)
