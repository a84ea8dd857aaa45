"""Products with a weight of many zero blocks become nodes SparseLinear.

MatMul(x, W) [+ bias] [Gelu | Relu | SiLU]   ->   SparseLinear(x, packed W, bias)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np

from graphprune.exporters.kernels.fallback import fallback
from graphprune.exporters.kernels.library import DOMAIN, OPERATOR
from graphprune.exporters.kernels.packing import WIDTH, pack
from graphprune.exporters.quantize.layers import Editor, Layer, attributes, readers_of

if TYPE_CHECKING:
    import onnx

    from graphprune.exporters.kernels.packing import Floats

    _Readers = Mapping[str, list[onnx.NodeProto]]


SOME = 0.02  # of the blocks must be zero, or a pattern is not tried


@final
@dataclass(frozen=True, slots=True)
class Form:
    """How a sparse product is stored.

    Attributes:
        height: outputs of a block.
        bits: of the codes.
    """

    height: int
    bits: int

    @property
    def pattern(self) -> str:
        """The blocks, as passes call them."""
        return f"{self.height}x{WIDTH}"


def of_pattern(pattern: str, bits: int) -> Form:
    """The form that stores blocks of a pattern, such as "32x4"."""
    return Form(int(pattern.partition("x")[0]), bits)


def own_products(
    model: onnx.ModelProto, layers: Sequence[Layer]
) -> tuple[Editor, dict[Layer, Floats]]:
    """The layers that are products with a weight of their own, in a copy of the model.

    Returns:
        An editor of the copy, in which they are MatMul; their weights [outputs, inputs].
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    editor, found = Editor(copy), {}
    for layer in layers:
        if layer.kind == "matmul" and not layer.tied:
            editor.spell_out(layer)
            found[layer] = editor.array(editor.nodes[layer.node].input[1]).T
    return editor, found


def lower(model: onnx.ModelProto, forms: Mapping[Layer, Form]) -> None:
    """Replace layers by sparse products, each with its bias and activation; in place.

    Args:
        model: float where the layers are.
        forms: of the layers to replace.
    """
    from onnx import helper

    if not forms:
        return
    editor = Editor(model)
    for layer, form in forms.items():
        editor.spell_out(layer)
        _replace(editor, layer, form)
    editor.drop_unread()
    versions = {opset.domain: opset.version for opset in model.opset_import}
    if DOMAIN not in versions:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        model.functions.append(fallback(versions[""]))


def _replace(editor: Editor, layer: Layer, form: Form) -> None:
    from onnx import helper

    node = editor.nodes[layer.node]
    # A MatMul's weight is [inputs, outputs].
    packed = pack(np.ascontiguousarray(editor.array(node.input[1]).T), form.height, form.bits)
    chain = chain_of(editor, node)
    stem = f"{layer.weight}_{form.pattern}"
    inputs = [
        node.input[0],
        editor.store(f"{stem}_blocks", packed.blocks),
        editor.store(f"{stem}_columns", packed.columns),
        editor.store(f"{stem}_starts", packed.starts),
        editor.store(f"{stem}_scales", packed.scales),
    ]
    bias = editor.array(chain.bias) if chain.bias else np.zeros(packed.outputs, np.float32)
    padded = np.pad(bias, (0, len(packed.scales) - len(bias)))
    inputs.append(editor.store(f"{chain.bias or stem}_{form.pattern}_bias", padded))
    new = helper.make_node(
        OPERATOR,
        inputs,
        [chain.output],
        f"{node.name}_sparse",
        domain=DOMAIN,
    )
    values = {
        "outputs": packed.outputs,
        "inputs": packed.inputs,
        "bits": packed.bits,
        "activation": chain.activation,
    }
    new.attribute.extend(helper.make_attribute(name, value) for name, value in values.items())
    position = list(editor.graph.node).index(node)
    for gone in chain.nodes:
        editor.graph.node.remove(gone)
    editor.graph.node.insert(position, new)


@final
@dataclass(frozen=True, slots=True)
class Chain:
    """A product and what SparseLinear computes with it.

    Attributes:
        nodes: the product, the sum with the bias and the activation, as far as they are there.
        bias: name of the constant, or "".
        activation: "none", "gelu", "relu" or "silu".
        output: name of what comes out.
    """

    nodes: tuple[onnx.NodeProto, ...]
    bias: str
    activation: str
    output: str


def chain_of(editor: Editor, product: onnx.NodeProto) -> Chain:
    """The chain that begins with a product; no other node reads what is between its nodes."""
    readers = readers_of(editor.graph)
    nodes, bias = [product], ""
    found = editor.bias(product, readers)
    if found is not None:
        nodes.append(found[0])
        bias = found[1]
    activation, more = _activation(editor, nodes[-1].output[0], readers)
    nodes += more
    return Chain(tuple(nodes), bias, activation, nodes[-1].output[0])


def _activation(
    editor: Editor, value: str, readers: _Readers
) -> tuple[str, Sequence[onnx.NodeProto]]:
    users = readers.get(value, [])
    if value in {output.name for output in editor.graph.output}:
        return "none", ()
    kinds = sorted(user.op_type for user in users)
    if kinds == ["Relu"]:
        return "relu", users
    if kinds == ["Gelu"] and attributes(users[0]).get("approximate", b"none") == b"none":
        return "gelu", users
    if kinds == ["Mul", "Sigmoid"]:
        product, sigmoid = sorted(users, key=lambda user: user.op_type)
        only = readers.get(sigmoid.output[0], []) == [product]
        if only and sorted(product.input) == sorted([value, sigmoid.output[0]]):
            return "silu", (sigmoid, product)
    return "none", ()
