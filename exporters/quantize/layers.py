"""The layers of an ONNX graph that can be quantized, and the graph brought into shape for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

Kind = Literal["matmul", "conv", "embedding", "lstm", "recurrent"]


@final
@dataclass(frozen=True, slots=True)
class Layer:
    """A node that multiplies with, or looks up in, a weight of the file.

    Attributes:
        node: its name in the graph.
        weight: name of the initializer; of a recurrent layer, that of its inputs.
        kind: "matmul" (MatMul, Gemm), "conv", "embedding" (Gather from a table), "lstm", or
            "recurrent" (GRU, RNN).
        tied: the weight comes through a Transpose, because another node reads it as it is.
    """

    node: str
    weight: str
    kind: Kind
    tied: bool = False


def find_layers(model: onnx.ModelProto) -> list[Layer]:
    """Every layer in order; nodes without a name get one."""
    weights = {i.name: i for i in model.graph.initializer}
    turned = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "Transpose" and node.input[0] in weights and _swaps(node)
    }
    found = []
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{number}"
        for place, kind in _KINDS.get(node.op_type, {}).items():
            name = node.input[place]
            weight = weights.get(turned.get(name, name))
            if weight is None or weight.data_type != 1 or not _fits(node, weight):  # 1: float32
                continue
            found.append(Layer(node.name, weight.name, kind, name in turned))
    return found


_KINDS: dict[str, dict[int, Kind]] = {
    "MatMul": {1: "matmul"},
    "Gemm": {1: "matmul"},
    "Conv": {1: "conv"},
    "Gather": {0: "embedding"},
    "LSTM": {1: "lstm"},
    "GRU": {1: "recurrent"},
    "RNN": {1: "recurrent"},
}


def _swaps(node: onnx.NodeProto) -> bool:
    return list(attributes(node).get("perm", [1, 0])) == [1, 0]


def _fits(node: onnx.NodeProto, weight: onnx.TensorProto) -> bool:
    a = attributes(node)
    if node.op_type == "Gemm":
        plain = a.get("alpha", 1.0) == 1.0 and a.get("beta", 1.0) == 1.0 and not a.get("transA", 0)
        return plain and len(weight.dims) == 2
    if node.op_type == "Gather":
        return a.get("axis", 0) == 0 and len(weight.dims) == 2
    if node.op_type in ("LSTM", "GRU", "RNN"):
        return a.get("layout", 0) == 0
    return node.op_type == "Conv" or len(weight.dims) == 2


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name, as plain values."""
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def half_tied(model: onnx.ModelProto, chosen: Collection[Layer]) -> dict[Layer, str]:
    """Layers to leave in float, with the reason, because their weight is also read in float.

    Storing a tied table twice, in float and in int8, would make the file larger.
    """
    readers = readers_of(model.graph)
    taken = {layer.node for layer in chosen}
    shared = {layer.weight for layer in chosen if layer.tied or layer.kind == "embedding"}
    result: dict[Layer, str] = {}
    for layer in chosen:
        if layer.weight not in shared:
            continue
        left = [n.name for n in _through_transposes(layer.weight, readers) if n.name not in taken]
        if left:
            result[layer] = f"{left[0]!r} reads the same weight and stays float"
    return result


def _through_transposes(
    weight: str, readers: Mapping[str, list[onnx.NodeProto]]
) -> Iterable[onnx.NodeProto]:
    for node in readers.get(weight, []):
        if node.op_type == "Transpose":
            yield from readers.get(node.output[0], [])
        else:
            yield node


