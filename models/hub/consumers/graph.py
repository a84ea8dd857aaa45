"""An ONNX file as consumers see it: inputs, outputs, opsets, operators, weight files.

The protobuf is parsed and nothing else: no weights beside the graph are read, nothing runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

Version = tuple[int, int]

CONTRIB = "com.microsoft"
MULTI_HEAD = (CONTRIB, "MultiHeadAttention")
GROUP_QUERY = (CONTRIB, "GroupQueryAttention")


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output.

    Attributes:
        dtype: "float32", "int64" and so on; empty for what is no tensor.
        shape: a number, or the symbol's name, a dimension; None where the rank is unknown.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)}" if self.shape is not None else self.name


@dataclass(frozen=True, slots=True)
class Graph:
    """An ONNX file.

    Attributes:
        file: its name inside the folder.
        inputs: those that must be fed.
        optional: those that may be fed and have a value of their own.
        stored: the sizes of those values, unless they are expanded before anything reads them.
        operators: (domain, name) of all that are called, in branches and loops too.
        weights: the files that hold weights, beside it, and how many bytes each must have.
    """

    file: str
    inputs: Mapping[str, Value]
    optional: Mapping[str, Value]
    stored: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, Value]
    opset: int
    ir_version: int
    operators: frozenset[tuple[str, str]]
    weights: Mapping[str, int]

    @property
    def cache(self) -> dict[str, Value]:
        """The inputs that hold keys and values of past tokens."""
        return {n: v for n, v in self.inputs.items() if n.startswith("past")}


def read_graph(path: Path, file: str) -> Graph | None:
    """Read an ONNX file; None where it is none."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
        # An empty file is an empty model.
        return _graph(model, file) if model.graph.output else None
    except (DecodeError, OSError, KeyError, ValueError):
        return None


def _graph(model: onnx.ModelProto, file: str) -> Graph:
    stored = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    inputs = {i.name: _value(i) for i in model.graph.input}
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    expanded = _expanded(model.graph)
    local = {(function.domain, function.name) for function in model.functions}
    nodes = [*model.graph.node, *(n for function in model.functions for n in function.node)]
    return Graph(
        file=file,
        inputs={n: v for n, v in inputs.items() if n not in stored},
        optional={n: v for n, v in inputs.items() if n in stored},
        stored={n: stored[n] for n in inputs if n in stored and n not in expanded},
        outputs={o.name: _value(o) for o in model.graph.output},
        opset=opsets.get("ai.onnx", 1),
        ir_version=model.ir_version,
        operators=frozenset((n.domain, n.op_type) for n in _all(nodes)) - local,
        weights=_weights(model.graph),
    )


def _expanded(graph: onnx.GraphProto) -> set[str]:
    """Names that Expand alone reads."""
    readers: dict[str, set[str]] = {}
    for node in _all(list(graph.node)):
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    return {name for name, kinds in readers.items() if kinds == {"Expand"}}


def _value(info: onnx.ValueInfoProto) -> Value:
    import onnx

    tensor = info.type.tensor_type
    dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower() if tensor.elem_type else ""
    shape = None
    if tensor.HasField("shape"):
        shape = tuple(
            d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim
        )
    return Value(info.name, "float32" if dtype == "float" else dtype, shape)


def _all(nodes: list[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those of the bodies of loops and branches."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _all(list(body.node))


def _weights(graph: onnx.GraphProto) -> dict[str, int]:
    import onnx

    sizes: dict[str, int] = {}
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {e.key: e.value for e in tensor.external_data}
            end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
            sizes[entry["location"]] = max(sizes.get(entry["location"], 0), end)
    return sizes


# The first release of ONNX Runtime that loads an opset, and a version of the file format: tried
# from 1.15 to 1.32. What lies between two entries needs the later one.
_OPSETS: dict[int, Version] = {
    19: (1, 15), 20: (1, 17), 21: (1, 18), 22: (1, 21), 23: (1, 23), 25: (1, 24), 26: (1, 25),
    28: (1, 32),
}  # fmt: skip
_FORMATS: dict[int, Version] = {9: (1, 15), 10: (1, 18), 11: (1, 23), 13: (1, 24), 14: (1, 32)}


@dataclass(frozen=True, slots=True)
class Floor:
    """The oldest ONNX Runtime that runs a file, and what asks for it.

    Attributes:
        silent: whether older ones load it and give wrong numbers.
    """

    version: Version
    why: str
    silent: bool = False

    def __str__(self) -> str:
        major, minor = self.version
        wrong = f"; {major}.{minor - 1} and older give wrong numbers without an error"
        return f"{major}.{minor} or newer ({self.why}{wrong if self.silent else ''})"


def floor(graph: Graph) -> Floor | None:
    """The oldest ONNX Runtime that runs a file; None where it is newer than all that are known."""
    opset, fmt = _first(_OPSETS, graph.opset), _first(_FORMATS, graph.ir_version)
    if opset is None or fmt is None:
        return None
    floors = [Floor(opset, f"opset {graph.opset}"), Floor(fmt, f"format {graph.ir_version}")]
    if MULTI_HEAD in graph.operators:
        # Measured: 1.20.1 is off by 1 to 3 with a bias, several heads and a batch above one.
        floors.append(Floor((1, 21), MULTI_HEAD[1], silent=True))
    return max(floors, key=lambda f: f.version)


def _first(table: Mapping[int, Version], number: int) -> Version | None:
    return next((table[n] for n in sorted(table) if n >= number), None)
