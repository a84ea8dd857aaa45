"""One text for all programs that take the same time: a graph and its sizes without the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, final

from torch import Tensor, fx

from graphprune.exporters.kernels.lower import of_pattern
from graphprune.exporters.kernels.packing import density
from graphprune.ir.graph import bound_arguments, op_name, output_node
from graphprune.ir.program import Program


def signature(program: Program, inputs: Sequence[Tensor] | None = None) -> str:
    """A hash of the deployed entry as it will be exported, the same for equal layers.

    In it are operators, arguments, shapes and types, the sizes of the example inputs, which of them
    are dynamic, and what is quantized; nodes, inputs and tensors have numbers in the order in which
    they are read, and no names.

    Args:
        program: of which one entry is deployed, with its mark of quantization.
        inputs: flat inputs of that entry, at the sizes to time; by default its examples.
    """
    mark = program.quantization
    entry = program.entries[program.deployed]
    reader = _Reader(program, entry.example if inputs is None else inputs)
    lines = [
        [_operator(node), reader.plain(bound_arguments(node) or node.args), reader.number(node)]
        for node in entry.graph.nodes
        if node.op == "call_function"
    ]
    ends = reader.plain(output_node(entry.graph).args[0])
    unread = [reader.plain(n) for n in entry.graph.find_nodes(op="placeholder") if not n.users]
    how = None if mark is None else {**mark.to_json(), "ignored": None, "keep_error": None}
    if how is not None:
        how.pop("blocks", None)  # it counts where there are zeros
    text = json.dumps([lines, ends, unread, bool(entry.cache), how], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _operator(node: fx.Node) -> str:
    return f"{op_name(node)}.{getattr(node.target, '_overloadname', '')}"


@final
class _Reader:
    """Writes arguments as plain data, with a number for each node, input and tensor."""

    def __init__(self, program: Program, inputs: Sequence[Tensor]) -> None:
        entry = program.entries[program.deployed]
        self._program, self._mark = program, program.quantization
        self._shapes = entry.shapes
        self._examples = dict(zip(entry.input_names, inputs, strict=True))
        self._numbers: dict[object, int] = {}

    def number(self, key: object) -> int:
        """The number of what is read, the next one at first sight."""
        return self._numbers.setdefault(key, len(self._numbers))

    def plain(self, value: Any) -> Any:
        """An argument as JSON takes it."""
        if isinstance(value, fx.Node):
            return self._node(value)
        if isinstance(value, list | tuple):
            return [self.plain(x) for x in value]
        if isinstance(value, dict):
            return {name: self.plain(x) for name, x in value.items()}
        return value if isinstance(value, int | float | str | None) else repr(value)

    def _node(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            name = str(node.target)
            quantized = self._mark is not None and self._mark.takes(name)
            tensor = self._program.tensors[name]
            blocks = self._mark.blocks if self._mark is not None and quantized else ""
            return ["tensor", self.number(name), *_form(tensor), quantized, *_zeros(tensor, blocks)]
        if node.op == "placeholder":
            form = _form(self._examples[node.name])
            return ["input", self.number(node), *form, self._shapes[node.name]]
        return ["node", self.number(node)]


def _form(tensor: Tensor) -> tuple[list[int], str]:
    return list(tensor.shape), str(tensor.dtype)


def _zeros(tensor: Tensor, blocks: str) -> list[Any]:
    """The fraction of zero blocks of a weight, stored either way; nothing where there are none."""
    if not blocks or tensor.dim() != 2 or not tensor.is_floating_point():
        return []
    array, height = (tensor != 0).numpy(force=True), of_pattern(blocks, 7).height
    zeros = [round(1 - density(way, height), 2) for way in (array, array.T)]
    return [blocks, *zeros] if any(zeros) else []
