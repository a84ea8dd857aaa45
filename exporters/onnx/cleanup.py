"""Clean up an ONNX graph: nothing computed twice or unused, weights as MatMul reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir


def clean_up(model: ir.Model) -> None:
    """Share equal computations, store weights in the layout their MatMul reads, drop the rest."""
    import onnx_ir.passes.common as common
    from onnxscript.optimizer import optimize_ir
    from onnxscript.rewriter.rules.fusion import _rms_normalization

    optimize_ir(model, should_fold=_foldable)
    # Of torch.onnx's own fusions only this one: its RotaryEmbedding (onnxscript 0.7) hands ORT
    # cos and sin of batch 1, which ORT refuses for larger batches.
    _rms_normalization.fuse_rms_normalization(model)
    # The pass (onnx_ir 1.1) takes the outputs of loop bodies away.
    if not any(_has_body(node) for node in model.graph):
        common.IdentityEliminationPass()(model)
    _store_transposed(model.graph)
    for step in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
    ):
        step(model)
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in model.graph.initializers.values():
        value.metadata_props.clear()


def _has_body(node: ir.Node) -> bool:
    """Whether a node runs graphs of its own, as Loop and If do."""
    import onnx_ir as ir

    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())


def _foldable(node: ir.Node) -> bool | None:
    """Leave weights alone: folding what reads a tied weight would store it twice."""
    weights = [v for v in node.inputs if v is not None and v.is_initializer()]
    if any(len(w.uses()) > 1 and (w.shape is None or len(w.shape) > 1) for w in weights):
        return False
    return False if weights and node.op_type == "Transpose" else None


def _store_transposed(graph: ir.Graph) -> None:
    """Transpose(weight) -> the weight stored so, when nothing else reads it.

    A tied weight has other readers: its Transpose stays, and the file holds it once.
    """
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "Transpose":
            continue
        weight, output = node.inputs[0], node.outputs[0]
        if weight is None or not weight.is_initializer() or len(weight.uses()) > 1:
            continue
        if weight.is_graph_output() or output.is_graph_output():
            continue
        assert weight.const_value is not None
        permutation = node.attributes.get_ints("perm", None)
        array = np.ascontiguousarray(np.transpose(weight.const_value.numpy(), permutation))
        output.replace_all_uses_with(weight)
        graph.remove(node, safe=True)
        weight.const_value = ir.tensor(array, name=weight.name)
        weight.shape = ir.Shape(array.shape)
