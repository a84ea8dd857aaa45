"""Names of the inputs, outputs, nodes and dynamic sizes of the ONNX file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, fx

from graphprune.ir.graph import output_node, value_of
from graphprune.ir.outputs import leaf_names
from graphprune.ir.program import Entry
from graphprune.ir.sizes import limits_to_json

if TYPE_CHECKING:
    import onnx_ir as ir


# As most ONNX files have them: runtimes that make caches know the batch by its name.
_SIZES = {
    "batch": "batch_size",
    "sequence": "sequence_length",
    "past": "past_sequence_length",
}


def size_name(symbol: str) -> str:
    """Name an entry's dynamic size in ONNX files; "past+sequence" is two names."""
    return rename_symbols(symbol, _SIZES)


def input_names(entry: Entry) -> list[str]:
    """The model's own argument names, in the order of the placeholders.

    A nested argument adds its keys: `past_key_values.0.1`.
    """
    names: dict[str, str] = {}
    for argument in entry.arguments:
        keys = leaf_names(argument.spec)
        for leaf, key in zip(argument.leaves, keys, strict=True):
            if isinstance(leaf, str):
                names[leaf] = f"{argument.name}.{key}" if key else argument.name
    return [names.get(name, name) for name in entry.input_names]


def limits_by_input(entry: Entry, *, cache: bool = True) -> dict[str, Any]:
    """The limits of an entry's sizes as JSON, by the names of the ONNX file's inputs and sizes.

    Args:
        entry: whose sizes.
        cache: whether relations to the sizes of a cache are among them.
    """
    names = dict(zip(entry.input_names, input_names(entry), strict=True))
    return limits_to_json(
        {size_name(symbol): bound for symbol, bound in entry.bounds.items()},
        [
            relation.renamed(names)
            for relation in entry.relations
            if cache or not any(name in entry.cache for name, _ in relation.sizes.values())
        ],
        {names[name]: dims for name, dims in entry.fixed.items()},
    )


def output_names(entry: Entry) -> list[str]:
    """Names of the tensors among the outputs: keys of the model's output, or output_0, output_1, …

    A name that an input has too gets `_out` after it, because ONNX has one namespace.
    """
    taken = set(input_names(entry))
    names = []
    for name, tensor in zip(_flat_names(entry), is_tensor_output(entry), strict=True):
        if tensor:
            while name in taken:
                name += "_out"
            taken.add(name)
            names.append(name)
    return names


def is_tensor_output(entry: Entry) -> list[bool]:
    """For each flat output: whether it is a tensor; None and plain numbers are not exported."""
    values = cast(tuple[Any, ...], output_node(entry.graph).args[0])
    return [isinstance(v, fx.Node) and isinstance(value_of(v), Tensor) for v in values]


def _flat_names(entry: Entry) -> Iterable[str]:
    keys = leaf_names(entry.out_spec)
    return [f"output_{k or i}" if (k or "0")[0].isdigit() else k for i, k in enumerate(keys)]


def rename_symbols(expression: str, names: dict[str, str]) -> str:
    """A size such as `2*s53` with its symbols replaced."""
    return re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m.group(), m.group()), expression)


def name_nodes(model: ir.Model) -> None:
    """Name nodes by the module that they come from, as viewers show it: /encoder/layer.0/MatMul.

    A node that reads a parameter comes from the parameter's module, others from what the modules
    before and after them have in common.
    """
    paths: list[tuple[str, ...] | None] = []
    known = set(model.graph.initializers)
    for node in model.graph:
        own = [
            tuple(v.name.split(".")[:-1]) for v in node.inputs if v is not None and v.name in known
        ]
        paths.append(next((path for path in own if path), None))
    before: tuple[str, ...] = ()
    after = _following(paths)
    taken: Counter[str] = Counter()
    for node, own_path, next_path in zip(model.graph, paths, after, strict=True):
        pairs = zip(before, next_path, strict=False)
        path = own_path or tuple(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        before = own_path or before
        name = "/".join(("", *path, node.op_type))
        node.name = f"{name}_{taken[name]}" if taken[name] else name
        taken[name] += 1


def _following(paths: Sequence[tuple[str, ...] | None]) -> list[tuple[str, ...]]:
    """For each place the first path at it or after it; empty after the last."""
    found: list[tuple[str, ...]] = []
    for path in reversed(paths):
        found.append(path or (found[-1] if found else ()))
    return found[::-1]