def readers_of(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that read each value, by its name."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


class Editor:
    """Edits a model's nodes and initializers in place."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph = model, model.graph
        self.weights = {i.name: i for i in model.graph.initializer}
        self.nodes = {n.name: n for n in model.graph.node}

    def prepare(
        self, chosen: Sequence[Layer], layers: Iterable[Layer], largest: int = 127
    ) -> list[str]:
        """Products become MatMul with a weight of their own; tables and LSTM layers become int8.

        Codes of an LSTM's weights are `largest` at most.

        Every Gemm is spelled out, also one that stays float: ORT's quantizer (1.31) does so with
        those that it meets, and then trips over their old shapes.

        Returns:
            Names of the nodes that compute the chosen products; some compute several (`_merge`).
        """
        for layer in layers:
            self.spell_out(layer)
        for layer in chosen:
            if layer.tied:
                self._untie(layer)
        for layer in chosen:
            if layer.kind == "embedding":
                self._quantize_table(layer)
            elif layer.kind == "lstm":
                self._quantize_lstm(layer, largest)
        names = self._merge_all([self.nodes[x.node] for x in chosen if x.kind == "matmul"])
        self.drop_unread()
        return [*names, *(x.node for x in chosen if x.kind == "conv")]

    def _merge_all(self, products: Iterable[onnx.NodeProto]) -> list[str]:
        """Products of one value become one, so that it is quantized and packed once.

        A weight that others read too keeps its product, or the file would hold it twice.
        """
        readers = readers_of(self.graph)
        groups: dict[str, list[onnx.NodeProto]] = {}
        for node in products:
            alone = len(readers[node.input[1]]) == 1
            groups.setdefault(node.input[0] if alone else node.name, []).append(node)
        return [
            group[0].name if len(group) == 1 else self._merge(group, readers)
            for group in groups.values()
        ]

    def _merge(
        self, group: Sequence[onnx.NodeProto], readers: Mapping[str, list[onnx.NodeProto]]
    ) -> str:
        """x a + p, x b + q  ->  Split(x [a b] + [p q]); the name of the product."""
        from onnx import helper

        first, name = group[0], f"{group[0].name}_merged"
        stem = f"{first.input[1]}_merged"
        weights = [self.array(node.input[1]) for node in group]
        biases = [self.bias(node, readers) for node in group]
        widths = [weight.shape[1] for weight in weights]
        whole = f"{first.output[0]}_merged"
        weight = self.store(stem, np.concatenate(weights, 1))
        new = [helper.make_node("MatMul", [first.input[0], weight], [whole], name)]
        if any(biases):
            rows = [
                self.array(found[1]) if found else np.zeros(width, np.float32)
                for found, width in zip(biases, widths, strict=True)
            ]
            inputs = [whole, self.store(f"{stem}_bias", np.concatenate(rows))]
            whole = f"{whole}_sum"
            new.append(helper.make_node("Add", inputs, [whole], f"{name}_bias"))
        ends = [found[0] if found else node for node, found in zip(group, biases, strict=True)]
        inputs = [whole, self.store(f"{stem}_widths", np.array(widths, np.int64))]
        outputs = [node.output[0] for node in ends]
        new.append(helper.make_node("Split", inputs, outputs, f"{name}_split", axis=-1))
        position = list(self.graph.node).index(first)
        for node in (*group, *(found[0] for found in biases if found)):
            self.graph.node.remove(node)
        for offset, node in enumerate(new):
            self.graph.node.insert(position + offset, node)
        return name

    def bias(
        self, node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]]
    ) -> tuple[onnx.NodeProto, str] | None:
        """The Add that alone reads a product, and the constant of its width that it adds."""
        users = readers.get(node.output[0], [])
        if len(users) != 1 or users[0].op_type != "Add":
            return None
        if node.output[0] in {output.name for output in self.graph.output}:
            return None
        width = [self.weights[node.input[1]].dims[1]]
        found = [n for n in users[0].input if n in self.weights and self.weights[n].dims == width]
        return (users[0], found[0]) if found else None

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """A weight's values."""
        from onnx import numpy_helper

        array: npt.NDArray[np.float32] = numpy_helper.to_array(self.weights[name])
        return array

    def store(self, name: str, array: npt.NDArray[np.generic]) -> str:
        """Add a weight; one of that name holds the same values already."""
        from onnx import numpy_helper

        if name not in self.weights:
            tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
            self.graph.initializer.append(tensor)
            self.weights[name] = self.graph.initializer[-1]
        return name

    def replace(self, name: str, array: npt.NDArray[np.generic]) -> None:
        """Give a weight other values."""
        from onnx import numpy_helper

        self.weights[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))

    def _untie(self, layer: Layer) -> None:
        node = self.nodes[layer.node]
        node.input[1] = self.store(f"{layer.weight}_transposed", self.array(layer.weight).T)

    def spell_out(self, layer: Layer) -> None:
        """Make a Gemm a MatMul and an Add; other layers stay as they are."""
        from onnx import helper

        node = self.nodes[layer.node]
        if node.op_type != "Gemm":
            return
        if attributes(node).get("transB", 0):
            turned = f"{node.input[1]}_transposed"
            node.input[1] = self.store(turned, self.array(node.input[1]).T)
        bias = node.input[2] if len(node.input) > 2 else ""
        del node.attribute[:]
        node.op_type = "MatMul"
        if not bias:
            return
        product = f"{node.output[0]}_product"
        add = helper.make_node("Add", [product, bias], [node.output[0]], f"{node.name}_bias")
        del node.input[2:]
        node.output[0] = product
        self.graph.node.insert(list(self.graph.node).index(node) + 1, add)

    def _quantize_lstm(self, layer: Layer, largest: int) -> None:
        """LSTM -> DynamicQuantizeLSTM, whose weights are turned, with a scale a row of each gate.

        Layers that share a weight share its codes.
        """
        from onnx import helper

        node = self.nodes[layer.node]
        inputs = [*node.input, *[""] * (8 - len(node.input))]
        for place in (1, 2):
            weight, stem = self.array(node.input[place]), f"{node.input[place]}_lstm"
            codes, scales = quantized_rows(weight.reshape(-1, weight.shape[2]), largest)
            turned = codes.reshape(weight.shape).transpose(0, 2, 1)
            inputs[place] = self.store(f"{stem}_int8", turned)
            inputs.append(self.store(f"{stem}_scales", scales.reshape(weight.shape[:2])))
            inputs.append(self.store(f"{stem}_zeros", np.zeros(weight.shape[:2], np.int8)))
        del node.input[:]
        node.input.extend(inputs)
        plain = [a for a in node.attribute if a.name != "layout"]  # 0, as `_fits` saw
        del node.attribute[:]
        node.attribute.extend(plain)
        node.op_type, node.domain = "DynamicQuantizeLSTM", "com.microsoft"
        if not any(known.domain == node.domain for known in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(node.domain, 1))

    def _quantize_table(self, layer: Layer) -> None:
        """Gather(float) -> Gather(int8) as float, times the gathered rows' scales."""
        from onnx import helper

        # ORT's quantizer makes names such as X_scale and X_quantized; these must not meet them.
        node = self.nodes[layer.node]
        indices, output = node.input[1], node.output[0]
        coded, plain, steps = (f"{output}_row_{part}" for part in ("int8", "codes", "scales"))
        codes, scales = quantized_rows(self.array(layer.weight))
        node.input[0] = self.store(f"{layer.weight}_row_int8", codes)
        node.output[0] = coded
        table_scales = self.store(f"{layer.weight}_row_scales", scales)
        following = [
            helper.make_node("Cast", [coded], [plain], to=1),
            helper.make_node("Gather", [table_scales, indices], [steps], axis=0),
            helper.make_node("Mul", [plain, steps], [output]),
        ]
        position = list(self.graph.node).index(node) + 1
        for offset, new in enumerate(following):
            new.name = f"{node.name}_{new.op_type}"
            self.graph.node.insert(position + offset, new)

    def drop_unread(self) -> None:
        """Drop weights that nothing reads, and the Transposes that alone read them."""
        for node in [n for n in self.graph.node if n.op_type == "Transpose"]:
            if node.output[0] not in self._read():
                self.graph.node.remove(node)
        read = self._read()
        for tensor in [i for i in self.graph.initializer if i.name not in read]:
            self.graph.initializer.remove(tensor)

    def _read(self) -> set[str]:
        read = {name for node in self.graph.node for name in node.input}
        return read | {output.name for output in self.graph.output}


def quantized_rows(
    table: npt.NDArray[np.float32], largest: int = 127
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """int8 codes [rows, width] and scales [rows, 1] with |table - codes x scales| <= scales / 2."""
    scales = np.abs(table).max(axis=1, keepdims=True, initial=0.0) / np.float32(largest)
    scales = np.where(scales == 0, 1.0, scales).astype(np.float32)
    codes = np.clip(np.rint(table / scales), -largest, largest).astype(np.int8)
    return codes, scales
